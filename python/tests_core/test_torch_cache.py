"""VeloxQuantCache on small random models, on the CPU and, where there is one, on the GPU."""

import copy

import numpy
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import veloxquant.torch as vt  # noqa: E402
from veloxquant import Error, _core  # noqa: E402

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and _core.cuda_built() else [])
DTYPES = {"cpu": torch.float32, "cuda": torch.float16}
made = {}


def small_model(head_dim=64, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=8192,
        initializer_range=0.08,  # so that attention has something to say
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def model_and_tables(bits=4, transform="learned", per="head", head_dim=64):
    key = (bits, transform, per, head_dim)
    if key not in made:
        model = small_model(head_dim)
        if transform == "turboquant":
            return model, vt.VeloxQuantCache(model, codec="turboquant", bits=bits, on_codes=False).tables
        ids = torch.randint(2, 256, (2, 512), generator=torch.Generator().manual_seed(1))
        made[key] = model, vt.calibrate(model, [ids], bits, transform=transform, codebook_per=per, max_tokens=1024)
    return made[key]


def on(device, **options):
    model, tables = model_and_tables(**options)
    return copy.deepcopy(model).to(device, DTYPES[device]), tables


def tokens(n, batch=1, seed=5):
    return torch.randint(2, 256, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model, cache, ids, chunks):
    """Logits of all tokens, given in chunks of these sizes."""
    logits, at = [], 0
    for n in chunks:
        logits.append(model(ids[:, at : at + n].to(model.device), past_key_values=cache).logits.float().cpu())
        at += n
    return torch.cat(logits, dim=1)


def portable(layer, i):
    blocks = max(layer.cache.lengths.packed) // 64
    return layer.kernels.to_portable(layer.sides[i], layer.codes[i][:, :, :blocks]).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "bits,transform,limit",
    [(4, "learned", 0.15), (2, "learned", 0.45), (4, "turboquant", 0.15), (2, "turboquant", 0.45)],
)
def test_the_model_says_nearly_what_it_says_with_an_exact_cache(device, bits, transform, limit):
    model, tables = on(device, bits=bits, transform=transform)
    ids = tokens(400, 2)
    with torch.no_grad():
        want = model(ids.to(device)).logits.float().cpu()
    got = feed(model, vt.VeloxQuantCache(model, tables), ids, [300, *[1] * 100])
    assert (got[:, :300] - want[:, :300]).norm() < 5e-3 * want.norm()  # the prompt attends to itself exactly
    error = (got[:, 300:] - want[:, 300:]).norm() / want[:, 300:].norm()
    assert 0 < error < limit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transform", ["learned", "hadamard", "turboquant"])
@pytest.mark.parametrize("per", ["head", "lane", "subvector"])
def test_attention_reads_the_codes_and_nothing_else(device, transform, per):
    """Layer by layer against fp64 over what `dequantize` gives: a token, then a chunk over the history."""
    model, tables = on(device, bits=2, transform=transform, per=per)
    cache = vt.VeloxQuantCache(model, tables)
    ids = tokens(350, 2)
    feed(model, cache, ids, [300, *[1] * 50])
    layer = cache.layers[1]
    generator = torch.Generator().manual_seed(3)
    for n in (1, 7):
        q, k, v = (torch.randn(2, h, n, 64, generator=generator).to(device, DTYPES[device]) for h in (4, 2, 2))
        if n == 1:
            cache.layers[0].append(k, v)
        before = [layer.dequantize(i).double().cpu() for i in range(2)] if n > 1 else None
        got = layer.attend(q, k, v, 0.3, None).double().cpu()
        if n == 1:
            past = [layer.dequantize(i).double().cpu() for i in range(2)]
        else:
            past = [torch.cat([x, y.double().cpu()], dim=2) for x, y in zip(before, (k, v))]
        keys, values = (x.repeat_interleave(2, dim=1) for x in past)
        scores = 0.3 * q.double().cpu() @ keys.transpose(2, 3)
        rows = torch.arange(keys.shape[2] - n, keys.shape[2])
        scores = scores.masked_fill(rows[:, None] < torch.arange(keys.shape[2]), -torch.inf)
        want = (scores.softmax(-1) @ values).transpose(1, 2)
        error = ((got - want).norm(dim=-1) / want.norm(dim=-1)).max()
        assert error < 4e-3, (n, error)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transform", ["learned", "turboquant"])
