"""Codecs that need no calibration, in the place of a model's tables."""

import functools
import json

from veloxquant import Error, SideTables
from veloxquant.torch.tables import LayerTables, Side, Tables

FORMAT = "veloxquant codec 1"
CODECS = {"turboquant": SideTables.turboquant}


class CodecTables(Tables):
    """What VeloxQuantCache(codec=...) has instead of calibrated tables; every layer and side has a rotation of its own."""

    def __init__(self, codec, bits, value_bits, heads, head_dim, compressed):
        if codec not in CODECS:
            raise Error(f"[VeloxQuantCache] codec: got {codec!r}, wanted one of {sorted(CODECS)}")
        self.made_of = [codec, bits, value_bits, heads, head_dim, list(compressed)]
        layers = []
        for index, kept in enumerate(compressed):
            seeds = (2 * index, 2 * index + 1)
            sides = [
                Side(side, CODECS[codec](side, heads, head_dim, b, seed))
                for side, b, seed in zip(("keys", "values"), (bits, value_bits), seeds)
            ]
            layers.append(LayerTables(*sides) if kept else None)
        super().__init__(layers)

    def to_arrays(self):
        return {}, json.dumps({"format": FORMAT, "made_of": self.made_of})


@functools.cache  # so that one model's caches share what is on the device
def codec_tables(*made_of):
    return CodecTables(*made_of)


def codec_tables_for(config, codec, bits, value_bits):
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    compressed = tuple(kind == "full_attention" for kind in kinds)
    value_bits = bits if value_bits is None else value_bits
    return codec_tables(codec, bits, value_bits, config.num_key_value_heads, dim, compressed)


def tables_of(arrays, description):
    """Whatever Tables `to_arrays` was of."""
    try:
        head = json.loads(description)
    except ValueError:
        head = None
    if isinstance(head, dict) and head.get("format") == FORMAT:
        *made_of, compressed = head["made_of"]
        return codec_tables(*made_of, tuple(compressed))
    return Tables.from_arrays(arrays, description)
