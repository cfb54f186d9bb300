"""How all plots look: their colours, their settings of matplotlib, and where they are drawn."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Colour = tuple[int, int, int]
RED: Colour = (255, 32, 0)
# Told apart by the colour-blind as well (Okabe and Ito, "Color Universal Design").
BLUE, ORANGE, GREEN, PURPLE, SKY = COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9",
)  # fmt: skip

# Settings of matplotlib, for `plt.style.use`; all plots of `gemma_jax.viz` have them.
STYLE: dict[str, Any] = {
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.dpi": 90,
    "grid.color": "#e6e6e6",
    "image.cmap": "viridis",
    "legend.frameon": False,
    "lines.markersize": 5,
}

P = ParamSpec("P")


def styled(plot: "Callable[P, Axes]") -> "Callable[P, Axes]":
    """Draws in `STYLE`, and sets back what that has changed.

    Not with `rc_context`, which sets back more: that figures are shown, for one, if matplotlib
    loads a notebook's backend meanwhile.
    """

    @functools.wraps(plot)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> "Axes":
        settings = pyplot().rcParams
        before = {name: settings[name] for name in STYLE}
        settings.update(STYLE)
        try:
            return plot(*args, **kwargs)
        finally:
            settings.update(before)

    return in_style


def number_layers(ax: "Axes", layers: int) -> None:
    """Whole numbers below a plot, at most about twenty of them."""
    ax.set_xticks(range(0, layers, 1 + layers // 20))


def with_columns(values: Any, columns: int, what: str) -> np.ndarray:
    """The values as float32 `[L, columns]`.

    Args:
      what: What is expected, for the message.

    Raises:
      ValueError: They have another shape, or there are none.
    """
    array = np.asarray(values, np.float32)
    if array.ndim != 2 or array.shape[1] != columns or not array.size:
        raise ValueError(f"expected {what}; got shape {list(array.shape)}")
    return array


def pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'gemma-jax[notebook]'") from None
    return plt


def axes(ax: "Axes | None", size: tuple[float, float]) -> "Axes":
    """The axes given, or those of a new figure, so many inches wide and high."""
    return ax if ax is not None else pyplot().subplots(figsize=size)[1]
