"""Training of CommVQ: codebooks of pre-RoPE keys, and of values, from a model and some text."""

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext
from veloxquant_mlx.allocators.vecinfer import TABLE_SHAPES, collect, sample_positions
from veloxquant_mlx.cache.commvq_codebook import CommVQCodebook
from veloxquant_mlx.cache.layout import attention_layers, model_fingerprint
from veloxquant_mlx.models.rope import detect_ropes

# What the trainer thins a layer's vectors to.
NUM_TOKENS = 8192


def train_commvq(
    model,
    tokenizer,
    bits=2,
    value_bits=None,
    *,
    num_tokens=NUM_TOKENS,
    texts=None,
    stages=None,
    max_steps=30,
    seed=0,
    progress=None,
):
    """A CommVQCodebook for KVCacheConfig(method="commvq", codebook=...).

    bits: of a key element, the scalar of each token included; rounded down to whole stages of 12 bits. stages:
    instead of bits. value_bits: None: as `bits`, or 2 where there is no table shape for them.
    max_steps: EM steps of a stage. texts, num_tokens, progress(fraction, text): as in calibrate().
    """
    layers = attention_layers(model)
    shapes = {(layer.n_kv_heads, layer.head_dim) for layer in layers}
    if len(shapes) > 1:
        raise ValueError(f"model: got attention layers of different shapes {sorted(shapes)}, wanted one shape")
    dim = layers[0].head_dim
    n_stages, value_shape = _shapes(dim, bits, value_bits, stages)
    _check_integer("max_steps", max_steps, 1, 1000)
    _check_integer("num_tokens", num_tokens, 1, 2**31)
    ropes = detect_ropes(model)  # before the long part
    report = progress or (lambda fraction, text: None)
    data = collect(model, tokenizer, num_tokens, texts, lambda fraction, text: report(0.3 * fraction, text))
    positions = mx.array(sample_positions(data.window_lengths))
    keys, weights, values, rotations, errors = [], [], [], [], {"keys": [], "values": []}
    for i, rope in enumerate(ropes):

        def step(fraction, i=i):
            report(0.3 + 0.7 * (i + fraction) / len(ropes), "training codebooks")

        weight = _weight(data, i, rope)
        table, error = _ext.train_commvq(
            data.keys[i],
            positions,
            rope.core(),
            weight,
            n_stages=n_stages,
            max_steps=max_steps,
            seed=seed,
            progress=step,
        )
        keys.append(np.array(table))
        weights.append(np.array(weight))
        errors["keys"].append([round(head[-1], 6) for head in error])
        value_table, rotation, error = _train_values(data.values[i], value_shape, dim, seed)
        values.append(value_table)
        rotations.append(rotation)
        errors["values"].append(error)
    return CommVQCodebook(
        keys=np.stack(keys),
        weights=np.stack(weights),
        values=np.stack(values),
        value_rotations=np.stack(rotations),
        fingerprint=model_fingerprint(model),
        relative_error=errors,
    )


def _shapes(dim, bits, value_bits, stages):
    for name, value in (("bits", bits), ("value_bits", value_bits)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise ValueError(f"{name}: got {value!r}, wanted a positive number")
    if stages is None:
        stages = _ext.commvq_stages(dim, float(bits))
    _check_integer("stages", stages, 1, 64)
    if value_bits is None:
        value_bits = bits if bits in TABLE_SHAPES else 2
    if value_bits not in TABLE_SHAPES or dim % TABLE_SHAPES[value_bits][0]:
        raise ValueError(f"value_bits: got {value_bits!r}, wanted one of {', '.join(f'{b:g}' for b in TABLE_SHAPES)}")
    return stages, TABLE_SHAPES[value_bits]


def _check_integer(name, value, least, most):
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name}: got {value!r}, wanted an integer of {least} to {most}")


def _weight(data, layer, rope):
    """The queries' metric; 1 where the model's attention does not show its queries."""
    heads = data.keys[layer].shape[0]
    if data.query_moments is None:
        return mx.ones((heads, rope.head_dim // 2))
    return _ext.commvq_weight(mx.array(data.query_moments[layer]), rope.core())


def _train_values(x, shape, dim, seed):
    sub_dim, n_centroids = shape
    rotation, _ = _ext.learned_rotation(x, n_subvectors=dim // sub_dim)
    table, error = _ext.train_tables(
        x,
        encode_matrix=rotation,
        query_matrix=rotation,
        n_subvectors=dim // sub_dim,
        n_centroids=n_centroids,
        seed=seed,
    )
    return np.array(table), np.array(rotation), [round(e, 6) for e in error]
