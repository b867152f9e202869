"""A compressed KV cache for transformers models: packed codes, and attention that reads them.

    tables = veloxquant.torch.calibrate(model, batches_of_token_ids, bits=2)
    cache = veloxquant.torch.VeloxQuantCache(model, tables)
    model.generate(**inputs, past_key_values=cache)

On a CUDA device everything runs on it; elsewhere on the CPU kernels, with the same codes bit for bit.
"""

from veloxquant.torch import attention as _attention
from veloxquant.torch.cache import VeloxQuantCache
from veloxquant.torch.calibration import calibrate
from veloxquant.torch.compiled import CapturedStep, compile_layers
from veloxquant.torch.tables import LayerTables, Tables

_attention.register()

__all__ = ["CapturedStep", "LayerTables", "Tables", "VeloxQuantCache", "calibrate", "compile_layers"]
