"""What an ablation is: configs by name, and how all of them are trained."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from gemma_jax.config import GemmaConfig
from gemma_jax.experiments.ablations.facts import Facts
from gemma_jax.experiments.ablations.recall import Recall


@dataclass(frozen=True)
class Recipe:
    """Says how long a model learns, and how fast: AdamW, warm-up over a tenth, then a cosine.

    Attributes:
      steps, batch: Steps, and rows in each.
      rate: The highest learning rate.
      task: The rows.
    """

    steps: int = 250
    batch: int = 8
    rate: float = 6e-3
    task: Recall | Facts = field(default_factory=Recall)


@dataclass(frozen=True)
class Ablation:
    """Describes one experiment; everything that decides its numbers.

    Attributes:
      about: One line for people.
      variants: Name -> config.
      recipe: Of all variants but those in `recipes`.
      recipes: Name of a variant -> a recipe of its own.
    """

    about: str
    variants: Mapping[str, GemmaConfig]
    recipe: Recipe = Recipe()
    recipes: Mapping[str, Recipe] = field(default_factory=dict)

    def recipe_of(self, variant: str) -> Recipe:
        return self.recipes.get(variant, self.recipe)

    def digest(self) -> str:
        """Beginning of the SHA-256 of all that was said, defaults included. Fields that say no
        (`None`, `False`, nothing in them) are left out, so that a config may get a switch."""
        text = json.dumps(_plain(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def short(self) -> "Ablation":
        """The same with three steps of two rows."""

        def cut(recipe: Recipe) -> Recipe:
            return replace(recipe, steps=min(3, recipe.steps), batch=2)

        return replace(
            self,
            recipe=cut(self.recipe),
            recipes={name: cut(recipe) for name, recipe in self.recipes.items()},
        )


# Fields that configs got after results were stored, with what they say where nothing is new.
_LATER = {"rotary_share": 1.0, "values": "own"}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        named = {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.compare}
        return {n: v for n, v in named.items() if v not in (None, False, [], {}, _LATER.get(n))}
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
