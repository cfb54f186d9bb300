"""What several commands share: options, the set-up of JAX, slices, JSON.

The options of a model that runs are in `model_options.py`.
"""

import json
import math
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gemma_jax.storages import STORED

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from gemma_checkpoints.description import Description
    from gemma_jax.audio.waves import Audio
    from gemma_jax.config import GemmaConfig
    from gemma_jax.decoder.model import Gemma
    from gemma_jax.matformer import Slice
    from gemma_jax.planning.memory import WeightBytes
    from gemma_jax.vision.images import Image

STDERR = 2  # its number, by which libraries in C write to it


def stderr() -> "Console":
    """For what a person reads; imported late, as a command that only answers needs none of it."""
    from rich.console import Console

    return Console(stderr=True)


def complete_name(incomplete: str) -> list[str]:
    """Names of the catalog for a shell's completion; where none begins so, it offers files."""
    from gemma_checkpoints.catalog import CATALOG

    return [name for name in CATALOG if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="SRC",
        help="Catalog name, folder or file.",
        autocompletion=complete_name,
    ),
]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Catalog name, folder or file.", autocompletion=complete_name
    ),
]


def architecture(metavar: str):
    """The argument of commands that need a config and no weights."""
    return typer.Argument(
        metavar=metavar, help="Preset, catalog name or path.", autocompletion=complete_name
    )


def settings_of(family: str):
    """The option of commands that prepare items as a model wants them, and run none."""
    return typer.Option(
        "--model",
        "-m",
        metavar="SRC",
        help=f"Preset, catalog name or path, for its settings. Default: those of {family}.",
        autocompletion=complete_name,
    )


