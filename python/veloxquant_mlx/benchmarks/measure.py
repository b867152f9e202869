"""One comparison: our function, several MLX formulations and a copy of the same bytes, interleaved."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from veloxquant_mlx import _ext

_DROP = 3.0  # a formulation this many times slower than the best one in the first round is out


@dataclass
class Case:
    """function(...) on `shape`, against `formulations`: the same result from plain MLX operations.

    check(ours, theirs) raises ValueError where two results are not the same operation's; n_bytes: what
    the operation reads and writes.
    """

    function: str
    shape: str
    ours: Callable
    formulations: dict
    check: Callable
    n_bytes: int
    seed_row: str = ""  # the row of the seed's table that this is


def on_gpu():
    """Whether MLX's default device is a GPU: both sides run there then."""
    return mx.default_device().type == mx.DeviceType.gpu


def row(case, rounds, report=lambda what: None):
    """Measures a case: the fields of `bench kernels --json`. On a GPU there are no threads to count."""
    report(f"{case.function}: checking the output")
    _verify(case, case.formulations)
    copy_bytes = case.n_bytes // 2  # a copy reads and writes them
    source = mx.zeros((copy_bytes,), mx.uint8)
    mx.eval(source)
    gpu = on_gpu()
    threads = None if gpu else _ext.num_threads()
    # On a GPU, MLX's simplest pass over as many bytes.
    copy = mx.bitwise_invert if gpu else _ext.copied
    calls = {"ours": case.ours, "copy": lambda: copy(source)}
    if not gpu and threads > 1:
        calls["one thread"] = case.ours
    times = {name: [] for name in (*calls, *case.formulations)}
    formulations = dict(case.formulations)
    for index in range(rounds):
        report(f"{case.function}: round {index + 1} of {rounds}")
        for name, call in {**calls, **formulations}.items():
            # Short calls are repeated, so that every candidate sees the same weather.
            if name == "one thread":
                _ext.set_num_threads(1)
            times[name] += time_calls(call, least=0.02 if index else 0.0)
            if name == "one thread":
                _ext.set_num_threads(threads)
        if index == 0:
            best = min(times[name][0] for name in formulations)
            formulations = {n: f for n, f in formulations.items() if times[n][0] <= _DROP * best}
            if rounds > 1:  # the first calls warmed up
                for name in (*calls, *formulations):
                    times[name].clear()
    _verify(case, {name: case.formulations[name] for name in formulations})
    median = {name: statistics.median(t) for name, t in times.items() if t}
    baseline = min(formulations, key=median.get)
    ours = median["ours"]
    one = None if gpu else median.get("one thread", ours)
    return {
        "function": case.function,
        "shape": case.shape,
        "seed_row": case.seed_row,
        "backend": "gpu" if gpu else _ext.backend(),
        "simd": mx.device_info()["device_name"] if gpu else _ext.simd_level(),
        "threads": threads,
        "us": round(ours * 1e6, 1),
        "us_1_thread": None if gpu else round(one * 1e6, 1),
        "baseline": baseline,
        "baseline_us": round(median[baseline] * 1e6, 1),
        "baselines_us": {name: round(median[name] * 1e6, 1) for name in case.formulations},
        "speedup": round(median[baseline] / ours, 2),
        "speedup_1_thread": None if gpu else round(median[baseline] / one, 2),
        "gbps": round(case.n_bytes / ours / 1e9, 2),
        "copy_us": round(median["copy"] * 1e6, 1),
        "fraction_of_copy": round(median["copy"] / ours, 3),
    }


def _verify(case, formulations):
    ours = _evaluated(case.ours())
    for name, formulation in formulations.items():
        try:
            case.check(ours, _evaluated(formulation()))
        except ValueError as error:
            raise RuntimeError(f"{case.function} against '{name}': {error}") from None


def time_calls(call, least):
    """Seconds of every call made: one, and more until `least` seconds have passed."""
    times, total = [], 0.0
    while not times or (total < least and len(times) < 50):
        start = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - start)
        total += times[-1]
    return times


def _evaluated(result):
    mx.eval(result)
    return result


def equal(ours, theirs):
    """check= for results that must have the same bits."""
    if ours.shape != theirs.shape or not mx.array_equal(ours, theirs.astype(ours.dtype)).item():
        raise ValueError("the results differ")


def close(tolerance):
    """check= for results equal to `tolerance` of the largest element."""

    def check(ours, theirs):
        theirs = theirs.astype(mx.float32)
        error = mx.abs(ours.astype(mx.float32) - theirs).max().item()
        if not error <= tolerance * mx.abs(theirs).max().item():
            raise ValueError(f"the results differ by {error}")

    return check


def few_differ(share):
    """check= for codes: another rounding before a decision moves a few of them to a neighbour."""

    def check(ours, theirs):
        differing = (ours.astype(mx.int32) != theirs.astype(mx.int32)).astype(mx.float32).mean().item()
        if not differing <= share:
            raise ValueError(f"{100 * differing:.3g} % of the codes differ")

    return check
