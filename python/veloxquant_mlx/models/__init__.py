"""Models by name: "smollm2" (embedded), a directory, or a name on the Hugging Face hub."""

from pathlib import Path

from veloxquant_mlx.models import smollm2

# What mlx_lm reads of a hub repository.
_HUB_FILES = ["*.json", "*.safetensors", "*.py", "*.txt", "*.jinja", "*.model", "*.tiktoken"]


def model_directory(name, progress=lambda fraction, text: None):
    """The directory with the weights of `name`; converts or downloads on the first use.

    Raises FileNotFoundError, one sentence that names the argument, when there is no such model.
    """
    if name == smollm2.NAME:
        return smollm2.directory(progress)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model: got the directory {name!r} without a config.json, wanted an mlx_lm model")
        return path
    if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"model: got {name!r}, wanted {smollm2.NAME!r}, a model directory, or a hub name like 'owner/model'"
        )
    from huggingface_hub import snapshot_download

    progress(0.0, f"fetching {name} from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"model: got {name!r}, which is no directory here and could not be fetched from the Hugging Face hub ({reason})"
        ) from error


def load_model(name, progress=lambda fraction, text: None):
    """`name`: "smollm2", a directory, or a hub name. Returns mlx_lm's (model, tokenizer)."""
    import mlx_lm

    directory = model_directory(name, progress)
    progress(1.0, f"loading {name}")
    return mlx_lm.load(str(directory))


def kv_elements_per_token(model):
    """Numbers that one token adds to the keys and values of all layers: sum of H_kv * (D_k + D_v).

    Read off the model's own caches after the graph of one token was built; layers without keys (recurrent
    ones) count nothing.
    """
    import mlx.core as mx

    from veloxquant_mlx.cache.layout import flat_caches, native_caches

    caches = native_caches(model)
    model(mx.array([[0]]), cache=caches)
    return sum(
        side.shape[1] * side.shape[3]
        for cache in flat_caches(caches)
        for side in (getattr(cache, "keys", None), getattr(cache, "values", None))
        if side is not None
    )
