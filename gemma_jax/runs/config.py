"""What a run is, as a file in TOML says it.

    model = "gemma3-270m"            # anything that `--model` takes
    out = "runs/first"               # a new folder
    steps = 200

    [data]                           # fields of `DataSettings`; without epochs, read over and over
    files = "chats/train.jsonl"
    tokens_per_row = 512
    rows = 8

    [held_out]                       # the same fields; those left out are as in [data]
    files = "chats/held_out.jsonl"

    [adapter]                        # fields of `Lora`; without this table all is trained
    rank = 16

    [objective]                      # a name out of `OBJECTIVES`, and its options
    name = "next_token"

    [optimizer]                      # fields of `OptimizerSettings`
    rate = 2e-4
    schedule = "cosine"

    [load]                           # fields of `LoadOptions`
    weights = "int8"

    [every]                          # fields of `Every`: save, evaluate, sample, log

Every table has a class, and every key is a field of it: an unknown one is refused with the nearest.
"""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from gemma_jax.field_types import check_positive, check_types
from gemma_jax.loading import LoadOptions
from gemma_jax.remat import POLICIES
from gemma_jax.runs.train import Every
from gemma_jax.storages import one_of
from gemma_jax.training.data.settings import DataSettings
from gemma_jax.training.lora import Lora
from gemma_jax.training.objective_names import OBJECTIVES, named_objective
from gemma_jax.training.optimizers import OptimizerSettings
from gemma_jax.training.step import Objective


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Says what the model writes on the way.

    Attributes:
      prompts: What it goes on from; as users of a chat if `chat`.
      chat: Whether prompts are turns of a user.
      tokens: Most that it writes for each.
    """

    prompts: tuple[str, ...] = ()
    chat: bool = False
    tokens: int = 48

    def __post_init__(self):
        check_types(self)
        check_positive(self, "tokens")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Says what a run is; see the top of this file for how that is written down.

    Attributes:
      model: Source of the weights, as in `load`.
      out: Folder of the run.
      steps: In all; default: as many as `data.epochs` make.
      seed: Of adapters' factors and of what objectives draw.
      micro_batches: Batches of `data.rows` rows that make one step, computed one after the other.
      remat: What is kept for the backward pass; see `Runtime`.
      frozen: Parts that are not trained: names of parameters, with `*` for any part of one.
      save_as: `"hf"` or `"orbax"`, for what comes out of a run without adapter.
      spike: A loss so many times the usual one stops the run; 0: none does.
      tensorboard: Write event files into the folder, too.
      objective: Its name and options.
      reference: Source of a second model: the reference of preferences, a teacher's.

    Raises:
      ValueError: Values of a wrong type, or that do not go together.
    """

    model: str
    out: str
    data: DataSettings
    steps: int | None = None
    held_out: DataSettings | None = None
    adapter: Lora | None = None
    objective: Mapping[str, Any] = field(default_factory=lambda: {"name": "next_token"})
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    load: LoadOptions = field(default_factory=LoadOptions)
    every: Every = field(default_factory=Every)
    samples: Samples = field(default_factory=Samples)
    reference: str | None = None
    seed: int = 0
    micro_batches: int = 1
    remat: str | None = None
    frozen: tuple[str, ...] = ()
    save_as: Literal["hf", "orbax"] = "hf"
    spike: float = 3.0
    tensorboard: bool = False

    def __post_init__(self):
        if isinstance(self.frozen, str):
            object.__setattr__(self, "frozen", (self.frozen,))
        check_positive(self, "micro_batches")
        if self.remat is not None and self.remat not in POLICIES:
            raise ValueError(f"remat={self.remat!r} must be {one_of(POLICIES)}")
        if self.steps is not None:
            check_positive(self, "steps")
        if self.held_out is not None and self.held_out.epochs is None:
            raise ValueError("held_out is read to its end each time: give it epochs = 1")
        self._check_objective()

    def _check_objective(self) -> None:
        self.make_objective()
        other = OBJECTIVES[self.objective["name"]].other
        if other is None and self.reference is not None:
            raise ValueError(f"the objective {self.objective['name']!r} reads no reference")
        if other == "teacher" and self.reference is None:
            raise ValueError("distillation needs a teacher: reference = SRC")
        if other == "reference":
            if not self.data.pairs:
                raise ValueError("preferences are read as pairs: data.pairs = true")
            if self.reference is None and (self.adapter is None or self.adapter.whole):
                raise ValueError(
                    "the reference of preferences is the model without its adapter: give an "
                    "[adapter] that trains nothing whole, or another model by reference = SRC"
                )
        elif self.data.pairs:
            raise ValueError("data.pairs is for the objective 'dpo'")

    def make_objective(self, **more: Any) -> Objective:
        """The objective; `more` are options that no file can say."""
        options = {name: value for name, value in self.objective.items() if name != "name"}
        if "name" not in self.objective:
            raise ValueError(f"[objective] lacks name; choose from {', '.join(OBJECTIVES)}")
        return named_objective(self.objective["name"], **options, **more)


TABLES = {
    "data": DataSettings,
    "held_out": DataSettings,
    "adapter": Lora,
    "optimizer": OptimizerSettings,
    "load": LoadOptions,
    "every": Every,
    "samples": Samples,
}


def read_config(path: str | Path, changes: Sequence[str] = ()) -> tuple[RunConfig, dict[str, Any]]:
    """Reads a file, and returns what it says, as a config and as plain tables.

    Args:
      changes: `table.key=VALUE` each, in the place of what the file says; a value that is no TOML
        is text.

    Raises:
      ValueError: Not TOML, an unknown key, or a value that its field does not take.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not valid UTF-8") from None
    for change in changes:
        _change(tables, change)
    return config_of(tables, str(path)), tables


def config_of(tables: Mapping[str, Any], where: str = "config") -> RunConfig:
    """The config that plain tables say; see `read_config`."""
    values = dict(tables)
    if isinstance(values.get("data"), Mapping) and "steps" in values:
        values["data"] = {"epochs": None, **values["data"]}  # as often as the steps ask for it
    if "held_out" in values and isinstance(values.get("data"), Mapping):
        held_out = _table(values["held_out"], f"{where}: [held_out]")
        values["held_out"] = {**values["data"], "shuffle": False, "epochs": 1, **held_out}
    for name, kind in TABLES.items():
        if name in values:
            values[name] = _made(kind, values[name], f"{where}: [{name}]")
    return _made(RunConfig, values, where)


def _change(tables: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"{change!r}: expected table.key=VALUE, such as optimizer.rate=1e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *front, last = name.strip().split(".")
    for part in front:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise ValueError(f"{change!r}: {part} is no table")
    tables[last] = value


def _made(kind: type, given: Any, where: str) -> Any:
    """A dataclass of a table; errors say which."""
    given = _table(given, where)
    known = [one.name for one in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{where} has no {name!r}; {hint}")
    missing = [
        one.name
        for one in dataclasses.fields(kind)
        if one.name not in given
        and one.default is dataclasses.MISSING
        and one.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _table(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a table, got {given!r}")
    return dict(given)
