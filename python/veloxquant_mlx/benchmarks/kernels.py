"""What `bench kernels` measures: every function of veloxquant_mlx.metal on the shape of the seed's table,
(1, 8, 4096, 128), and on smaller ones. Each has two or more formulations in plain MLX operations."""

import mlx.core as mx

from veloxquant_mlx import metal
from veloxquant_mlx.allocators.vecinfer import compute_query_lut
from veloxquant_mlx.benchmarks.measure import Case, close, equal, few_differ

HEADS, TOKENS, DIM = 8, 4096, 128


def cases(tokens=TOKENS, only=""):
    """The cases, made one at a time: functions with `only` in their name that this build has."""
    for names, make in _MAKERS:
        if all(name in metal.__all__ for name in names if name not in _ELSEWHERE) and any(only in n for n in names):
            yield from (case for case in make(tokens) if only in case.function)


def _shape(tokens):
    return f"1x{HEADS}x{tokens}x{DIM}"


def _keys(tokens, dtype=mx.float32):
    keys = mx.random.normal((1, HEADS, tokens, DIM), key=mx.random.key(1)).astype(dtype)
    mx.eval(keys)
    return keys


def _vecinfer(tokens):
    keys = _keys(tokens)
    sub_dim, n_centroids = 4, 256
    codebook = mx.random.normal((n_centroids, sub_dim), key=mx.random.key(2))
    half_norms, columns = mx.square(codebook).sum(axis=1) / 2, mx.contiguous(codebook.T)
    mx.eval(codebook, half_norms, columns)
    vectors = keys.reshape(-1, sub_dim)
    out_shape = (1, HEADS, tokens, DIM // sub_dim)

    def pieces(encode, step):
        def run():
            n = vectors.shape[0]
            return mx.concatenate([encode(vectors[i : i + step]) for i in range(0, n, step)]).reshape(out_shape)

        return run

    def by_product(part):
        return mx.argmax(mx.addmm(-half_norms, part, columns), axis=-1)

    def by_product_transposed(part):
        return mx.argmax(codebook @ part.T - half_norms[:, None], axis=0)

    def by_distance(part):
        return mx.argmin(mx.square(part[:, None] - codebook).sum(axis=-1), axis=-1)

    yield Case(
        "vecinfer_quantize_metal",
        f"{_shape(tokens)} d{sub_dim}x{n_centroids}",
        lambda: metal.vecinfer_quantize_metal(keys, codebook, sub_dim),
        {
            "matmul, argmax in pieces of 2k": pieces(by_product, 2048),
            "matmul, argmax in pieces of 32k": pieces(by_product, 32768),
            "compiled matmul, argmax in pieces of 2k": pieces(mx.compile(by_product), 2048),
            "matmul, argmax over rows in pieces of 2k": pieces(by_product_transposed, 2048),
            "compiled broadcast, argmin in pieces of 4k": pieces(mx.compile(by_distance), 4096),
        },
        few_differ(1e-4),
        keys.nbytes + 4 * vectors.shape[0],
        seed_row="VecInfer PVQ quantize",
    )

    codes = metal.vecinfer_quantize_metal(keys, codebook, sub_dim)
    half = codebook.astype(mx.float16)
    mx.eval(codes, half)
    yield Case(
        "vecinfer_dequant_metal",
        f"{_shape(tokens)} d{sub_dim}x{n_centroids}",
        lambda: metal.vecinfer_dequant_metal(codes, half),
        {
            "take": lambda: mx.take(half, codes, axis=0).reshape(keys.shape),
            "index": lambda: half[codes].reshape(keys.shape),
        },
        equal,
        codes.nbytes + 2 * keys.size,
    )

    rotation = mx.hadamard_transform(mx.eye(DIM))
    smooth = mx.exp(0.5 * mx.random.normal((HEADS, DIM), key=mx.random.key(3)))
    mx.eval(rotation, smooth)

    def round_trip(rotate):
        def run():
            moved = rotate(keys / smooth[:, None])
            parts = moved.reshape(-1, sub_dim)
            found = mx.concatenate([by_product(parts[i : i + 2048]) for i in range(0, parts.shape[0], 2048)])
            decoded = rotate(codebook[found].reshape(keys.shape)) * smooth[:, None]
            return decoded.astype(mx.float16), found.reshape(out_shape)

        return run

    yield Case(
        "vecinfer_encode_decode_metal",
        f"{_shape(tokens)} d{sub_dim}x{n_centroids}",
        lambda: metal.vecinfer_encode_decode_metal(keys, codebook, sub_dim, rotation, smooth),
        {
            "hadamard_transform, matmul, argmax": round_trip(mx.hadamard_transform),
            "matmul by H, matmul, argmax": round_trip(lambda x: x @ rotation),
        },
        lambda ours, theirs: few_differ(2e-3)(ours[1], theirs[1]),
        keys.nbytes + 2 * keys.size + 4 * vectors.shape[0],
    )

    queries = keys[:, :, :64]
    tables = mx.random.normal((DIM // sub_dim, n_centroids, sub_dim), key=mx.random.key(4))
    mx.eval(queries, tables)
    parts = queries.reshape(1, HEADS, -1, DIM // sub_dim, 1, sub_dim)
    yield Case(
        "compute_query_lut",
        f"1x{HEADS}x{queries.shape[2]}x{DIM} d{sub_dim}x{n_centroids}",
        lambda: compute_query_lut(queries, tables, sub_dim),
        {
            "matmul": lambda: (parts @ tables.swapaxes(1, 2)).squeeze(-2),
            "einsum": lambda: mx.einsum("bhsmi,mci->bhsmc", parts.squeeze(-2), tables),
        },
        close(1e-5),
        queries.nbytes + 4 * HEADS * queries.shape[2] * tables.shape[0] * n_centroids,
    )


def _scalar(tokens):
    keys = _keys(tokens)
    norms = mx.linalg.norm(keys, axis=-1, keepdims=True)
    rows = (keys / norms).reshape(-1, DIM)
    signs = mx.where(mx.random.uniform(shape=(DIM,), key=mx.random.key(5)) < 0.5, -1.0, 1.0)
    for bits in (2, 4):
        centroids = mx.linspace(-2.4, 2.4, 2**bits) / DIM**0.5
        middles = (centroids[1:] + centroids[:-1]) / 2
        mx.eval(rows, signs, centroids, middles)

        def count(y, middles=middles):
            codes = mx.zeros(y.shape, mx.uint8)
            for i in range(middles.size):
                codes = codes + (y > middles[i]).astype(mx.uint8)
            return codes

        def nearest(y, centroids=centroids):
            return mx.argmin(mx.abs(y[..., None] - centroids), axis=-1).astype(mx.uint8)

        def rotated(codes_of, signs=signs):
            return lambda: codes_of(mx.hadamard_transform(rows * signs))

        yield Case(
            "turboquant_hadamard_quantize",
            f"{_shape(tokens)} {bits} bits",
            lambda centroids=centroids, bits=bits: metal.turboquant_hadamard_quantize(rows, signs, centroids, bits),
            {
                "hadamard_transform, compiled count of boundaries": rotated(mx.compile(count)),
                "hadamard_transform, count of boundaries": rotated(count),
                "hadamard_transform, argmin": rotated(nearest),
            },
            few_differ(1e-3),
            rows.nbytes + rows.size,
            seed_row="Scalar quantize + Hadamard" if bits == 2 else "",
        )
        yield Case(
            "turboquant_scalar_quantize",
            f"{_shape(tokens)} {bits} bits",
            lambda centroids=centroids, bits=bits: metal.turboquant_scalar_quantize(rows, centroids, bits),
            {
                "compiled count of boundaries": lambda count=mx.compile(count): count(rows),
                "argmin": lambda nearest=nearest: nearest(rows),
            },
            few_differ(1e-4),
            rows.nbytes + rows.size,
        )


def _bits(n_rows, n_bytes, seed):
    codes = mx.random.randint(0, 256, (n_rows, n_bytes), key=mx.random.key(seed)).astype(mx.uint8)
    mx.eval(codes)
    return codes


def _hamming(tokens):
    n, n_bytes = HEADS * tokens, DIM // 8
    codes, query = _bits(n, n_bytes, 6), _bits(1, n_bytes, 7)[0]
    offset, scale = mx.random.normal((n,), key=mx.random.key(8)), mx.array(0.25)
    counts = mx.array([bin(i).count("1") for i in range(256)], mx.uint8)
    words, query_words = codes.view(mx.uint32), query.view(mx.uint32)
    shifts = mx.arange(8, dtype=mx.uint8)
    mx.eval(offset, scale, counts, words, query_words, shifts)

    def by_table():
        distance = mx.take(counts, codes ^ query).astype(mx.float32).sum(axis=-1)
        return distance * scale + offset

    def swar(words):
        x = words ^ query_words
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        return (x * 0x01010101) >> 24

    compiled = mx.compile(swar)

    def by_product():
        plus_minus = ((codes[..., None] >> shifts) & 1).astype(mx.float32).reshape(n, -1) * 2 - 1
        signs = ((query[..., None] >> shifts) & 1).astype(mx.float32).reshape(-1) * 2 - 1
        return (DIM - plus_minus @ signs) * 0.5 * scale + offset

    yield Case(
        "rabitq_hamming_score",
        f"{n} codes of {DIM} bits",
        lambda: metal.rabitq_hamming_score(query, codes, offset, scale),
        {
            "table of 256 counts": by_table,
            "bit arithmetic": lambda: swar(words).sum(axis=-1).astype(mx.float32) * scale + offset,
            "compiled bit arithmetic": lambda: compiled(words).sum(axis=-1).astype(mx.float32) * scale + offset,
            "unpacked signs, matmul": by_product,
        },
        close(1e-6),
        codes.nbytes + 8 * n,
        seed_row="RaBitQ Hamming score",
    )


def _packing(tokens):
    for bits in (1, 4):
        codes = mx.random.randint(0, 2**bits, (1, HEADS, tokens, DIM), key=mx.random.key(9)).astype(mx.int32)
        per_word = 32 // bits
        shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
        packed = metal.turboquant_bit_pack(codes, bits=bits)
        mx.eval(codes, shifts, packed)
        mask = mx.array(2**bits - 1, mx.uint32)

        def pack_sum(codes, shifts=shifts, per_word=per_word):
            parts = codes.astype(mx.uint32).reshape(*codes.shape[:-1], -1, per_word)
            return (parts << shifts).sum(axis=-1)

        def pack_slices(codes, bits=bits, per_word=per_word):
            parts = codes.astype(mx.uint32).reshape(*codes.shape[:-1], -1, per_word)
            words = parts[..., 0]
            for i in range(1, per_word):
                words = words | (parts[..., i] << (i * bits))
            return words

        def unpack(packed, shifts=shifts, mask=mask):
            return ((packed[..., None] >> shifts) & mask).reshape(*packed.shape[:-1], -1)

        def unpack_slices(packed, bits=bits, per_word=per_word, mask=mask):
            parts = [(packed >> (i * bits)) & mask for i in range(per_word)]
            return mx.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)

        yield Case(
            "turboquant_bit_pack",
            f"{_shape(tokens)} {bits} bits",
            lambda codes=codes, bits=bits: metal.turboquant_bit_pack(codes, bits=bits),
            {
                "shift and sum": lambda f=pack_sum, codes=codes: f(codes),
                "compiled shift and sum": lambda f=mx.compile(pack_sum), codes=codes: f(codes),
                "or of slices": lambda f=pack_slices, codes=codes: f(codes),
                "compiled or of slices": lambda f=mx.compile(pack_slices), codes=codes: f(codes),
            },
            equal,
            codes.nbytes + packed.nbytes,
        )
        recovered = metal.turboquant_bit_unpack(packed, bits=bits, original_length=DIM)
        yield Case(
            "turboquant_bit_unpack",
            f"{_shape(tokens)} {bits} bits",
            lambda packed=packed, bits=bits: metal.turboquant_bit_unpack(packed, bits=bits, original_length=DIM),
            {
                "shift and mask": lambda f=unpack, packed=packed: f(packed),
                "compiled shift and mask": lambda f=mx.compile(unpack), packed=packed: f(packed),
                "stack of slices": lambda f=unpack_slices, packed=packed: f(packed),
            },
            equal,
            packed.nbytes + recovered.nbytes,
        )

        def round_trip(pack, unpack, codes=codes):
            return lambda: unpack(pack(codes))

        # What the seed's table has as one row.
        yield Case(
            "turboquant_bit_pack, turboquant_bit_unpack",
            f"{_shape(tokens)} {bits} bits",
            round_trip(
                lambda codes, bits=bits: metal.turboquant_bit_pack(codes, bits=bits),
                lambda packed, bits=bits: metal.turboquant_bit_unpack(packed, bits=bits, original_length=DIM),
            ),
            {
                "shift and sum, shift and mask": round_trip(pack_sum, unpack),
                "shift and sum, compiled shift and mask": round_trip(pack_sum, mx.compile(unpack)),
                "compiled or of slices, compiled shift and mask": round_trip(
                    mx.compile(pack_slices), mx.compile(unpack)
                ),
                "all compiled as one": round_trip(mx.compile(lambda c, f=pack_sum, g=unpack: g(f(c))), lambda x: x),
            },
            equal,
            codes.nbytes + 2 * packed.nbytes + recovered.nbytes,
            seed_row="Bit pack/unpack" if bits == 1 else "",
        )


def _rvq_attend(tokens):
    sub_v, bits = 4, 1
    query = mx.random.normal((1, HEADS, 1, DIM), key=mx.random.key(10)).astype(mx.float16)
    k1, k2 = (
        mx.random.randint(0, 2**bits, (1, HEADS, tokens, DIM), key=mx.random.key(s)).astype(mx.uint8) for s in (11, 12)
    )
    c1, c2 = mx.array([-0.79788, 0.79788]), mx.array([-0.43686, 0.43686])
    v = mx.random.randint(0, 256, (1, HEADS, tokens, DIM // sub_v), key=mx.random.key(13)).astype(mx.uint8)
    codebook = mx.random.normal((256, sub_v), key=mx.random.key(14)).astype(mx.float16)
    mx.eval(query, k1, k2, c1, c2, v, codebook)
    scale = DIM**-0.5

    def decoded(k1, k2, v):
        keys = (mx.take(c1, k1) + mx.take(c2, k2)).astype(mx.float16)
        return keys, mx.take(codebook, v, axis=0).reshape(keys.shape)

    def by_matmul(k1, k2, v):
        keys, values = (a.astype(mx.float32) for a in decoded(k1, k2, v))
        weights = mx.softmax((query.astype(mx.float32) @ keys.swapaxes(-1, -2)) * scale, axis=-1)
        return weights @ values

    def by_sdpa(k1, k2, v):
        keys, values = decoded(k1, k2, v)
        return mx.fast.scaled_dot_product_attention(query, keys, values, scale=scale)

    def by_selection(k1, k2, v):
        keys = mx.where(k1, c1[1], c1[0]) + mx.where(k2, c2[1], c2[0])
        values = mx.take(codebook.astype(mx.float32), v, axis=0).reshape(keys.shape)
        weights = mx.softmax((query.astype(mx.float32) @ keys.swapaxes(-1, -2)) * scale, axis=-1)
        return weights @ values

    yield Case(
        "turboquant_fused_rvq_decode_attend",
        f"{_shape(tokens)} {bits}+{bits} bits, values d{sub_v}x256",
        lambda: metal.turboquant_fused_rvq_decode_attend(query, k1, k2, c1, c2, v, codebook, bits, bits, 8),
        {
            "take, matmul": lambda: by_matmul(k1, k2, v),
            "compiled take, matmul": lambda f=mx.compile(by_matmul): f(k1, k2, v),
            "take, fast.scaled_dot_product_attention": lambda: by_sdpa(k1, k2, v),
            "compiled where, matmul": lambda f=mx.compile(by_selection): f(k1, k2, v),
        },
        close(1e-2),
        k1.nbytes + k2.nbytes + v.nbytes,
        seed_row="Fused RVQ decode + attention",
    )


def _qjl(tokens):
    keys = _keys(tokens).reshape(-1, DIM)
    m = 256
    sketch = mx.random.normal((m, DIM), key=mx.random.key(15))
    weights = mx.array([1, 2, 4, 8, 16, 32, 64, 128], mx.uint8)
    mx.eval(keys, sketch, weights)

    def encode(keys):
        bits = ((keys @ sketch.T) >= 0).reshape(-1, m // 8, 8).astype(mx.uint8)
        return (bits * weights).sum(axis=-1).astype(mx.uint8), mx.linalg.norm(keys, axis=-1).astype(mx.float16)

    def check(ours, theirs):
        few_differ(1e-3)(ours[0], theirs[0])
        close(1e-3)(ours[1], theirs[1])

    yield Case(
        "qjl_encode",
        f"{_shape(tokens)} m={m}",
        lambda: metal.qjl_encode(keys, sketch),
        {"matmul, shift": lambda: encode(keys), "compiled matmul, shift": lambda f=mx.compile(encode): f(keys)},
        check,
        keys.nbytes + keys.shape[0] * (m // 8 + 2),
    )

    signs, norms = (a.reshape(tokens, HEADS, -1) for a in metal.qjl_encode(keys, sketch))
    norms = norms.squeeze(-1)
    projected = mx.random.normal((HEADS, m), key=mx.random.key(16)).astype(mx.float16)
    shifts = mx.arange(8, dtype=mx.uint8)
    mx.eval(signs, norms, projected, shifts)
    constant = 1.2533141373155 / m

    def product(signs, norms):
        bits = ((signs[..., None] >> shifts) & 1).reshape(tokens, HEADS, m).astype(mx.float32) * 2 - 1
        dots = bits.swapaxes(0, 1) @ projected.astype(mx.float32)[..., None]
        return (dots.squeeze(-1) * norms.astype(mx.float32).T * constant).astype(mx.float16)

    def product_where(signs, norms):
        bits = ((signs[..., None] >> shifts) & 1).reshape(tokens, HEADS, m)
        q = projected.astype(mx.float32)
        dots = mx.where(bits, q, -q).sum(axis=-1)
        return (dots * norms.astype(mx.float32) * constant).T.astype(mx.float16)

    yield Case(
        "qjl_inner_product",
        f"{HEADS} heads, {tokens} keys, m={m}",
        lambda: metal.qjl_inner_product(projected, signs, norms),
        {
            "unpack, matmul": lambda: product(signs, norms),
            "compiled where, sum": lambda f=mx.compile(product_where): f(signs, norms),
        },
        close(2e-3),
        signs.nbytes + norms.nbytes + 2 * HEADS * tokens,
    )


def _commvq(tokens):
    n, n_cb, sub_dim, size = HEADS * tokens, 16, DIM // 16, 256
    indices = mx.random.randint(0, size, (n, n_cb), key=mx.random.key(17)).astype(mx.int32)
    codebook = mx.random.normal((n_cb, size, sub_dim), key=mx.random.key(18)).astype(mx.float16)
    positions = mx.arange(n, dtype=mx.int32) % tokens
    inv_freq = 10000.0 ** (-mx.arange(DIM // 2) / (DIM // 2))
    flat = codebook.reshape(-1, sub_dim)
    offsets = mx.arange(n_cb) * size
    mx.eval(indices, codebook, positions, inv_freq, flat, offsets)

    def decode(indices, positions):
        keys = mx.take(flat, indices + offsets, axis=0).reshape(n, DIM).astype(mx.float32)
        angles = positions[:, None].astype(mx.float32) * inv_freq
        x, y = keys[:, : DIM // 2], keys[:, DIM // 2 :]
        cos, sin = mx.cos(angles), mx.sin(angles)
        return mx.concatenate([x * cos - y * sin, x * sin + y * cos], axis=-1).astype(mx.float16)

    def with_rope(indices):
        keys = mx.take(flat, indices + offsets, axis=0).reshape(HEADS, tokens, DIM)
        return mx.fast.rope(keys, DIM, traditional=False, base=10000.0, scale=1.0, offset=0).reshape(n, DIM)

    yield Case(
        "comm_vq_decode_metal",
        f"{_shape(tokens)} {n_cb} codes of {size}",
        lambda: metal.comm_vq_decode_metal(indices, codebook, positions, inv_freq, n_cb, sub_dim, size),
        {
            "take, cos, sin": lambda: decode(indices, positions),
            "compiled take, cos, sin": lambda f=mx.compile(decode): f(indices, positions),
            "take, fast.rope": lambda: with_rope(indices),
        },
        close(1e-2),
        indices.nbytes + 2 * n * DIM,
    )


_ELSEWHERE = ("compute_query_lut",)  # not exported by veloxquant_mlx.metal

_MAKERS = (
    (
        (
            "vecinfer_quantize_metal",
            "vecinfer_dequant_metal",
            "vecinfer_encode_decode_metal",
            "compute_query_lut",
        ),
        _vecinfer,
    ),
    (("turboquant_hadamard_quantize", "turboquant_scalar_quantize"), _scalar),
    (("rabitq_hamming_score",), _hamming),
    (("turboquant_bit_pack", "turboquant_bit_unpack"), _packing),
    (("turboquant_fused_rvq_decode_attend",), _rvq_attend),
    (("qjl_encode", "qjl_inner_product"), _qjl),
    (("comm_vq_decode_metal",), _commvq),
)
