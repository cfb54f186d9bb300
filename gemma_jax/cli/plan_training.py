"""`gemma-jax plan --mode train --config`: the step of a run, on a machine that is not there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_jax.cli import common

if TYPE_CHECKING:
    from gemma_jax.config import GemmaConfig
    from gemma_jax.planning import Training, Work


@dataclass(frozen=True)
class Run:
    """A config of `gemma-jax train`, as a plan takes it."""

    cfg: "GemmaConfig"
    work: "Work"
    training: "Training"
    axes: dict[str, int] | None

    @classmethod
    def read(cls, path: Path, changes: Sequence[str], source: str, cfg: "GemmaConfig") -> "Run":
        """Reads it; `source` is the model that the command line names, and `cfg` what it is."""
        if not path.is_file():
            raise FileNotFoundError(2, "No such file", str(path))
        from gemma_jax.runs import planned
        from gemma_jax.runs.config import read_config

        config, tables = read_config(path, changes)
        if config.model != source:
            raise ValueError(
                f"{path} trains {config.model}, not {source}; name that one, or say "
                f"--set model={source}"
            )
        other = None if config.reference is None else common.find_config(config.reference)[0]
        return cls(
            planned.planned_config(cfg, config),
            planned.planned_work(config),
            planned.planned_training(config, other, tables),
            planned.planned_axes(config),
        )


def refuse_beside_config(mode: str, given: Mapping[str, object]) -> None:
    """Raises `ValueError` for options whose place is in the config."""
    if mode != "train":
        raise ValueError("--config is a run of training: add --mode train")
    if named := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"the config says what {named[0]} would; change it by --set KEY=VALUE")
