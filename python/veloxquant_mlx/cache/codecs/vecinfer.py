"""method "vecinfer": product-quantised codes with trained tables."""

import mlx.core as mx

from veloxquant_mlx import _ext
from veloxquant_mlx.cache.codebook import Codebook, SmoothFactors, normalise_factors, normalise_tables
from veloxquant_mlx.cache.layout import attention_layers, model_fingerprint


def codec(side, tables, n_subvectors, *, hadamard=True, scale=None, encode_matrix=None, query_matrix=None):
    """tables: floats [H, M or 1, C, d], an optional batch axis in front. scale: lambda [H, D].
    Matrices: [H, D, D], instead of Hadamard and scale; the same array for both is held once."""
    arrays = {"tables": mx.array(tables).astype(mx.float16)}
    options = {"n_subvectors": n_subvectors, "transform": "hadamard" if hadamard else "none"}
    if scale is not None:
        arrays["scale"] = scale.astype(mx.float32)
    if encode_matrix is not None:
        options["transform"] = "dense"
        arrays["encode_matrix"] = encode_matrix.astype(mx.float32)
        if query_matrix is not encode_matrix:
            arrays["query_matrix"] = query_matrix.astype(mx.float32)
    heads, sub_dim = arrays["tables"].shape[-4], arrays["tables"].shape[-1]
    return _ext.codec(side, "vecinfer", heads, n_subvectors * sub_dim, options, arrays)


def _codebook(config, side):
    separate = side == "values" and config.value_codebook is not None
    return config.value_codebook if separate else config.codebook


def check(config, side):
    if _codebook(config, side) is None:
        raise ValueError(
            "codebook: got none, wanted the result of train_codebook() (or `veloxquant calibrate`): "
            "method 'vecinfer' needs one"
        )


def side_codecs(model, config, layers, side):
    """One function exact_dtype -> codec for each of `layers`; the codebook has all layers of the model."""
    codebook = _codebook(config, side)
    check_fingerprints(model, codebook, config.smooth_factors)
    n_layers, fitted, codecs = len(attention_layers(model)), {}, []
    for layer in layers:
        shape = layer.n_kv_heads, layer.head_dim
        if shape not in fitted:
            fitted[shape] = _fit(codebook, config, n_layers, *shape, side)
        tables, n_subvectors, maps = fitted[shape]
        codecs.append(codec(side, mx.array(tables[layer.position]), n_subvectors, **maps(layer.position)))
    return [lambda dtype, one=one: one for one in codecs]


def _fit(codebook, config, n_layers, heads, dim, side):
    """Tables, number of sub-vectors and transforms for layers of one shape."""
    tables = getattr(codebook, side) if isinstance(codebook, Codebook) else codebook
    tables = normalise_tables("codebook", tables, n_layers, heads, dim)
    n_subvectors = dim // tables.shape[-1]
    if side == "keys" and config.num_subspaces not in (None, n_subvectors):
        raise ValueError(
            f"num_subspaces: got {config.num_subspaces}, wanted {n_subvectors} (the codebook has sub-vectors of "
            f"{tables.shape[-1]} for head_dim {dim})"
        )
    return tables, n_subvectors, _transforms(codebook, config.smooth_factors, n_layers, heads, dim, side)


def check_fingerprints(model, codebook, factors):
    for name, made in (("codebook", codebook), ("smooth_factors", factors)):
        fingerprint = getattr(made, "fingerprint", None)
        if fingerprint is not None and fingerprint != model_fingerprint(model):
            raise ValueError(
                f"{name}: got one made for another model ({fingerprint}), wanted one for this model "
                f"({model_fingerprint(model)}): calibrate again"
            )


def _transforms(codebook, factors, n_layers, heads, dim, side):
    """A function from a layer's position to its transform, as arguments of codec()."""
    if isinstance(codebook, Codebook):
        if factors is None:
            factors = codebook.smooth_factors
        elif isinstance(factors, SmoothFactors) and not (
            factors.shape == codebook.smooth_factors.shape and (factors == codebook.smooth_factors).all()
        ):
            raise ValueError("smooth_factors: got other factors than the codebook was trained with, wanted those")
        elif codebook.rotations is not None and not isinstance(factors, SmoothFactors):
            raise ValueError("smooth_factors: got an array for a codebook of learned rotations, wanted none")
        if codebook.rotations is not None:
            return transforms(codebook, side)
    if side == "values":
        return lambda position: {}
    factors = normalise_factors(factors, n_layers, heads, dim)
    return lambda position: {"scale": mx.array(factors[position])}


def transforms(codebook, side):
    """The same of a Codebook with what it was trained with."""
    if codebook.rotations is not None:
        return codebook.rotations.key_matrices if side == "keys" else codebook.rotations.value_matrices
    if side == "values":
        return lambda position: {}
    return lambda position: {"scale": mx.array(codebook.smooth_factors[position])}
