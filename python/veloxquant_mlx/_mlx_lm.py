"""The two places where mlx_lm itself is taught about our caches."""

import functools
import importlib
import sys

# Modules of models imported from now on find the hook in mlx_lm.models.base.
import mlx_lm.models.base as base

importlib.import_module("mlx_lm.generate")
_generate = sys.modules["mlx_lm.generate"]  # mlx_lm.generate, the attribute, is a function


def accept_kv_cache() -> None:
    """Let mlx_lm's generate functions take kv_cache= (as prompt_cache=), and refuse kv_bits= beside
    one of our caches, which mlx_lm would ignore. Idempotent."""
    for name in ("generate_step", "speculative_generate_step"):
        function = getattr(_generate, name)
        if not hasattr(function, "_veloxquant_original"):
            setattr(_generate, name, _with_kv_cache(function))


def _with_kv_cache(function):
    from veloxquant_mlx.cache.kv_cache import VeloxQuantKVCache
    from veloxquant_mlx.cache.layout import flat_caches

    @functools.wraps(function)
    def generate(*args, kv_cache=None, **kwargs):
        if kv_cache is not None:
            if kwargs.get("prompt_cache") is not None:
                raise ValueError("kv_cache: got kv_cache= and prompt_cache=, wanted one of the two")
            kwargs["prompt_cache"] = kv_cache
        ours = any(isinstance(c, VeloxQuantKVCache) for c in flat_caches(kwargs.get("prompt_cache")))
        if ours and kwargs.get("kv_bits") is not None:
            raise ValueError(
                f"kv_bits: got {kwargs['kv_bits']} beside a VeloxQuant cache, wanted none: the cache is "
                "already compressed (KVCacheConfig sets its bits)"
            )
        _check_models(args, kwargs)
        return function(*args, **kwargs)

    generate._veloxquant_original = function
    return generate


def _check_models(args, kwargs):
    """A loaded cache must meet its own model: with another one of the same shape it would go on
    without an error, and say nonsense."""
    from veloxquant_mlx.cache.layout import flat_caches, model_fingerprint

    caches = list(flat_caches(kwargs.get("prompt_cache")))
    found = {c.fingerprint for c in caches if getattr(c, "fingerprint", None) is not None}
    if not found:
        return
    models = [*args[1:3], *map(kwargs.get, ("model", "draft_model"))]
    wanted = {model_fingerprint(m) for m in models if hasattr(m, "parameters")}
    if not found <= wanted:
        raise ValueError(f"prompt_cache: got a cache of model {min(found - wanted)}, wanted {' or '.join(wanted)}")


def hooked_modules():
    """mlx_lm.models.base and every loaded model module that has its own name for the attention."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models.") and module is not None and hasattr(module, "scaled_dot_product_attention"):
            yield module


def original_attention():
    function = base.scaled_dot_product_attention
    return getattr(function, "_veloxquant_original", function)
