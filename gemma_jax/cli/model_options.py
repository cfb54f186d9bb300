"""The options that every command which runs a model shares, declared once.

    @model_options()
    def command(model: common.Model, *, ..., options: ModelOptions) -> None:
        gemma = options.load(model)

`ModelOptions` stands in the place of its fields: each is an option of the command. What a command
has no use for it refuses in one line that says why.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from functools import update_wrapper
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.errors import flags_for
from gemma_jax.storages import ACTIVATIONS, CACHE_STORAGES, MADE_STORAGES, WEIGHT_STORAGES

if TYPE_CHECKING:
    from gemma_jax.decoder.model import Gemma
    from gemma_jax.loading import LoadOptions
    from gemma_jax.nn.layer_groups import Layout


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class ModelDType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class NumericsName(StrEnum):
    hf = "hf"
    gdm = "gdm"


class Place(StrEnum):
    device = "device"
    host = "host"
    disk = "disk"


WeightStorage = StrEnum("WeightStorage", {name: name for name in WEIGHT_STORAGES})
MadeStorage = StrEnum("MadeStorage", {name: name for name in MADE_STORAGES})
Activations = StrEnum("Activations", {name: name for name in ACTIVATIONS})
CacheStorage = StrEnum("CacheStorage", {name: name for name in CACHE_STORAGES})

# Those that commands which run no model share, too.
CacheDTypeOption = Annotated[
    CacheStorage | None,
    typer.Option(help="Dtype of cached keys and values. Default: that of the arithmetic."),
]
AttentionOption = Annotated[
    str, typer.Option("--attention-impl", help="Attention implementation, by name.")
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
MmprojOption = Annotated[
    str | None,
    typer.Option(
        "--mmproj", metavar="FILE", help="GGUF file with the vision tower of a GGUF file."
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Says on a command line how a model is loaded, with which adapter, and what of it runs."""

    dtype: Annotated[
        ModelDType | None,
        typer.Option(
            help="Dtype of the arithmetic; float16: of matrices alone. Default: float32 on CPU, "
            "else bfloat16."
        ),
    ] = None
    weights: Annotated[
        WeightStorage | None,
        typer.Option(
            help="What weights are stored as; stored: as the file's blocks. Default: as --dtype, "
            "and in generate, chat and serve auto: stored on a CPU, for a file with "
            "quantised blocks."
        ),
    ] = None
    activations: Annotated[
        Activations,
        typer.Option(help="What activations are rounded to in products with quantised weights."),
    ] = Activations.float
    cache_dtype: CacheDTypeOption = None
    vision_dtype: Annotated[
        DType | None, typer.Option(help="Dtype inside the vision tower. Default: as --dtype.")
    ] = None
    adapter: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="PEFT folder: LoRA, DoRA or rsLoRA for the model."),
    ] = None
    modalities: Annotated[
        str | None,
        typer.Option(
            metavar="text,...", help="Parts to load: text, image, audio. Default: all there are."
        ),
    ] = None
    mmproj: MmprojOption = None
    numerics: Annotated[
        NumericsName, typer.Option(help="Whose roundings to follow: transformers' or DeepMind's.")
    ] = NumericsName.hf
    attention_impl: AttentionOption = "auto"
    slice: SliceOption = None
    per_layer_table: Annotated[
        Place,
        typer.Option(help="Where Gemma 3n's per-layer table lies; rows are fetched from there."),
    ] = Place.device
    mesh: MeshOption = None

    def for_writing(self) -> "ModelOptions":
        """The same for commands that only write text: quantised blocks stay as they are on a CPU,
        which is as exact as widening them, and several times as fast."""
        return replace(self, weights=self.weights or WeightStorage.auto)

    def load(self, source: str) -> "Gemma":
        """The model, or the slice of it, under a progress bar."""
        submodel = common.find_slice(self.slice, source)
        return common.view(self.load_whole(source, "unrolled" if submodel else None), submodel)

    def load_whole(self, source: str, layout: "Layout | None" = None) -> "Gemma":
        """The model, without regard to `--slice`, which needs the layout "unrolled"."""
        common.set_up_jax()
        from gemma_jax.loading import load_model

        options = self.for_library(layout)
        with progress.loading() as bar:
            model = load_model(source, options, progress=bar)
        return model if self.adapter is None else self._adapted(model)

    def _adapted(self, model: "Gemma") -> "Gemma":
        from gemma_jax.peft import load_adapter

        # Who asks for some modalities does not want what the folder has for others.
        only_decoder = self.modalities is not None
        with flags_for("modalities"):
            return load_adapter(model, self.adapter, only_decoder=only_decoder)

    def for_library(self, layout: "Layout | None" = None) -> "LoadOptions":
        """The same for `gemma_jax.load`; a slice is a view of what it loads."""
        from gemma_jax.loading import LoadOptions
        from gemma_kernels.attention import IMPLEMENTATIONS

        known = ("auto", *IMPLEMENTATIONS)
        if self.attention_impl not in known:
            raise ValueError(
                f"--attention-impl {self.attention_impl!r}: choose one of: {', '.join(known)}"
            )
        own = ("slice", "adapter")  # which are no business of loading
        values = {name: _plain(v) for name, v in asdict(self).items() if name not in own}
        mesh = None if self.mesh is None else common.parse_mesh(self.mesh)
        with flags_for(*values):
            modalities = self.wanted_modalities()
            return LoadOptions(
                **values | {"mesh": mesh, "layout": layout, "modalities": modalities}
            )

    def wanted_modalities(self) -> tuple[str, ...] | None:
        """The names in `--modalities`; whether they are known is seen when the model is loaded."""
        given = self.modalities
        return None if given is None else tuple(word.strip() for word in given.split(","))

    def words(self) -> list[str]:
        """The options that are not at their defaults, as one would type them."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = [name for name in given if given[name] != getattr(ModelOptions, name)]
        return [word for name in changed for word in (flag(name), str(given[name]))]


def flag(name: str) -> str:
    """`cache_dtype` on the command line."""
    return "--" + name.replace("_", "-")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, StrEnum) else value


Command = Callable[..., None]


def model_options(
    *, refused: Mapping[str, str] | None = None, **defaults: Any
) -> Callable[[Command], Command]:
    """A decorator: the command's parameter `options: ModelOptions` becomes an option per field.

    Args:
      refused: Field -> why this command has no use for it.
      **defaults: Of fields, where they are others than those of `ModelOptions`.
    """
    refused = refused or {}
    own = inspect.signature(ModelOptions).parameters.values()
    taken = [p.replace(default=defaults.get(p.name, p.default)) for p in own]
    taken = [p for p in taken if p.name not in refused]

    def decorate(command: Command) -> Command:
        def run(**values: Any) -> None:
            given = {p.name: values.pop(p.name) for p in taken}
            command(**values, options=ModelOptions(**given))

        parameters = []
        for parameter in inspect.signature(command).parameters.values():
            parameters += taken if parameter.name == "options" else [parameter]
        return refuse_options(refused)(_declared(run, command, parameters))

    return decorate


def refuse_options(reasons: Mapping[str, str]) -> Callable[[Command], Command]:
    """A decorator: a command that is asked for one of these options says in one line why not.

    Args:
      reasons: By option, spelt as a field of `ModelOptions`.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    hidden = [
        inspect.Parameter(name, keyword, default=None, annotation=Annotated[str | None, option])
        for name, option in ((name, typer.Option(flag(name), hidden=True)) for name in reasons)
    ]

    def decorate(command: Command) -> Command:
        def run(**values: Any) -> None:
            for name, reason in reasons.items():
                if values.pop(name) is not None:
                    raise ValueError(f"{flag(name)}: {reason}; leave it out")
            command(**values)

        parameters = inspect.signature(command).parameters.values()
        return _declared(run, command, [*parameters, *hidden])

    return decorate


def all_but(*accepted: str, because: str) -> dict[str, str]:
    """One reason for all options but those that a command has itself."""
    return {f.name: because for f in fields(ModelOptions) if f.name not in accepted}


def _declared(run: Command, command: Command, parameters: list[inspect.Parameter]) -> Command:
    """`run` as typer shall see it: with the name and the text of `command`, and these parameters.

    All are given by name, so that their order is that of the help, whatever their defaults are.
    """
    update_wrapper(run, command)
    named = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(named)  # pyright: ignore[reportFunctionMemberAccess]
    return run
