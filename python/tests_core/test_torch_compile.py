"""veloxquant.torch under torch.compile and in CUDA graphs: what runs eagerly comes out, and nothing is compiled again."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_torch_cache import DEVICES, feed, model_and_tables, on, tokens  # noqa: E402

import veloxquant.torch as vt  # noqa: E402
from veloxquant import Error  # noqa: E402


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def deep_model(layers=4):
    """More layers than the numbers 0 and 1, of which torch.compile makes graphs of their own."""
    model, tables = model_and_tables(4)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types = layers, None
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(config).eval(), vt.Tables([tables.layers[0]] * layers)


class Counter:
    """A backend that counts its graphs."""

    def __init__(self, name):
        self.name, self.graphs = name, 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.name)(graph, inputs)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_whole_model_is_one_graph_for_all_lengths(backend):
    model, tables = on("cpu")
    ids = tokens(260, 2)
    want = feed(model, vt.VeloxQuantCache(model, tables), ids, [150, *[1] * 110])
    counter = Counter(backend)
    model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    cache = vt.VeloxQuantCache(model, tables)
    got = [feed(model, cache, ids, [150, 1, 1])]
    graphs = counter.graphs  # a prompt, a first token, the next with lengths that may change
    assert graphs <= 3
    with torch.compiler.set_stance("fail_on_recompile"):
        got.append(feed(model, cache, ids[:, 152:], [1] * 108))
    assert cache.lengths.packed == [192, 192]
    assert torch.equal(torch.cat(got, 1), want)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_all_layers_share_a_graph(backend):
    model, tables = deep_model()
    ids = tokens(260, 2)
    want = feed(model, vt.VeloxQuantCache(model, tables), ids, [150, *[1] * 110])
    counter = Counter(backend)
    vt.compile_layers(model, group=False, backend=counter, fullgraph=True)
    cache = vt.VeloxQuantCache(model, tables)
    got = [feed(model, cache, ids, [150, 1, 1])]
    assert counter.graphs <= 5  # layers 0 and the rest, positions, norm and logits; none of the prompt
    with torch.compiler.set_stance("fail_on_recompile"):
        got.append(feed(model, cache, ids[:, 152:], [1] * 108))
        again = feed(model, vt.VeloxQuantCache(model, tables), ids, [150, *[1] * 20])
    assert torch.equal(torch.cat(got, 1), want) and torch.equal(again, want[:, :170])


@torch.no_grad()
def test_projections_of_one_input_are_one_product():
    """Where they are not, as here of the last layer's queries, each is its own, and right."""
    torch.manual_seed(7)
    config = transformers.Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.08, eos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).bias.data.normal_()
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda module, x: (2 * x[0],))
    tables = vt.Tables([model_and_tables(4)[1].layers[0]] * 2)
    ids, products = tokens(30, 2), []
    want = feed(model, vt.VeloxQuantCache(model, tables), ids, [20, *[1] * 10])

    def backend(graph, inputs):
        products.append(sum(node.target is torch._C._nn.linear for node in graph.graph.nodes))
        return graph

    numbers, names = sum(p.numel() for p in model.parameters()), list(model.state_dict())
    vt.compile_layers(model, backend=backend)
    got = feed(model, vt.VeloxQuantCache(model, tables), ids, [20, *[1] * 10])
    assert (got - want).norm() < 1e-5 * want.norm()
    assert 4 in products  # queries, keys and values; their output; the gated projections; the MLP's output
    assert numbers == sum(p.numel() for p in model.parameters()) and names == list(model.state_dict())
    projection = model.model.layers[0].self_attn.k_proj
    assert projection.weight.data_ptr() == projection.group.weight[256:].data_ptr()


