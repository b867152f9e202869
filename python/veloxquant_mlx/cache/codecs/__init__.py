"""The codecs of each cache method. One module per method, with

    check(config, side)                       ValueError naming the field of KVCacheConfig that is off
    side_codecs(model, config, layers, side)  -> [exact_dtype -> _ext.Codec, one for each of `layers`]

layers: AttentionLayers, all or some of the model's; side: "keys" or "values".
"""

from veloxquant_mlx.cache.codecs import (
    commvq,
    exact,
    qjl,
    rabitq,
    turboquant,
    turboquant_rvq,
    vecinfer,
    vecinfer_rope,
)

METHODS = {
    "commvq": commvq,
    "vecinfer": vecinfer,
    "vecinfer_rope": vecinfer_rope,
    "turboquant": turboquant,
    "turboquant_rvq": turboquant_rvq,
    "qjl": qjl,
    "rabitq": rabitq,
    "fp16": exact,
}
