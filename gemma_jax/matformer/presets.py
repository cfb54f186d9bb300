"""The published Mix-n-Match slices of E4B, as data.

Source: dataset `google/gemma3n-slicing-configs`: 35 layers, each at its full width of 16,384 or at
half of it; "-block" where the search went by blocks of five layers.
"""

from dataclasses import dataclass

from gemma_jax.config import GemmaConfig

from .submodel import Slice


@dataclass(frozen=True)
class Published:
    """One row of the dataset.

    Attributes:
      wide: Layers at full width; the others have half of it.
      skipped: Layers left out.
      mmlu: Published accuracy of the pretrained slice, in percent.
    """

    wide: tuple[int, ...]
    skipped: tuple[int, ...]
    mmlu: float


NUM_LAYERS = 35


def _layers(*runs: tuple[int, int] | int) -> tuple[int, ...]:
    """Layers one by one, or from the first to the last of a run."""
    pairs = [(run, run) if isinstance(run, int) else run for run in runs]
    return tuple(i for first, last in pairs for i in range(first, last + 1))


PRESETS: dict[str, Published] = {
    "e4b": Published(_layers((0, 34)), (), 62.3),
    "e2b": Published((), _layers((20, 24)), 50.9),
    "e1.96b": Published(_layers(4), _layers((20, 24)), 53.4),
    "e2.54b": Published(_layers(4, (20, 24)), (), 55.4),
    "e2.69b": Published(_layers(4, 9, 14, (19, 24)), (), 57.7),
    "e2.98b": Published(_layers((15, 24), (30, 34)), (), 59.5),
    "e3.18b": Published(_layers(4, (9, 24), 29, 34), (), 61.8),
    "e3.39b": Published(_layers(4, (9, 29), 34), (), 63.0),
    "e3.59b": Published(_layers((4, 29), 34), (), 63.4),
    "e3.79b": Published(_layers((4, 34)), (), 63.4),
    "e2.49b-block": Published(_layers((20, 24)), (), 54.5),
    "e2.73b-block": Published(_layers((15, 24)), (), 57.1),
    "e2.98b-block": Published(_layers((10, 24)), (), 59.5),
    "e3.24b-block": Published(_layers((10, 29)), (), 60.7),
    "e3.49b-block": Published(_layers((5, 29)), (), 61.4),
    "e3.79b-block": Published(_layers((5, 34)), (), 62.0),
}


def preset(name: str, cfg: GemmaConfig) -> Slice:
    """Returns the published slice `name`, for a model of 35 layers; half is half of its own widths.

    Raises:
      ValueError: An unknown name, or a model of another depth.

    Examples:
      >>> import gemma_jax as gj
      >>> from gemma_jax import matformer
      >>> matformer.preset("e2b", gj.preset("gemma3n-e4b")).skip_layers
      (20, 21, 22, 23, 24)
    """
    if name not in PRESETS:
        raise ValueError(f"unknown slice {name!r}; choose one of: {', '.join(PRESETS)}, or a file")
    if len(cfg.layers) != NUM_LAYERS:
        raise ValueError(
            f"slice {name!r} is made for the {NUM_LAYERS} layers of E4B; this model has "
            f"{len(cfg.layers)}; give widths and skipped layers instead"
        )
    row = PRESETS[name]
    kept = [i for i in range(NUM_LAYERS) if i not in row.skipped]
    return Slice(
        ffn_widths=tuple(cfg.layers[i].d_ff // (1 if i in row.wide else 2) for i in kept),
        skip_layers=row.skipped,
    )
