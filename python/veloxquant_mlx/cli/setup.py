"""What generate, eval and demo do first: load the model, and give every method what it needs."""

from veloxquant_mlx.cli import calibration, output
from veloxquant_mlx.cli.methods import WITH_BITS, CacheMethod


def open_model(name):
    """mlx_lm's (model, tokenizer), with a progress bar."""
    from veloxquant_mlx.models import load_model

    with output.progress() as report:
        return load_model(name, report)


def make_methods(model_name, model, tokenizer, names, bits, artifacts=None, window=64, sinks=4):
    """The CacheMethods for `names`; those that take bits once per entry of `bits`.

    artifacts: a directory made by calibrate (its codebook decides the bits), else calibrated and kept.
    """
    found = {}
    if "vecinfer" in names:
        if artifacts is None:
            found = calibration.load_or_calibrate(model_name, model, tokenizer, bits)
        else:
            smooth_factors, codebook = calibration.load(artifacts)
            found = {codebook.bits_per_element: (smooth_factors, codebook)}
    methods = []
    for name in names:
        if name == "vecinfer":
            for b, (smooth_factors, codebook) in found.items():
                methods.append(CacheMethod(name, b, window, sinks, smooth_factors, codebook))
        elif name in WITH_BITS:
            methods += [CacheMethod(name, pair, window, sinks) for pair in bits]
        else:
            methods.append(CacheMethod(name, window=window, sinks=sinks))
    return methods
