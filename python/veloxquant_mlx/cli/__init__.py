"""The command line: `veloxquant`, also `python -m veloxquant_mlx`. One file per command.

Exit codes: 0 done, 1 failed, 2 a wrong argument. An error is one sentence on stderr; with VELOXQUANT_DEBUG=1
the traceback follows.
"""

import os
import sys
import traceback

import typer

from veloxquant_mlx.cli import output

app = typer.Typer(
    name="veloxquant",
    help="Compressed KV caches for mlx_lm models. Start with: veloxquant demo",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _quieten_libraries():
    """Their notes (a text longer than the model's context, no PyTorch) say nothing about what runs here."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _register():
    from veloxquant_mlx.cli import bench, calibrate, demo, devices, evaluate, generate, inspect, recommend

    for module in (demo, generate, calibrate, evaluate, recommend, inspect, devices):
        app.command(module.NAME, epilog=f"Example: {module.EXAMPLE}")(module.command)
    app.add_typer(bench.app, name="bench")


_quieten_libraries()  # read by the libraries when the commands import them
_register()


def main(arguments=None):
    """Runs the command line on `arguments` (sys.argv by default). Returns the exit code."""
    arguments = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if "--help" in arguments:
        return _run(arguments)  # help belongs on stdout
    with output.captured():
        return _run(arguments)


def _run(arguments):
    try:
        return app(arguments, prog_name="veloxquant", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail(1, "interrupted")
    except (ValueError, FileNotFoundError) as error:  # how this package reports a wrong argument
        return _fail(2, error)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own: unknown option, missing argument
            return _fail(2, error.format_message().rstrip(".").replace("\n", " ") + " (see --help)")
        return _fail(1, f"{type(error).__name__}: {error}")


def _fail(code, message):
    sentence = " ".join(str(message).split())
    output.note(f"veloxquant: error: {sentence}")
    if os.environ.get("VELOXQUANT_DEBUG") == "1":
        traceback.print_exc()
    return code
