"""Codebooks for a command: read from --artifacts, or calibrated once and kept."""

import hashlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from veloxquant_mlx.allocators import commvq, vecinfer, vecinfer_rope
from veloxquant_mlx.allocators.recording import CONTEXT_TOKENS
from veloxquant_mlx.artifacts.npy_store import NpyArtifactStore
from veloxquant_mlx.cache.codebook import Codebook
from veloxquant_mlx.cache.pre_rope import CommVQCodebook, RopePairCodebook
from veloxquant_mlx.cli import output
from veloxquant_mlx.generated import OWN_SHARE
from veloxquant_mlx.models import model_directory
from veloxquant_mlx.models.paths import atomic_directory, cache_root

SMOOTH = "vecinfer_smooth"
# Method -> (name of its codebook among the artifacts, class).
CODEBOOKS = {
    "vecinfer": ("vecinfer_codebook", Codebook),
    "vecinfer_rope": ("vecinfer_rope_codebook", RopePairCodebook),
    "commvq": ("commvq_codebook", CommVQCodebook),
    "pre_rope": ("pre_rope_codebook", Codebook),
}
QUICK_TOKENS = 8192  # enough for a first look
FULL_TOKENS = 24576


@dataclass(frozen=True)
class Recipe:
    """How codebooks are made, beside their bits. Those of keys before RoPE have rotations of their own, and a
    table for each sub-vector.

    transform: "learned", "hadamard", or None: learned where the model's attention shows its queries.
    """

    method: str = "vecinfer"
    transform: str | None = None
    codebook_per: str = "subvector"
    entries: str = "fp16"

    def __post_init__(self):
        if self.method not in CODEBOOKS:
            raise ValueError(f"--method: got {self.method!r}, wanted one of {', '.join(CODEBOOKS)}")
        for option, value, known in (
            ("--transform", self.transform, (None, "hadamard", "learned")),
            ("--codebook-per", self.codebook_per, ("subvector", "lane", "head")),
            ("--entries", self.entries, ("fp16", "int8")),
        ):
            if value not in known:
                raise ValueError(f"{option}: got {value!r}, wanted one of {', '.join(filter(None, known))}")
        plain = (self.transform, self.codebook_per, self.entries) == (None, "subvector", "fp16")
        if self.method not in ("vecinfer", "pre_rope") and not plain:
            raise ValueError(
                f"--method: got {self.method!r} with --transform, --codebook-per or --entries, wanted 'vecinfer'"
            )

    @property
    def name(self):
        return "-".join([self.method, self.transform or "best", self.codebook_per, self.entries])


@dataclass(frozen=True)
class Trained:
    """What calibration makes for one method at one pair of bits. source: where it came from, for people."""

    method: str
    codebook: object
    smooth_factors: object = None
    source: str = "built-in text"


def load(directory, method="vecinfer") -> Trained:
    """From a directory of artifacts; ValueError or FileNotFoundError if it has none of the method."""
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"--artifacts: got {str(directory)!r}, wanted a directory made by veloxquant calibrate")
    store = NpyArtifactStore(directory)
    name, kind = CODEBOOKS[method]
    smooth_factors = store.load(SMOOTH) if method == "vecinfer" else None  # the others need none
    codebook = store.load(name)
    if not isinstance(codebook, kind):
        raise ValueError(
            f"--artifacts: got a {type(codebook).__name__} as {name} in {directory}, wanted a {kind.__name__}"
        )
    return Trained(method, codebook, smooth_factors, Path(directory).name)


def load_all(directories, method) -> list[Trained]:
    """Those of `directories` that hold a codebook of the method; a lone directory must."""
    if len(directories) == 1:
        return [load(directories[0], method)]
    holding = [d for d in directories if not Path(d).is_dir() or NpyArtifactStore(d).exists(CODEBOOKS[method][0])]
    if not holding:
        raise ValueError(
            f"--artifacts: got {', '.join(map(str, directories))}, none of which holds a {method} codebook"
        )
    return [load(d, method) for d in holding]