Images = Annotated[
    list[Path] | None,
    typer.Option(
        help="Image file; may be repeated. Goes where the prompt says <start_of_image>, for Gemma "
        "3n <image_soft_token>."
    ),
]
Clips = Annotated[
    list[Path] | None,
    typer.Option(
        help="Sound file; may be repeated. Goes where the prompt says <audio_soft_token>."
    ),
]
PanAndScanOption = Annotated[
    bool | None,
    typer.Option(
        "--pan-and-scan/--no-pan-and-scan",
        help="Add crops of elongated images, or not. Default: as the checkpoint says.",
    ),
]
Temperature = Annotated[float, typer.Option(help="0 takes the most probable token.")]
TopK = Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens of this mass.")]
MinP = Annotated[float, typer.Option(help="Keep tokens this likely, next to the top.")]
Seed = Annotated[int, typer.Option(help="Seed of the random choices.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def set_up_jax() -> None:
    """Imports JAX with the persistent compilation cache, in the user's cache folder.

    `JAX_COMPILATION_CACHE_DIR` names another folder; set to nothing, it turns the cache off. A
    folder that cannot be used costs time alone: one line says so.
    """
    import jax

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = str(home / "gemma-jax" / "xla")
        jax.config.update("jax_compilation_cache_dir", folder)
    use = _use_of_cache(folder)
    if use == "none":
        jax.config.update("jax_enable_compilation_cache", False)
    # JAX writes what took at least so long to compile.
    least = 0 if use == "all" else math.inf
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    from gemma_jax.inference.stored_programs import keep_programs

    on_disk = folder and "://" not in folder and use != "none"
    keep_programs(Path(folder) / "programs" if on_disk else None)


@cache
def _use_of_cache(folder: str) -> Literal["all", "read", "none"]:
    """What the folder is good for; says once on stderr if that is not all."""
    if not folder or "://" in folder:  # off, or in a cloud
        return "all"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"no cache at {folder} ({error.strerror}): every start compiles", file=sys.stderr)
        return "none"
    if os.access(folder, os.W_OK | os.X_OK):
        return "all"
    print(
        f"the cache at {folder} cannot be written: what it lacks is compiled at every start",
        file=sys.stderr,
    )
    return "read"


def parse_mesh(text: str) -> dict[str, int]:
    """`tensor=4,data=2` as a mapping."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if not equals or not size.lstrip("-").isdigit() or name in axes:
            raise ValueError(f"--mesh {text!r}: expected AXIS=N,... such as tensor=4,data=2")
        axes[name] = int(size)
    return axes


def names(text: str) -> tuple[str, ...]:
    """The words of an option that has commas between them; each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def known_config(name: str) -> "GemmaConfig | None":
    """The architecture of a preset or a catalog name; `None` where only files say it."""
    from gemma_checkpoints.catalog import CATALOG, Repository
    from gemma_jax.presets import PRESETS

    size = name.removesuffix("-pt").removesuffix("-it")
    if size in PRESETS:
        return PRESETS[size]
    entry = CATALOG.get(name)
    if not isinstance(entry, Repository) or entry.preset is None:
        return None
    return replace(PRESETS[entry.preset], vision=None) if entry.text_only else PRESETS[entry.preset]


def find_config(source: str) -> "tuple[GemmaConfig, Description | None]":
    """The architecture of a preset, a catalog name or a path, and what its files say if it has any.

    Reads no weights. Pretrained and instruction-tuned weights are the same model, which a preset
    describes.
    """
    from gemma_checkpoints import describe, resolve

    if not Path(source).exists() and (cfg := known_config(source)) is not None:
        return cfg, None
    summary = describe(resolve(source))
    return summary.config, summary


def weights_by_storage(
    source: str, slice_name: str | None
) -> "tuple[GemmaConfig, dict[str, WeightBytes]]":
    """The architecture, and bytes of weights by storage: `stored` too, for files with blocks that
    can be kept, unless a slice is cut out of them."""
    from gemma_checkpoints import resolve, stored_bytes
    from gemma_jax.planning import memory

    cfg, summary = find_config(source)
    if slice_name is not None:
        cfg, summary = submodel_config(slice_name, cfg), None
    weights = memory.weights_by_storage(cfg)
    if summary is not None and (kept := stored_bytes(resolve(source))):
        weights[STORED] = memory.measured(cfg, kept)
    return cfg, weights


def find_slice(name: str | None, source: str) -> "Slice | None":
    """The published slice `name`, or the one in the file `name`, if it is legal for the model.

    Reads the model's config alone: an illegal slice should not cost the loading of weights.
    """
    if name is None:
        return None
    from gemma_checkpoints import describe, resolve

    cfg = describe(resolve(source)).config
    submodel = _named_slice(name, cfg)
    submodel_config(name, cfg)
    return submodel


def submodel_config(name: str, cfg: "GemmaConfig") -> "GemmaConfig":
    """The architecture of a slice, by its name or file; refuses illegal ones."""
    from gemma_jax.matformer import slice_config

    return slice_config(cfg, _named_slice(name, cfg), allow_irregular=True)


def _named_slice(name: str, cfg: "GemmaConfig") -> "Slice":
    from gemma_jax import matformer

    is_file = name not in matformer.PRESETS and os.path.exists(name)
    return matformer.Slice.read(name) if is_file else matformer.preset(name, cfg)


def view(model: "Gemma", submodel: "Slice | None") -> "Gemma":
    """The model, or what a slice leaves of it."""
    if submodel is None:
        return model
    from gemma_jax import matformer

    return matformer.at(model, submodel, allow_irregular=True)


def save_arrays(arrays: dict[str, "np.ndarray"], path: Path, output: Path) -> None:
    """Writes a safetensors file to `path`; `output` is the name it will have."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # Of an array whose axes are in another order, safetensors would write the memory as it lies.
    rows_first = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        save_file(rows_first, path)
    except SafetensorError as error:  # its text holds the system's: no space left, and so on
        raise OSError(f"{output} cannot be written: {error}") from None


def print_json(result: dict[str, Any]) -> None:
    json.dump(result, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")


def open_images(files: list[Path] | None, source: str, mmproj: str | None = None) -> "list[Image]":
    """The images, read and checked before a model is loaded for them."""
    if not files:
        return []
    from gemma_checkpoints import describe, resolve
    from gemma_jax.multimodal.image_prompt import require_vision
    from gemma_jax.vision.images import Image

    images = [Image(file) for file in files]
    require_vision(describe(resolve(source), mmproj=mmproj).config.vision)
    return images


def open_clips(files: list[Path] | None, source: str) -> "list[Audio]":
    """The sounds, read and checked before a model is loaded for them."""
    if not files:
        return []
    from gemma_checkpoints import describe, resolve
    from gemma_jax.multimodal.audio_prompt import require_audio

    clips = [read_clip(file) for file in files]
    require_audio(describe(resolve(source)).config.audio)
    return clips


def read_clip(file: Path) -> "Audio":
    """One sound file, decoded without what the decoders would write to stderr themselves.

    The one for MP3 says something of nearly every file, sound ones too.
    """
    from gemma_jax.audio.waves import Audio

    sys.stderr.flush()
    kept = os.dup(STDERR)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), STDERR)
        return Audio(file)
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)
