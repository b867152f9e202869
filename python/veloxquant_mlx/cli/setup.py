"""What generate, eval and demo do first: load the model, and give every method what it needs."""

from dataclasses import dataclass, field

from veloxquant_mlx.cli import calibration, output
from veloxquant_mlx.cli.methods import CODEBOOKS, CacheMethod


@dataclass(frozen=True)
class Settings:
    """What all methods of a command share. artifacts: directories made by calibrate; none: calibrated on
    built-in text as transform, codebook_per and entries say, and kept. fit_tokens: of "adaptive"."""

    window: int = 64
    sinks: int = 4
    artifacts: list = field(default_factory=list)
    transform: str | None = None
    codebook_per: str = "subvector"
    entries: str = "fp16"
    fit_tokens: int = 1024

    def recipe(self, method):
        if method not in ("vecinfer", "pre_rope"):
            return calibration.Recipe(method)
        return calibration.Recipe(method, self.transform, self.codebook_per, self.entries)


def open_model(name):
    """mlx_lm's (model, tokenizer), with a progress bar."""
    from veloxquant_mlx.models import load_model

    with output.progress() as report:
        return load_model(name, report)


def make_methods(model_name, model, tokenizer, wanted, settings=Settings()) -> list[CacheMethod]:
    """The CacheMethods for methods.Wanted: one for each, or one for each codebook that is to be had."""
    made = _built_in(model_name, model, tokenizer, wanted, settings)
    methods = []
    for one in wanted:
        window = settings.window if one.window is None else one.window
        sinks = settings.sinks if one.sinks is None else one.sinks
        common = {"window": window, "sinks": sinks, "fit_tokens": settings.fit_tokens, "fit_per": settings.codebook_per}
        if one.name in CODEBOOKS:
            for trained in _codebooks(one, made, settings):
                bits = trained.codebook.bits_per_element
                methods.append(CacheMethod(one.name, bits, trained=trained, **common))
        else:
            own_exact = one.window is not None
            methods.append(CacheMethod(one.name, one.bits or (2.0, 2.0), own_exact=own_exact, **common))
    return methods


def _built_in(model_name, model, tokenizer, wanted, settings):
    """{method: {bits: Trained}} of what has to be calibrated here: together, since the model runs over the text."""
    if settings.artifacts:
        return {}
    pairs = {}
    for one in wanted:
        if one.name in CODEBOOKS:
            pairs.setdefault(one.name, {})[one.bits or (2.0, 2.0)] = None
    return {
        method: calibration.load_or_calibrate(model_name, model, tokenizer, list(bits), settings.recipe(method))
        for method, bits in pairs.items()
    }


def _codebooks(one, made, settings):
    if not settings.artifacts:
        return [made[one.name][one.bits or (2.0, 2.0)]]
    found = calibration.load_all(settings.artifacts, one.name)
    if one.bits is None or len(settings.artifacts) == 1:  # a lone directory decides the bits
        return found
    # Bits are rounded down where a method has only some (commvq).
    matching = [t for t in found if all(b - 0.25 < got <= b for b, got in zip(one.bits, t.codebook.bits_per_element))]
    if not matching:
        got = ", ".join(f"{t.source}: {t.codebook.bits_per_element}" for t in found)
        raise ValueError(f"--artifacts: got {one.name} codebooks of other bits ({got}), wanted {one.bits}")
    return matching