@torch.no_grad()
def test_generate_runs_compiled_with_padding_and_other_layers():
    model, tables = on("cpu")
    ids = tokens(100, 2)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    options = {"attention_mask": mask, "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    want = model.generate(ids, past_key_values=vt.VeloxQuantCache(model, tables), **options)
    vt.compile_layers(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(ids, past_key_values=vt.VeloxQuantCache(model, tables), **options), want)
    # Graphs look at the cache that comes: another attention is not ours.
    plain = model.generate(ids, past_key_values=vt.VeloxQuantCache(model, tables, on_codes=False), **options)
    model.set_attn_implementation("sdpa")
    assert plain.shape == model.generate(ids, **options).shape == want.shape


def test_the_operator_says_beforehand_what_comes_out():
    model, tables = on("cpu")
    cache = vt.VeloxQuantCache(model, tables)
    for n in (9, 1, 3):
        q, k, v = (torch.randn(2, heads, n, 64) for heads in (4, 2, 2))
        got = torch.ops.veloxquant.attend(q, k, v, None, cache.ticket, 0, 0.1)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = torch.ops.veloxquant.attend(*map(mode.from_tensor, (q, k, v)), None, cache.ticket, 0, 0.1)
        assert (got.shape, got.dtype) == (fake.shape, fake.dtype) and got.is_contiguous() and fake.is_contiguous()


def test_what_cannot_be_compiled_or_captured_is_refused():
    model, tables = on("cpu")
    with pytest.raises(Error, match="decoder layers"):
        vt.compile_layers(torch.nn.Linear(2, 2))
    with pytest.raises(Error, match="CapturedStep"):
        vt.CapturedStep(model, vt.VeloxQuantCache(model, tables))


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU")
@torch.no_grad()
@pytest.mark.parametrize("compiled,transform", [(False, "learned"), (True, "learned"), (False, "turboquant")])
def test_captured_steps_go_on_by_themselves(compiled, transform):
    """Over the growth of the cache and changes of it, which ask for another capture."""
    model, tables = on("cuda", bits=2, transform=transform)
    ids = tokens(500, 2).to("cuda")
    eager = vt.VeloxQuantCache(model, tables)
    want = feed(model, eager, ids, [150, *[1] * 250])[:, 150:]
    if compiled:
        vt.compile_layers(model)
    cache = vt.VeloxQuantCache(model, tables)
    feed(model, cache, ids, [150])
    step = vt.CapturedStep(model, cache)
    got = torch.cat([step(ids[:, t : t + 1]).float().cpu() for t in range(150, 400)], dim=1)
    assert (got - want).norm() <= 1e-2 * want.norm()
    assert cache.lengths.packed == eager.lengths.packed and cache.lengths.exact == eager.lengths.exact
    assert cache.lengths.counts.tolist() == eager.lengths.counts.tolist()
    for held in (cache, eager):
        held.reorder_cache(torch.tensor([1, 0]))
        held.crop(-70)
    want = feed(model, eager, ids[:, 330:], [1] * 100)
    got = torch.cat([step(ids[:, t : t + 1]).float().cpu() for t in range(330, 430)], dim=1)
    assert (got - want).norm() <= 1e-2 * want.norm()


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU")
@torch.no_grad()
@pytest.mark.parametrize("transform", ["learned", "turboquant"])
def test_captured_steps_of_several_caches_run_at_once(transform):
    """Each on a stream of its own: to the bit what one after the other gives."""
    model, tables = on("cuda", bits=2, transform=transform)
    ids = tokens(300, 8).to("cuda").reshape(4, 2, 300)

    def run(streams):
        caches = [vt.VeloxQuantCache(model, tables, max_length=300) for _ in ids]
        for rows, cache in zip(ids, caches):
            model(rows[:, :100], past_key_values=cache)
        steps = [vt.CapturedStep(model, cache) for cache in caches]
        torch.cuda.synchronize()
        got = [[] for _ in ids]
        for t in range(100, 300):
            for i, step in enumerate(steps):
                with torch.cuda.stream(streams[i]):
                    got[i].append(step(ids[i, :, t : t + 1]).clone())
        torch.cuda.synchronize()
        return torch.stack([torch.cat(one, dim=1) for one in got])

    alone = run([torch.cuda.default_stream()] * len(ids))
    together = run([torch.cuda.Stream() for _ in ids])
    assert torch.equal(alone, together)
