"""Objectives by name, with the options that a config may give them.

objective = named_objective("dpo", kind="ipo", beta=0.1)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from inspect import Parameter, signature
from typing import Any, Literal

from gemma_jax.field_types import checked_value
from gemma_jax.matformer.submodel import Slice
from gemma_jax.training.distillation import check_distill, distill
from gemma_jax.training.objectives import check_elastic, elastic, next_token
from gemma_jax.training.preference import check_dpo, dpo
from gemma_jax.training.step import Objective


@dataclass(frozen=True)
class NamedObjective:
    """Says what there is to know of an objective before a model is there.

    Attributes:
      function: `(model, batch, key, *, options) -> (loss, metrics)`.
      check: Raises `ValueError` for options that do not go together.
      mean_over: The metric that says over how many the loss is the mean.
      other: What the second model is called, and the option that makes it of the first; `None` if
        there is none.
    """

    function: Callable[..., Any]
    check: Callable[..., None]
    mean_over: Literal["tokens", "pairs"]
    other: str | None = None

    @property
    def options(self) -> dict[str, Parameter]:
        """By name, with their types and defaults."""
        parameters = signature(self.function).parameters
        return {n: p for n, p in parameters.items() if p.kind is Parameter.KEYWORD_ONLY}


def _check_nothing(**options: object) -> None:
    """Whatever the types allow is possible."""


OBJECTIVES: Mapping[str, NamedObjective] = {
    "next_token": NamedObjective(next_token, _check_nothing, "tokens"),
    "dpo": NamedObjective(dpo, check_dpo, "pairs", "reference"),
    "distill": NamedObjective(distill, check_distill, "tokens", "teacher"),
    "elastic": NamedObjective(elastic, check_elastic, "tokens"),
}


def named_objective(name: str, **options: Any) -> Objective:
    """Makes an objective of its name and options, all of which are checked at once.

    Args:
      name: One of `OBJECTIVES`.
      **options: As of the function of that name, numbers and lists as config files have them. The
        `submodels` of `elastic` may be dicts with what `Slice` takes.

    Raises:
      ValueError: Another name, an option that the objective does not have, or a value that it does
        not take.

    Examples:
      >>> import gemma_jax as gj
      >>> objective = gj.named_objective("dpo", kind="ipo", beta=0.1)
      >>> gj.named_objective("dpo", bata=0.1)
      Traceback (most recent call last):
      ValueError: the objective 'dpo' has no option 'bata'; did you mean 'beta'?
    """
    if name not in OBJECTIVES:
        raise ValueError(f"there is no objective {name!r}; {_hint(name, list(OBJECTIVES))}")
    entry = OBJECTIVES[name]
    for option, value in options.items():
        if option not in entry.options:
            hint = _hint(option, list(entry.options))
            raise ValueError(f"the objective {name!r} has no option {option!r}; {hint}")
        if option == "submodels":
            options[option] = tuple(map(_slice, value))
        elif option != entry.other:  # functions, which `check` looks at
            options[option] = checked_value(option, value, entry.options[option].annotation)
    entry.check(**options)
    return partial(entry.function, **options)


def _hint(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"


def _slice(given: Slice | Mapping[str, Any]) -> Slice:
    if isinstance(given, Slice):
        return given
    known = ("ffn_widths", "skip_layers")
    if not isinstance(given, Mapping) or not given.keys() <= set(known):
        raise ValueError(f"submodels={given!r} must say {' and '.join(known)} and nothing else")
    return Slice(**given)
