"""Which modules an adapter's config means, by the rules of PEFT 0.21 (`tuners_utils.py`).

Paths are those of modules in a running model of transformers: `model.layers.0.self_attn.q_proj`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Names = str | Sequence[str] | None


@dataclass(frozen=True)
class PeftRules:
    """The fields of a config that choose modules, and give them ranks.

    Attributes:
      r, lora_alpha: Where no pattern says otherwise.
      target_modules: Names, which are ends of paths, or one regular expression for whole paths.
      exclude_modules: The same for what is not meant after all.
      modules_to_save: Whole copies: of every module whose path ends so.
      layers_to_transform: Layers to adapt, where targets are names.
      layers_pattern: What stands in front of a layer's number.
      rank_pattern, alpha_pattern: Regular expression for the end of a path -> value.
    """

    r: int
    lora_alpha: float
    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def targets(self, path: str) -> bool:
        """Whether a module gets factors."""
        if _named(self.exclude_modules, path) or any(
            re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save
        ):
            return False
        if not _named(self.target_modules, path):
            return False
        by_name = not isinstance(self.target_modules, str)
        wanted = self.layers_to_transform
        if not by_name or path in (self.target_modules or ()) or wanted in (None, []):
            return True
        index = self._layer(path)
        return index is not None and index in ([wanted] if isinstance(wanted, int) else wanted)

    def saves(self, path: str) -> bool:
        """Whether a module, or one around it, is saved whole."""
        parts = path.split(".")
        around = (".".join(parts[: n + 1]) for n in range(len(parts)))
        return any(p.endswith(name) for p in around for name in self.modules_to_save)

    def rank(self, path: str) -> int:
        """Of a module's factors."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        """What the product of its factors is multiplied by."""
        rank, alpha = self.rank(path), _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return alpha / rank**0.5 if self.use_rslora else alpha / rank

    def _layer(self, path: str) -> int | None:
        patterns = self.layers_pattern or ()
        patterns = [patterns] if isinstance(patterns, str) else patterns
        for start in [rf"(?:^|.*?\.){one}" for one in patterns] or [r".*?\.[^.]*"]:
            if found := re.match(rf"{start}\.(?P<index>\d+)\.", path):
                return int(found["index"])
        return None

    def check(self) -> None:
        """Raises `ValueError` for what is no regular expression."""
        single = (self.target_modules, self.exclude_modules)
        texts: Iterable[str] = [text for text in single if isinstance(text, str)]
        for text in (*texts, *self.rank_pattern, *self.alpha_pattern, *self.modules_to_save):
            try:
                re.compile(text)
            except re.error as error:
                raise ValueError(f"{text!r} is no regular expression: {error}") from None


def _named(names: Names, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names or ())


def _by_pattern(patterns: Mapping, path: str, default):
    keys = (key for key in patterns if re.match(rf"(.*\.)?({key})$", path))
    return next((patterns[key] for key in keys), default)
