"""What several commands share: options, the set-up of JAX, loading, JSON."""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gemma_jax.cli import progress
from gemma_jax.storages import CACHE_STORAGES, WEIGHT_STORAGES

if TYPE_CHECKING:
    import numpy as np

    from gemma_checkpoints.description import Description
    from gemma_jax.config import GemmaConfig
    from gemma_jax.decoder.model import Gemma
    from gemma_jax.matformer import Slice
    from gemma_jax.nn.layer_groups import Layout
    from gemma_jax.vision.images import Image
    from gemma_jax.vision.pan_and_scan import PanAndScan

stderr = Console(stderr=True)


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class NumericsName(StrEnum):
    hf = "hf"
    gdm = "gdm"


class Place(StrEnum):
    device = "device"
    host = "host"
    disk = "disk"


WeightStorage = StrEnum("WeightStorage", {name: name for name in WEIGHT_STORAGES})
CacheStorage = StrEnum("CacheStorage", {name: name for name in CACHE_STORAGES})


Model = Annotated[
    str, typer.Option("--model", "-m", metavar="SRC", help="Catalog name, folder or file.")
]
DTypeOption = Annotated[
    DType | None,
    typer.Option(help="Dtype of the arithmetic. Default: float32 on CPU, else bfloat16."),
]
WeightsOption = Annotated[
    WeightStorage | None,
    typer.Option(help="Dtype the weights are stored in. Default: that of the arithmetic."),
]
CacheDTypeOption = Annotated[
    CacheStorage | None,
    typer.Option(help="Dtype of cached keys and values. Default: that of the arithmetic."),
]
NumericsOption = Annotated[
    NumericsName, typer.Option(help="Whose roundings to follow: transformers' or DeepMind's.")
]
AttentionOption = Annotated[
    str, typer.Option("--attention-impl", help="Attention implementation, by name.")
]
VisionDTypeOption = Annotated[
    DType | None, typer.Option(help="Dtype inside the vision tower. Default: as --dtype.")
]
Images = Annotated[
    list[Path] | None,
    typer.Option(help="Image file; may be repeated. Goes where the prompt says <start_of_image>."),
]
PanAndScanOption = Annotated[
    bool, typer.Option("--pan-and-scan", help="Add crops of elongated images.")
]
PerLayerTableOption = Annotated[
    Place, typer.Option(help="Where Gemma 3n's per-layer table lies; rows are fetched from there.")
]
SliceOption = Annotated[
    str | None,
    typer.Option(
        "--slice", metavar="NAME|FILE", help="Run a slice of the model: e2b, ..., or a JSON file."
    ),
]
MeshOption = Annotated[
    str | None,
    typer.Option(
        "--mesh", metavar="AXIS=N,...", help="Spread over devices along data, sequence, tensor."
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

    `JAX_COMPILATION_CACHE_DIR` names another folder; set to nothing, it turns the cache off.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "gemma-jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def load_model(
    source: str,
    *,
    dtype: DType | None,
    weights: WeightStorage | None = None,
    cache_dtype: CacheStorage | None = None,
    numerics: NumericsName = NumericsName.hf,
    attention_impl: str = "auto",
    vision_dtype: DType | None = None,
    slice_name: str | None = None,
    per_layer_table: Place = Place.device,
    layout: "Layout | None" = None,
    mesh: str | None = None,
) -> "Gemma":
    """`gemma_jax.load` without the tokenizer, under a progress bar; or a slice of it."""
    set_up_jax()
    from gemma_jax.loading import load_model as load

    axes = None if mesh is None else parse_mesh(mesh)
    cut = find_slice(slice_name, source)
    with progress.loading() as bar:
        net = load(
            source,
            dtype=dtype and dtype.value,
            weights=weights and weights.value,
            cache_dtype=cache_dtype and cache_dtype.value,
            numerics=numerics.value,
            attention_impl=attention_impl,
            vision_dtype=vision_dtype and vision_dtype.value,
            per_layer_table=per_layer_table.value,
            layout=layout if cut is None else "unrolled",
            mesh=axes,
            progress=bar,
        )
    return view(net, cut)


def parse_mesh(text: str) -> dict[str, int]:
    """`tensor=4,data=2` as a mapping."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if not equals or not size.lstrip("-").isdigit() or name in axes:
            raise ValueError(f"--mesh {text!r}: expected AXIS=N,... such as tensor=4,data=2")
        axes[name] = int(size)
    return axes


def find_config(source: str) -> "tuple[GemmaConfig, Description | None]":
    """The architecture of a preset, a catalog name or a path, and what its files say if it has any.

    Reads no weights. Pretrained and instruction-tuned weights are the same model, which a preset
    describes.
    """
    from gemma_jax.presets import PRESETS

    size = source.removesuffix("-pt").removesuffix("-it")
    if size in PRESETS and not Path(source).exists():
        return PRESETS[size], None
    from gemma_checkpoints import describe, resolve

    summary = describe(resolve(source))
    return summary.config, summary


def find_slice(name: str | None, source: str) -> "Slice | None":
    """The published slice `name`, or the one in the file `name`, if it is legal for the model.

    Reads the model's config alone: an illegal slice should not cost the loading of weights.
    """
    if name is None:
        return None
    from gemma_checkpoints import describe, resolve

    cfg = describe(resolve(source)).config
    cut = _named_slice(name, cfg)
    cut_config(name, cfg)
    return cut


def cut_config(name: str, cfg: "GemmaConfig") -> "GemmaConfig":
    """The architecture of a slice, by its name or file; refuses illegal ones."""
    from gemma_jax.matformer import slice_config

    return slice_config(cfg, _named_slice(name, cfg), allow_irregular=True)


def _named_slice(name: str, cfg: "GemmaConfig") -> "Slice":
    from gemma_jax import matformer

    is_file = name not in matformer.PRESETS and os.path.exists(name)
    return matformer.Slice.read(name) if is_file else matformer.preset(name, cfg)


def view(net: "Gemma", cut: "Slice | None") -> "Gemma":
    """The model, or what a slice leaves of it."""
    if cut is None:
        return net
    from gemma_jax import matformer

    return matformer.at(net, cut, allow_irregular=True)


def save_arrays(arrays: dict[str, "np.ndarray"], path: Path, output: Path) -> None:
    """Writes a safetensors file to `path`; `output` is the name it will have."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(arrays, path)
    except SafetensorError as error:  # its text holds the system's: no space left, and so on
        raise OSError(f"{output} cannot be written: {error}") from None


def print_json(result: dict[str, Any]) -> None:
    json.dump(result, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")


def open_images(files: list[Path] | None, source: str) -> "list[Image]":
    """The images, read and checked before a model is loaded for them."""
    if not files:
        return []
    from gemma_checkpoints import describe, resolve
    from gemma_jax.multimodal.image_prompt import require_vision
    from gemma_jax.vision.images import Image

    images = [Image(file) for file in files]
    require_vision(describe(resolve(source)).config.vision)
    return images


def pan_and_scan(wanted: bool) -> "PanAndScan | None":
    from gemma_jax.vision.pan_and_scan import PanAndScan

    return PanAndScan() if wanted else None
