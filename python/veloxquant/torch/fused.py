"""Linear layers of one input as one matrix product, in compiled steps."""

import torch
import torch.nn.functional as F

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Group:
    """Their weights one below the other; and, while a graph is traced, the product with the input at hand."""

    def __init__(self, parts):
        self.weight = torch.cat([part.weight.data for part in parts])
        self.bias = None if parts[0].bias is None else torch.cat([part.bias.data for part in parts])
        self.x = self.product = None


class GroupedLinear(torch.nn.Linear):
    """As it was, on its rows of the group's weight. Traced by torch.compile, it takes its columns of the group's product,
    where the layer before it in the group had the same input."""

    def forward(self, x):
        if not torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        group = self.group
        if group.x is not x:
            group.x, group.product = x, F.linear(x, group.weight, group.bias)
        out = group.product[..., self.columns[0] : self.columns[1]]
        if self.columns[1] == group.weight.shape[0]:
            group.x = group.product = None
        return out


@torch.no_grad()
def group_projections(model):
    """Projections of queries, keys and values, and those of gated MLPs, get weights that lie together; no bytes more."""
    for module in list(model.modules()):
        for names in GROUPS:
            parts = [getattr(module, name, None) for name in names]
            plain = all(type(part) is torch.nn.Linear for part in parts)
            if not plain or len({(part.in_features, part.bias is None, part.weight.dtype) for part in parts}) > 1:
                continue
            group, first = Group(parts), 0
            for part in parts:
                last = first + part.out_features
                part.weight.data = group.weight[first:last]
                if group.bias is not None:
                    part.bias.data = group.bias[first:last]
                part.__class__, part.group, part.columns = GroupedLinear, group, (first, last)
                first = last
