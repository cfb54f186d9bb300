"""Which parameters a weight decay takes something off.

Rules are read in order, and the last that speaks of a parameter decides; what no rule speaks of
does not decay. A rule is

- `"matrices"`: tables and all that has rows and columns, but no norm scales or biases;
- letters, such as `"V"` or `"NH"`: parameters that have all of these axes;
- a pattern of a dotted path, such as `"*.ffn.*"` or `"embed.table"`;
- any of these with `!` in front: parameters that do not decay.

`"all"` is everything, also scales and biases; `"none"` is nothing.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from gemma_jax.training.param_letters import Letters, LettersOf, name_of
from gemma_jax.weights.tree import ParamPath

DecayRule = str | tuple[str, ...]


def decays(rule: DecayRule, letters: LettersOf, params: Mapping[ParamPath, Any]) -> dict:
    """Path -> whether it decays.

    Raises:
      ValueError: A rule that speaks of none of them.
    """
    rules = (rule,) if isinstance(rule, str) else tuple(rule)
    out = dict.fromkeys(params, False)
    for one in rules:
        name = one.removeprefix("!")
        found = [path for path, a in params.items() if _speaks(name, path, letters(path, a.ndim))]
        if not found and name not in ("none", "all", "matrices"):
            raise ValueError(
                f"weight decay: {one!r} matches none of the {len(params)} trained parameters, such "
                f"as {name_of(next(iter(params)))}; give letters ('V'), a pattern of names "
                "('*.ffn.*'), 'matrices', 'all' or 'none'"
            )
        out |= dict.fromkeys(found, one == name)
    return out


def _speaks(name: str, path: ParamPath, letters: Letters) -> bool:
    if name in ("none", "all"):
        return name == "all"
    if name == "matrices":
        return not letters.is_vector
    if name.isalpha() and name.isupper():
        return set(name) <= set(letters.dims)
    return fnmatchcase(name_of(path), name)
