"""Every cache method as the tests build it: a new one that needs a codebook is a line here."""

import architectures
import numpy as np

from veloxquant_mlx.allocators.commvq import train_commvq
from veloxquant_mlx.allocators.vecinfer import train_codebook
from veloxquant_mlx.allocators.vecinfer_rope import train_vecinfer_rope
from veloxquant_mlx.cache.base import KVCacheConfig
from veloxquant_mlx.cache.codecs import METHODS as IN_THE_PACKAGE
from veloxquant_mlx.cache.layout import model_fingerprint


def _tables(n_centroids, sub_dim):
    return np.random.default_rng(0).standard_normal((n_centroids, sub_dim)).astype(np.float32)


def _trained(model, train, made={}, **options):
    """train(model, tokenizer, **options), once for each model."""
    key = model_fingerprint(model), train.__name__
    if key not in made:
        made[key] = train(model, architectures.Tokenizer(), **options)
    return made[key]


def _learned(model):
    return _trained(model, train_codebook, num_samples=4, num_centroids=64, num_subspaces=16, transform="learned")


def _commuting(model):
    return _trained(model, train_commvq, bits=2, num_tokens=512, max_steps=3)


def _pairs(model):
    return _trained(model, train_vecinfer_rope, num_tokens=512)


# Name -> what KVCacheConfig is given for a model.
METHODS = {
    "fp16": lambda model: dict(method="fp16"),
    "vecinfer": lambda model: dict(codebook=_tables(256, 4)),
    "vecinfer 4 and 6 bit codes": lambda model: dict(codebook=_tables(16, 1), value_codebook=_tables(64, 2)),
    "vecinfer learned": lambda model: dict(codebook=_learned(model)),
    "adaptive": lambda model: dict(codebook="adaptive", fit_tokens=100),
    "vecinfer keys, fp16 values": lambda model: dict(codebook=_tables(256, 4), value_method="fp16"),
    "rabitq": lambda model: dict(method="rabitq", bits=2),
    "rabitq, rabitq values": lambda model: dict(method="rabitq", bits=1, value_bits=4, value_method="rabitq"),
    "qjl": lambda model: dict(method="qjl", bits=2, codec_options=dict(outliers=2)),
    "commvq": lambda model: dict(method="commvq", codebook=_commuting(model)),
    "vecinfer_rope": lambda model: dict(method="vecinfer_rope", codebook=_pairs(model)),
    "layers that differ": lambda model: dict(codebook=_tables(256, 4), layers={-1: dict(method="fp16")}),
}
# Methods that need nothing are taken along unlisted.
for _name in IN_THE_PACKAGE:
    METHODS.setdefault(_name, lambda model, name=_name: dict(method=name))


def config(name, model, **settings):
    return KVCacheConfig(**METHODS[name](model), **settings)
