import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama

import veloxquant_mlx  # noqa: F401  (loads OpenBLAS before MLX)


@pytest.fixture
def tiny_model():
    """A llama of 3 layers with random weights: 4 query and 2 KV heads of 64."""
    mx.random.seed(5)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=256,
        num_hidden_layers=3,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=200,
    )
    model = llama.Model(arguments)
    mx.eval(model.parameters())
    return model


@pytest.fixture
def tables():
    """A plain codebook [C, d] of standard normal centroids: 2 bits per element."""
    return np.random.default_rng(0).standard_normal((256, 4)).astype(np.float32)


@pytest.fixture
def tokens():
    return mx.array(np.random.default_rng(1).integers(0, 200, 700))
