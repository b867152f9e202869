"""Training of codebooks of pre-RoPE keys, whatever they are made of, and of the values beside them."""

import mlx.core as mx
import numpy as np

from veloxquant_mlx import _ext
from veloxquant_mlx.allocators.recording import collect
from veloxquant_mlx.cache.codebook import TABLE_SHAPES
from veloxquant_mlx.cache.fitting import Fitting, fit_learned
from veloxquant_mlx.cache.layout import model_fingerprint
from veloxquant_mlx.models.rope import detect_ropes

# What CommVQ's trainer thins a layer's vectors to.
NUM_TOKENS = 8192
_COLLECTING = 0.3  # of the progress


def train_pre_rope(kind, train_keys, model, tokenizer, values, *, num_tokens, texts, progress):
    """A codebook of class `kind`, layer by layer.

    train_keys(x, positions, rope, weight, progress) -> (field -> array, error of each head); x: [H, N, D] with RoPE
    applied. values: their Fitting.
    """
    check_integer("num_tokens", num_tokens, 1, 2**31)
    ropes = detect_ropes(model)  # before the long part
    report = progress or (lambda fraction, text: None)
    data = collect(model, tokenizer, num_tokens, texts, lambda f, text: report(_COLLECTING * f, text))
    positions = mx.array(data.positions())
    arrays, errors = [], {"keys": [], "values": []}
    for i, rope in enumerate(ropes):

        def step(fraction, i=i):
            report(_COLLECTING + (1 - _COLLECTING) * (i + fraction) / len(ropes), "training codebooks")

        step(0.0)
        weight = _weight(data, i, rope)
        made, error = train_keys(data.keys[i], positions, rope.core(), weight, step)
        errors["keys"].append([round(e, 6) for e in error])
        made["weights"] = weight
        transform, made["values"], error = fit_learned("values", data.values[i], values)
        made["value_rotations"] = transform.rotation
        errors["values"].append(error)
        arrays.append({name: np.array(array) for name, array in made.items()})
    report(1.0, "training codebooks")
    return kind(
        **{name: np.stack([layer[name] for layer in arrays]) for name in arrays[0]},
        fingerprint=model_fingerprint(model),
        relative_error=errors,
    )


def value_fitting(dim, bits, value_bits, seed):
    """The Fitting of the values."""
    if value_bits is None:
        value_bits = bits if bits in TABLE_SHAPES else 2
    check_positive("value_bits", value_bits)
    if value_bits not in TABLE_SHAPES or dim % TABLE_SHAPES[value_bits][0]:
        raise ValueError(f"value_bits: got {value_bits!r}, wanted one of {', '.join(f'{b:g}' for b in TABLE_SHAPES)}")
    return Fitting.of_bits(value_bits, dim, seed=seed)


def check_positive(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name}: got {value!r}, wanted a positive number")


def check_integer(name, value, least, most):
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name}: got {value!r}, wanted an integer of {least} to {most}")


def _weight(data, layer, rope):
    """The queries' metric; 1 where the model's attention does not show its queries."""
    if data.query_moments is None:
        return mx.ones((data.keys[layer].shape[0], rope.head_dim // 2))
    return _ext.commvq_weight(mx.array(data.query_moments[layer]), rope.core())