def bits_of(codebook):
    """Bits per element of the codes, keys and values averaged."""
    return sum(codebook.bits_per_element) / 2


def save(directory, trained):
    store = NpyArtifactStore(directory)
    if trained.method == "vecinfer":
        store.save(SMOOTH, trained.smooth_factors)
    store.save(CODEBOOKS[trained.method][0], trained.codebook)


def load_or_calibrate(model_name, model, tokenizer, bits, recipe=Recipe()):
    """{b: Trained} for every b in `bits`, from the built-in text.

    Calibrated together where missing and kept under the cache directory, so that the next run is quick.
    """
    kept = {b: _kept_directory(model_name, b, recipe) for b in bits}
    found = {b: _load_kept(kept[b], recipe.method) for b in bits}
    missing = [b for b in bits if found[b] is None]
    if missing:
        where = kept[missing[0]].parent
        output.note(f"calibrating on {QUICK_TOKENS} tokens of built-in text, once; kept in {where}")
        with output.progress() as report:
            made = calibrate_quickly(model, tokenizer, missing, report, recipe)
        for b, trained in made.items():
            with atomic_directory(kept[b]) as temporary:
                save(temporary, trained)
        found |= made
    return found


def calibrate(
    model, tokenizer, bits, texts, n_tokens, report, recipe=Recipe(), own_share=OWN_SHARE, context=CONTEXT_TOKENS
):
    """{b: Trained} for every b in `bits`. texts: None for the built-in text, a path, or strings. own_share: of
    the built-in text, what the model writes. context: positions that the tables are to serve."""
    if recipe.method in ("vecinfer", "pre_rope"):
        smooth_factors, codebooks = vecinfer.calibrate(
            model,
            tokenizer,
            list(bits),
            texts=texts,
            num_tokens=n_tokens,
            transform=recipe.transform or best_transform(model),
            codebook_per=recipe.codebook_per,
            entries=recipe.entries,
            before_rope=recipe.method == "pre_rope",
            own_share=own_share,
            context=context,
            progress=report,
        )
        return {b: Trained(recipe.method, codebook, smooth_factors) for b, codebook in zip(bits, codebooks)}
    train = {"commvq": commvq.train_commvq, "vecinfer_rope": vecinfer_rope.train_vecinfer_rope}[recipe.method]
    made = {}
    for i, (keys, values) in enumerate(bits):

        def step(fraction, text, i=i):
            report((i + fraction) / len(bits), text)

        codebook = train(model, tokenizer, keys, values, num_tokens=n_tokens, texts=texts, progress=step)
        made[keys, values] = Trained(recipe.method, codebook)
    return made


def calibrate_quickly(model, tokenizer, bits, report, recipe=Recipe()):
    """A first look: on found text alone, since the model's writing would take longer than all the rest."""
    return calibrate(model, tokenizer, bits, None, QUICK_TOKENS, report, recipe, own_share=0)


def best_transform(model):
    """Learned rotations need the queries, which some models hand to MLX's attention directly."""
    from veloxquant_mlx.cache.layout import attention_layers
    from veloxquant_mlx.metal.fused_sdpa import patch_mlx_lm_for_fused_sdpa

    hidden = patch_mlx_lm_for_fused_sdpa(model) & {layer.index for layer in attention_layers(model)}
    return "hadamard" if hidden else "learned"


def _load_kept(directory, method):
    if not directory.is_dir():
        return None
    try:
        trained = load(directory, method)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        output.note(f"{directory} cannot be used ({error}); calibrating again")
        shutil.rmtree(directory)
        return None
    return replace(trained, source=Trained.source)


def _kept_directory(model_name, bits, recipe):
    """Keyed by what the weights are, not only by the name: a retrained model at the same path is another one."""
    directory = model_directory(model_name)
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    name = "".join(c if c.isalnum() or c in "-." else "-" for c in Path(model_name).name)
    model = f"{name}-{digest.hexdigest()[:12]}"
    return cache_root() / "artifacts" / model / f"{recipe.name}-{bits[0]:g}-{bits[1]:g}bit"
