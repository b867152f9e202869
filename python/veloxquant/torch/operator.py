"""Attention on a cache as an operator of PyTorch: one opaque node to torch.compile.

The operator sees a cache by its ticket, a tensor of one element that stands for all that the cache holds and is declared
to be changed. So a graph does not depend on how many tokens there are, nor on where they are: codes may move when they
grow, and no graph is compiled again.
"""

import itertools
import weakref
from typing import NamedTuple

import torch

from veloxquant import Error

numbers = itertools.count(1)
caches = weakref.WeakValueDictionary()  # number in a ticket, and address of the ticket -> its cache


class NewTokens(NamedTuple):
    """What a compressed layer gives a model's attention in the place of its keys."""

    states: torch.Tensor
    ticket: torch.Tensor
    layer: int


def issue_ticket(cache, device):
    number = next(numbers)
    ticket = torch.full((1,), number, dtype=torch.int64, device=device)
    torch._dynamo.mark_static_address(ticket)
    caches["number", number] = caches["address", ticket.data_ptr()] = cache
    return ticket


def cache_of(ticket):
    cache = caches.get(("address", ticket.data_ptr()))
    if cache is None:
        # A copy, as backends make it that do not change tensors in place. To look waits for the device.
        cache = caches.get(("number", int(ticket)))
    if cache is None:
        raise Error("[veloxquant attend] ticket: got that of no cache, wanted the ticket of one")
    return cache


def attend(query, key, value, mask, ticket, layer, scaling):
    valid = None
    if mask is not None:
        valid = mask[:, -query.shape[2] :].to(torch.bool)
        if valid.all():
            valid = None
    return cache_of(ticket).layers[layer].attend(query, key, value, scaling, valid).contiguous()


def attend_fake(query, key, value, mask, ticket, layer, scaling):
    batch, heads, n, dim = query.shape
    return query.new_empty(batch, n, heads, dim)


library = torch.library.Library("veloxquant", "DEF")
# Not in the graphs that torch.compile captures by itself: a step keeps count on the host too (see CapturedStep).
tags = [getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)]
library.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor(a!) ticket, SymInt layer, float scaling)"
    " -> Tensor",
    tags=tags,
)
library.impl("attend", attend, "CompositeExplicitAutograd")
torch.library.register_fake("veloxquant::attend", attend_fake, lib=library)
