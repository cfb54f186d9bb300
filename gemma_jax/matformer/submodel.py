"""What a slice keeps, and which slices are legal. Pure data, no arrays."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path

from gemma_jax.config import GemmaConfig, LayerSpec, share_kv
from gemma_jax.decoder.skipping import last_with_keys


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Says what a submodel keeps: feed-forward widths and layers.

    Attributes:
      ffn_widths: F of each kept layer, first to last: that many first channels stay. One number is
        the width of all of them; `None` leaves every layer as wide as it is.
      skip_layers: Indices of the layers to leave out, in the model that is sliced.

    Examples:
      >>> from gemma_jax import matformer
      >>> matformer.Slice(ffn_widths=128, skip_layers=(5, 6, 7, 8, 9)).kept(10)
      (0, 1, 2, 3, 4)
    """

    ffn_widths: tuple[int, ...] | int | None = None
    skip_layers: tuple[int, ...] = ()

    def __post_init__(self):
        widths = self.ffn_widths
        if widths is not None:
            alone = _whole_number(widths)
            widths = _whole_numbers("ffn_widths", widths) if alone is None else alone
        object.__setattr__(self, "ffn_widths", widths)
        skipped = _whole_numbers("skip_layers", self.skip_layers)
        object.__setattr__(self, "skip_layers", skipped)

    @classmethod
    def whole(cls, cfg: GemmaConfig) -> "Slice":
        """The slice that leaves a model as it is."""
        return cls(ffn_widths=tuple(spec.d_ff for spec in cfg.layers))

    @classmethod
    def read(cls, file: str | Path) -> "Slice":
        """From a JSON file with `ffn_widths`, `skip_layers`, or both, as in `Slice` itself.

        Raises:
          ValueError: Something else is in it.
        """
        text = Path(file).read_bytes()
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f'{file} is no slice; expected {{"ffn_widths": [W0, W1, ...], "skip_layers": '
                "[I, ...]}, whole numbers: one width, or one per kept layer"
            ) from None

    def write(self, file: str | Path) -> None:
        """To a JSON file that `read` takes."""
        Path(file).write_text(json.dumps(asdict(self)) + "\n", "utf-8")

    def kept(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the layers that stay."""
        return tuple(i for i in range(num_layers) if i not in self.skip_layers)

    def widths(self, cfg: GemmaConfig) -> tuple[int, ...]:
        """Returns F of each kept layer of a model, however `ffn_widths` says it."""
        kept, widths = self.kept(len(cfg.layers)), self.ffn_widths
        if widths is None:
            return tuple(cfg.layers[i].d_ff for i in kept)
        return (widths,) * len(kept) if isinstance(widths, int) else widths


def _whole_number(value: object) -> int | None:
    """The value as an `int`; `None` if it is no whole number."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def _whole_numbers(name: str, given: object) -> tuple[int, ...]:
    values = [_whole_number(value) for value in given] if isinstance(given, Iterable) else [None]
    numbers = tuple(value for value in values if value is not None)
    if len(numbers) < len(values):
        raise ValueError(f"{name}={given!r} must be whole numbers, such as (0, 1, 2)")
    return numbers


def slice_config(
    cfg: GemmaConfig, submodel: Slice, *, allow_irregular: bool = False
) -> GemmaConfig:
    """Derives the architecture of a slice.

    Kept layers keep their kind and sparsity; those that share keys and values read the same layers
    as before.

    Args:
      allow_irregular: Lets layers be skipped one by one. Otherwise only whole blocks of the
        local/global pattern are, as in all published slices: transformers before 4.53 and other
        tools take the pattern for granted.

    Raises:
      ValueError: An illegal slice, with all that is wrong with it.

    Examples:
      >>> import gemma_jax as gj
      >>> from gemma_jax import matformer
      >>> e4b = gj.preset("gemma3n-e4b")
      >>> len(matformer.slice_config(e4b, matformer.preset("e2b", e4b)).layers)
      30
    """
    if problems := _problems(cfg, submodel, allow_irregular):
        raise ValueError("illegal slice: " + "; ".join(problems))
    kept = submodel.kept(len(cfg.layers))
    specs = [
        replace(cfg.layers[i], d_ff=width, kv="own")
        for i, width in zip(kept, submodel.widths(cfg), strict=True)
    ]
    num_shared = sum(cfg.layers[i].kv == "shared" for i in kept)
    return replace(cfg, layers=share_kv(specs, num_shared))


def shares_cache(cfg: GemmaConfig, submodel: Slice) -> bool:
    """Whether the slice computes the same keys and values as the whole model.

    The two may then write into one cache. It is so if nothing is narrowed or skipped before the
    last layer that has keys and values of its own.
    """
    widths = dict(zip(submodel.kept(len(cfg.layers)), submodel.widths(cfg)))
    last = last_with_keys(cfg.layers)
    return last in widths and all(widths.get(i) == cfg.layers[i].d_ff for i in range(last))


def _problems(cfg: GemmaConfig, submodel: Slice, allow_irregular: bool) -> list[str]:
    layers, skipped = cfg.layers, submodel.skip_layers
    if outside := [i for i in skipped if not 0 <= i < len(layers)]:
        return [f"skip_layers {outside} do not exist; the model has layers 0 to {len(layers) - 1}"]
    if len(set(skipped)) != len(skipped):
        return [f"skip_layers={list(skipped)} names a layer twice"]
    kept = submodel.kept(len(layers))
    if not kept:
        return ["no layer is kept"]
    problems = []
    widths = submodel.widths(cfg)
    if (count := len(widths)) != len(kept):
        problems.append(f"{count} ffn_widths for {len(kept)} kept layers; expected one for each")
    problems += _outside(layers, zip(kept, widths))
    problems += [
        f"layer {i} cannot be skipped: later {layers[i].kind} layers share its keys and values"
        for i in sorted(skipped)
        if layers[i].kv == "lent"
    ]
    if not allow_irregular and (broken := _broken_blocks(layers, skipped)):
        problems.append(
            f"{broken}; only whole blocks can be skipped without changing the local/global "
            "pattern; allow_irregular=True lets single layers through"
        )
    return problems


def _outside(layers: tuple[LayerSpec, ...], width_of_layer: Iterable[tuple[int, int]]) -> list[str]:
    """What is wrong with widths, each of them once, however many layers have it."""
    where: dict[tuple[int, int], list[int]] = {}
    for i, width in width_of_layer:
        if not 1 <= width <= layers[i].d_ff:
            where.setdefault((width, layers[i].d_ff), []).append(i)
    return [
        f"width {width} of {f'layer {found[0]}' if len(found) == 1 else f'{len(found)} layers'} "
        f"must lie in [1, {most}]"
        for (width, most), found in where.items()
    ]


def _broken_blocks(layers: tuple[LayerSpec, ...], skipped: tuple[int, ...]) -> str | None:
    """What is irregular about skipping these layers, if anything."""
    if not skipped:
        return None
    kinds = [spec.kind for spec in layers]
    period = kinds.index("global") + 1 if "global" in kinds else 1
    regular = ["global" if (i + 1) % period == 0 else "local" for i in range(len(kinds))]
    if "global" in kinds and kinds != regular:
        return "the model's own layers do not repeat a pattern"
    for first in range(0, len(layers), period):
        block = range(first, min(first + period, len(layers)))
        if 0 < len(inside := [i for i in block if i in skipped]) < len(block):
            return f"of the block of layers {block[0]} to {block[-1]} only {inside} are skipped"
    return None
