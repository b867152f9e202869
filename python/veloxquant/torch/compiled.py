"""Decode steps with torch.compile, and whole steps in a CUDA graph."""

import functools

import torch

from veloxquant import Error
from veloxquant.torch.fused import group_projections
from veloxquant.torch.kernels import CudaKernels


def compile_layers(model, group=True, **options):
    """torch.compile for the decode steps of a model: its decoder layers as one graph that all of them share, and what
    comes before and after them. Prompts run as before. options: torch.compile's.

    group: projections of one input become one matrix product. Their weights then lie together; give it the model where
    it is to stay. To `model.forward = torch.compile(model.forward)`, which works too, this takes the time of a layer, not
    of all.
    """
    names = getattr(model, "_no_split_modules", None) or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise Error("[compile_layers] model: got one that names no decoder layers, wanted `_no_split_modules` to")
    if group:
        group_projections(model)
    # A layer's number is an input of the graph, not a part of it.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    around = [getattr(model.base_model, name, None) for name in ("rotary_emb", "norm")]
    for module in (*layers, *around, model.get_output_embeddings()):
        if module is not None:
            compile_steps(module, options)


def compile_steps(module, options):
    plain = module.forward
    compiled = torch.compile(plain, **options)

    @functools.wraps(plain)
    def forward(hidden_states, *args, **kwargs):
        return (compiled if hidden_states.shape[1] == 1 else plain)(hidden_states, *args, **kwargs)

    module.forward = forward


class CapturedStep:
    """Decode steps of a model that has a cache, as replays of a CUDA graph: logits = step(tokens).

    tokens: [B, 1]. Logits [B, 1, V] are overwritten by the next step. The first steps run as they are, so that whatever
    compiles does; where the cache was changed otherwise or has to grow, a step is captured anew. Steps of different
    caches may run at once where each is called on a stream of its own.
    """

    WARM_UP = 2

    def __init__(self, model, cache):
        if cache.lengths is None or cache.lengths.device.type != "cuda" or not cache.all_compressed:
            raise Error(
                "[CapturedStep] cache: got one that is empty, not on a CUDA device or with layers that are not "
                "compressed, wanted a prompt in it, there"
            )
        self.model, self.cache = model, cache
        self.graph, self.bound, self.warm = None, None, 0

    @torch.no_grad()
    def __call__(self, tokens):
        cache = self.cache
        cache.make_room(1)
        if self.graph is None or self.bound != cache.bound:
            if self.warm < self.WARM_UP:
                self.warm += 1
                return self.forward(tokens)
            self.capture(tokens)
        self.tokens.copy_(tokens)
        self.graph.replay()
        cache.count_replay()
        return self.logits

    def forward(self, tokens):
        # Rows hold no padding: how many tokens they have is where the next one is, and the device counts them itself.
        position = self.cache.lengths.counts[2:].sum(0)[:, None]
        return self.model(tokens, position_ids=position, past_key_values=self.cache).logits

    def capture(self, tokens):
        self.tokens, self.bound = tokens.clone(), self.cache.bound
        self.graph = torch.cuda.CUDAGraph()
        # Scratch memory is a stream's. The default stream cannot be captured: PyTorch has another for it.
        stream = torch.cuda.current_stream(self.tokens.device)
        own = None if stream == torch.cuda.default_stream(self.tokens.device) else stream
        with torch.cuda.graph(self.graph, stream=own):
            self.logits = self.forward(self.tokens)
        self.scratch = list(CudaKernels.workspaces.values())  # the graph's too, should others come to need more
        self.cache.forget_captured_step()
