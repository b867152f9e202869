"""method "turboquant_rvq": as "turboquant" with a second stage that quantises what the first leaves.

`bits` is that of each stage, as the published package counts: bits=1 stores 2 bits an element, and
16 / head_dim for the scalar.
"""

from veloxquant_mlx.cache.codecs import scalar
from veloxquant_mlx.cache.codecs.turboquant import SCALES


def check(config, side):
    scalar.check_bits(config, side, "turboquant_rvq")
    scalar.check_options(config, "turboquant_rvq", {"scale": SCALES})


def side_codecs(model, config, layers, side):
    options = {"bits": int(scalar.bits_of(config, side)), **(config.codec_options or {})}
    return scalar.codecs(config, layers, side, "turboquant_rvq", options)