def test_chunks_and_single_tokens_leave_the_same_bytes(device, transform):
    model, tables = on(device, transform=transform)
    layers = []
    generator = torch.Generator().manual_seed(4)
    k, v = (torch.randn(2, 2, 500, 64, generator=generator).to(device, DTYPES[device]) for _ in range(2))
    k[0, 0, 40] = torch.inf
    v[1, 1, 41] = torch.nan
    for sizes in ([500], [1] * 500, [3, 200, *[1] * 97, 200]):
        cache = vt.VeloxQuantCache(model, tables)
        layer, at = cache.layers[0], 0
        layer.lazy_initialization(k, v)
        for n in sizes:
            layer.append(k[:, :, at : at + n], v[:, :, at : at + n])
            at += n
        assert cache.lengths.packed == [384, 384] and cache.lengths.exact == [116, 116]
        layers.append((cache, layer))
    for cache, layer in layers[1:]:
        for i in range(2):
            assert torch.equal(portable(layer, i), portable(layers[0][1], i))
            assert torch.equal(layer.exact[i][:, :, :116].cpu(), layers[0][1].exact[i][:, :, :116].cpu())
        if device == "cuda":
            assert cache.lengths.counts[2:].tolist() == [[384, 384], [116, 116]]


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU")
@pytest.mark.parametrize(
    "bits,transform,per",
    [
        (2, "learned", "lane"),
        (4, "hadamard", "subvector"),
        (2, "turboquant", ""),
        (3, "turboquant", ""),
        (4, "turboquant", ""),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_the_gpu_stores_the_bytes_of_the_cpu(bits, transform, per, head_dim):
    model, tables = model_and_tables(bits, transform, per, head_dim)
    generator = torch.Generator().manual_seed(4)
    k, v = (torch.randn(2, 2, 330, head_dim, generator=generator).half() for _ in range(2))
    layers = []
    for device in DEVICES:
        cache = vt.VeloxQuantCache(model, tables)
        layer = cache.layers[0]
        x, y = k.to(device), v.to(device)
        layer.lazy_initialization(x, y)
        layer.append(x[:, :, :100], y[:, :, :100])
        for t in range(100, 330):
            layer.append(x[:, :, t : t + 1], y[:, :, t : t + 1])
        layers.append((cache, layer))
    for i in range(2):
        assert torch.equal(portable(layers[0][1], i), portable(layers[1][1], i))
        exact = [layer.exact[i][:, :, : cache.lengths.exact[0]].cpu() for cache, layer in layers]
        assert torch.equal(*exact)


@pytest.mark.parametrize("device", DEVICES)
def test_a_padded_row_says_what_it_says_alone(device):
    model, tables = on(device)
    ids = tokens(200, 3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((150, 0, 61)):
        mask[row, :padding] = 0
    options = {"max_new_tokens": 80, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    both = model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        past_key_values=vt.VeloxQuantCache(model, tables),
        **options,
    )
    for row in range(3):
        kept = mask[row].bool()
        alone = model.generate(
            ids[row : row + 1, kept].to(device),
            attention_mask=torch.ones(1, int(kept.sum()), dtype=torch.long, device=device),
            past_key_values=vt.VeloxQuantCache(model, tables),
            **options,
        )
        want, got = torch.stack(alone.logits)[:, 0], torch.stack(both.logits)[:, row]
        same = (both.sequences[row, 200:] == alone.sequences[0, kept.sum() :]).cumprod(0).sum()
        assert same >= 1
        error = (got[:same] - want[:same]).norm() / want[:same].norm()
        assert error < (1e-4 if device == "cpu" else 2e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_generation_of_every_kind_runs_on_codes(device):
    model, tables = on(device)
    ids = tokens(150, 2).to(device)
    mask = torch.ones_like(ids)
    sample = {"attention_mask": mask, "max_new_tokens": 30, "min_new_tokens": 30}
    greedy = model.generate(ids, past_key_values=vt.VeloxQuantCache(model, tables), do_sample=False, **sample)
    beams = model.generate(
        ids, past_key_values=vt.VeloxQuantCache(model, tables), num_beams=3, do_sample=False, **sample
    )
    assert greedy.shape == beams.shape == (2, 180)
    one = {"attention_mask": mask[:1], "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    alone = model.generate(ids[:1], past_key_values=vt.VeloxQuantCache(model, tables), **one)
    assert torch.equal(alone[0, : 150 + 30], greedy[0])
    # Drafts that are partly refused are taken back by crop, and leave the text as it is.
    cache = vt.VeloxQuantCache(model, tables)
    looked_up = model.generate(ids[:1], past_key_values=cache, prompt_lookup_num_tokens=3, **one)
    drafted = model.generate(
        ids[:1], past_key_values=vt.VeloxQuantCache(model, tables), assistant_model=copy.deepcopy(model), **one
    )
    if device == "cpu":  # on a GPU one token and several round differently
        assert torch.equal(looked_up, alone) and torch.equal(drafted, alone)
    assert looked_up.shape == drafted.shape and cache.get_seq_length() == 189
    # A conversation goes on with the tokens that are new.
    longer = torch.cat([looked_up, tokens(20, seed=9).to(device)], dim=1)
    more = {**one, "attention_mask": torch.ones_like(longer)}
    assert model.generate(longer, past_key_values=cache, **more).shape == (1, 250)
    assert cache.get_seq_length() == 249 and isinstance(cache.get_seq_length(), int)


@pytest.mark.parametrize("device", DEVICES)
def test_crop_takes_tokens_back(device):
    model, tables = on(device)
    ids = tokens(300)
    whole = vt.VeloxQuantCache(model, tables)
    feed(model, whole, ids, [260])
    cut = vt.VeloxQuantCache(model, tables)
    feed(model, cut, ids, [260, *[1] * 9])
    cut.crop(-9)  # within the exact tail: no trace
    assert cut.get_seq_length() == 260 and cut.lengths.packed == whole.lengths.packed
    a, b = feed(model, whole, ids[:, 260:], [1] * 40), feed(model, cut, ids[:, 260:], [1] * 40)
    assert (a - b).norm() <= 1e-3 * a.norm()

    deep = vt.VeloxQuantCache(model, tables)
    feed(model, deep, ids, [300])
    assert deep.lengths.packed == [192]
    held = [layer.dequantize(i)[:, :, :160].float() for layer in deep.layers for i in range(2)]
    deep.crop(-140)  # 160 tokens are left: 4 sinks, 2 blocks, 28 of a block that was packed
    assert deep.lengths.packed == [128] and deep.lengths.exact == [32]
    for x, y in zip(held, [layer.dequantize(i).float() for layer in deep.layers for i in range(2)]):
        assert (x - y).norm() <= 1e-3 * x.norm()
    again = feed(model, deep, ids[:, 160:], [140])
    with torch.no_grad():
        want = model(ids.to(device)).logits.float().cpu()[:, 160:]
    assert (again - want).norm() < 0.15 * want.norm()
    deep.crop(-1000)
    assert deep.get_seq_length() == 0 and deep.lengths.packed == [0] and deep.lengths.exact == [0]


@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_reordered_repeated_and_selected(device):
    model, tables = on(device)
    ids = tokens(200, 3)
    cache = vt.VeloxQuantCache(model, tables)
    feed(model, cache, ids, [180])
    cache.reorder_cache(torch.tensor([2, 0, 1], device=device))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 3], device=device))  # rows 2, 0, 0
    got = feed(model, cache, ids[[2, 0, 0], 180:], [1] * 20)
    plain = vt.VeloxQuantCache(model, tables)
    want = feed(model, plain, ids, [180, *[1] * 20])[[2, 0, 0], 180:]
    assert (got - want).norm() <= 2e-3 * want.norm()
    with pytest.raises(Error, match="rows"):
        cache.batch_select_indices(torch.tensor([3]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("to", DEVICES)
@pytest.mark.parametrize("transform", ["learned", "turboquant"])
def test_a_saved_cache_goes_on_where_it_was(device, to, transform, tmp_path):
    model, tables = on(device, bits=2, transform=transform)
    ids = tokens(260, 2)
    cache = vt.VeloxQuantCache(model, tables, sinks=2, window=70)
    feed(model, cache, ids, [222])
    cache.save(tmp_path / "cache.safetensors")
    want = feed(model, cache, ids[:, 222:], [1] * 38)
    model = on(to, bits=2)[0]
    loaded = vt.VeloxQuantCache.load(tmp_path / "cache.safetensors", model)
    assert loaded.get_seq_length() == 222
    got = feed(model, loaded, ids[:, 222:], [1] * 38)
    assert (got - want).norm() <= (1e-6 if to == device else 1e-2) * want.norm()


def test_strict_chunks_say_what_single_tokens_say():
    model, tables = on("cpu", bits=2)
    ids = tokens(420, 2)
    want = feed(model, vt.VeloxQuantCache(model, tables), ids, [1] * 420)
    for chunks in ([420], [2, 100, 318], [150, *[1] * 20, 250]):
        cache = vt.VeloxQuantCache(model, tables, strict=True)
        got = feed(model, cache, ids, chunks)
        assert (got - want).norm() < 1e-3 * want.norm()
    loose = feed(model, vt.VeloxQuantCache(model, tables), ids, [420])
    assert (loose - want).norm() > 1e-2 * want.norm()


def test_sliding_layers_keep_their_own_cache():
    torch.manual_seed(2)
    config = transformers.Qwen2Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.08,
        eos_token_id=None,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids = tokens(300, 2)
    with torch.no_grad():
        want = model(ids).logits
    tables = vt.calibrate(model, [ids], 4, max_tokens=600)
    assert [layer is not None for layer in tables.layers] == [False, True, False]
    mask = torch.ones_like(ids)
    cache = vt.VeloxQuantCache(model, tables)
    got = feed(model, cache, ids, [200, *[1] * 100])
    assert (got[:, :200] - want[:, :200]).norm() < 1e-4 * want.norm()
    assert 0 < (got - want).norm() < 0.1 * want.norm()
    out = model.generate(
        ids, attention_mask=mask, past_key_values=vt.VeloxQuantCache(model, tables), max_new_tokens=20, do_sample=False
    )
    assert out.shape == (2, 320)
    with pytest.raises(Error, match="compressed"):
        cache.save("nowhere.safetensors")


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_models_keep_their_exact_tokens_in_bf16(device):
    model, tables = on(device)
    model = model.to(torch.bfloat16)
    ids = tokens(300)
    with torch.no_grad():
        want = model(ids.to(device)).logits.float().cpu()
    cache = vt.VeloxQuantCache(model, tables)
    got = feed(model, cache, ids, [200, 60, *[1] * 40])
    assert cache.layers[0].exact[0].dtype == torch.bfloat16
    assert (got - want).norm() < 0.15 * want.norm()


def test_what_is_not_causal_with_padding_is_refused():
    model, tables = on("cpu")
    cache = vt.VeloxQuantCache(model, tables)
    mask = torch.zeros(1, 1, 20, 20)
    with pytest.raises(Error, match="attention_mask"):
        model(tokens(20), attention_mask=mask, past_key_values=cache)
    x = torch.zeros(1, 2, 1, 64)
    cache = vt.VeloxQuantCache(model, tables)
    key, value = cache.update(x, x, 0)
    from veloxquant.torch.attention import attention

    with pytest.raises(Error, match="softcap"):
        attention(model, torch.zeros(1, 4, 1, 64), key, value, None, softcap=30.0)
    with pytest.raises(Error, match="before the attention"):
        cache.update(x, x, 0)
    with pytest.raises(Error, match="ticket"):
        torch.ops.veloxquant.attend(x, x, x, None, torch.zeros(1, dtype=torch.int64), 0, 1.0)


def test_files_that_are_none_are_refused(tmp_path):
    model, tables = on("cpu")
    path = tmp_path / "tables.safetensors"
    tables.save(path)
    assert vt.Tables.load(path).fingerprint() == tables.fingerprint()
    with pytest.raises(Error, match="hold"):
        vt.VeloxQuantCache.load(path, model)
    (tmp_path / "text").write_text("no tables " * 100)
    with pytest.raises(Error, match="no safetensors file"):
        vt.Tables.load(tmp_path / "text")
    with pytest.raises(Error, match="empty"):
        vt.VeloxQuantCache(model, tables).save(path)


@pytest.mark.parametrize("transform", ["learned", "hadamard"])
def test_directories_of_calibrate_are_tables(transform, rng, tmp_path):
    store = pytest.importorskip("veloxquant_mlx.artifacts.npy_store").NpyArtifactStore(tmp_path)
    codebook = pytest.importorskip("test_core").codebook(rng, transform)
    store.save("vecinfer_codebook", codebook)
    tables = vt.Tables.load(tmp_path)
    assert len(tables) == 2
    for layer, made in enumerate(tables.layers):
        assert numpy.array_equal(made.keys.arrays["tables"], codebook.keys[layer])
        assert numpy.array_equal(made.values.arrays["tables"], codebook.values[layer])
        if transform == "learned":
            sides = codebook.rotations.key_matrices(layer), codebook.rotations.value_matrices(layer)
            for side, matrices in zip((made.keys, made.values), sides, strict=True):
                for name, matrix in matrices.items():
                    assert numpy.array_equal(side.arrays[name], matrix), name
        else:
            assert numpy.array_equal(made.keys.arrays["scale"], codebook.smooth_factors[layer])
            assert (made.values.arrays["scale"] == 1).all()
    tables.save(tmp_path / "tables.safetensors")
    assert vt.Tables.load(tmp_path / "tables.safetensors").fingerprint() == tables.fingerprint()
    model, _ = on("cpu")
    cache = vt.VeloxQuantCache(model, tables)
    assert feed(model, cache, tokens(200), [200]).isfinite().all()
    store.save("vecinfer_codebook", codebook.smooth_factors)
    with pytest.raises(Error, match="kind 'array'"):
        vt.Tables.load(tmp_path)


def test_bytes_are_those_that_are_held():
    model, tables = on("cpu", bits=2)
    cache = vt.VeloxQuantCache(model, tables, max_length=4096)
    feed(model, cache, tokens(100), [100])
    exact = 2 * 2 * 132 * 64 * 2
    codes = 2 * 64 * 64 * 64 // 4
    assert cache.nbytes == 2 * (exact + 2 * codes)
    assert cache.shared_nbytes == tables.nbytes > 0


def test_other_attention_sees_the_history_decoded():
    model, tables = on("cpu")
    cache = vt.VeloxQuantCache(model, tables, on_codes=False)
    ids = tokens(300)
    with torch.no_grad():
        want = model(ids).logits
    got = feed(model, cache, ids, [250, *[1] * 50])
    assert model.config._attn_implementation == "sdpa"
    assert 0 < (got[:, 250:] - want[:, 250:]).norm() < 0.15 * want[:, 250:].norm()


def test_bad_arguments_are_one_sentence():
    model, tables = on("cpu")
    with pytest.raises(Error, match="layers"):
        vt.VeloxQuantCache(model, vt.Tables(tables.layers[:1]))
    with pytest.raises(Error, match="sinks"):
        vt.VeloxQuantCache(model, tables, sinks=-1)
    with pytest.raises(Error, match="tables, codec"):
        vt.VeloxQuantCache(model)
    with pytest.raises(Error, match="codec: got 'nf4'"):
        vt.VeloxQuantCache(model, codec="nf4")
    with pytest.raises(Error, match="bits"):
        vt.VeloxQuantCache(model, codec="turboquant", bits=7)
    with pytest.raises(Error, match="bits"):
        vt.calibrate(model, [tokens(64)], bits=5)
    other = small_model(head_dim=32)
    cache = vt.VeloxQuantCache(other, tables)
    with pytest.raises(Error, match="KV heads"):
        feed(other, cache, tokens(10), [10])


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU")
@torch.no_grad()
def test_a_captured_step_goes_on_by_itself():
    model, tables = on("cuda", bits=2)
    ids = tokens(400, 2).to("cuda")
    eager = vt.VeloxQuantCache(model, tables, max_length=512)
    want = feed(model, eager, ids, [150, *[1] * 250])[:, 152:]
    cache = vt.VeloxQuantCache(model, tables, max_length=512)
    feed(model, cache, ids, [150, 1])  # a step outside first: everything is allocated
    token, position = ids[:, 151:152].clone(), torch.full((2, 1), 151, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, position_ids=position, past_key_values=cache).logits
    cache.forget_captured_step()
    got = []
    for t in range(151, 400):
        token.copy_(ids[:, t : t + 1])
        position.fill_(t)
        graph.replay()
        cache.count_replay()
        got.append(logits.float().cpu())
    got = torch.cat(got, dim=1)[:, 1:]
    assert (got - want).norm() <= 1e-3 * want.norm()
    assert cache.lengths.packed == eager.lengths.packed and cache.lengths.exact == eager.lengths.exact
    assert cache.lengths.counts.tolist() == eager.lengths.counts.tolist()


def test_tables_by_lane_are_shared_by_every_fourth_and_eighth_subvector():
    _, tables = model_and_tables(bits=2, per="lane")
    for layer in tables.layers:
        for side, lanes in ((layer.keys, 4), (layer.values, 8)):
            array = side.arrays["tables"]
            assert array.shape[1] == 16 and side.core.by_lane
            assert all((array[:, m] == array[:, m % lanes]).all() for m in range(16))
            assert all((array[:, m] != array[:, 0]).any() for m in range(1, lanes))
    _, apart = model_and_tables(bits=2, per="subvector")
    assert not apart.layers[0].keys.core.by_lane


def test_attention_that_tokens_get_is_that_of_the_queries_that_see_codes():
    from veloxquant.torch import calibration

    n = 100
    query, key = (torch.randn(2, heads, n, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2))
    got = calibration.attention_got(query, key, 0.5)
    want = torch.zeros(2, 2, n, 2, dtype=torch.float64)
    for b in range(2):
        for head in range(4):
            for t in range(n % 8, n, 8):
                p = (0.5 * query[b, head, t].double() @ key[b, head // 2, : t + 1].double().T).softmax(-1)
                seen = max(0, t + 1 - 64)
                want[b, head // 2, :seen, 0] += p[:seen]
                want[b, head // 2, :seen, 1] += p[:seen] ** 2
    assert (got - want).abs().max() < 1e-6
    for i, (side, power) in enumerate((("keys", 0.3), ("values", 0.5))):
        shares = want[0, :, :, i] / want[0, :, :, i].mean(1, keepdim=True)
        weights = calibration.token_weights(side, got[0, :, :, i])
        assert numpy.allclose(weights, (shares.clamp(1e-3, 1e3) ** power).numpy(), rtol=1e-4)
