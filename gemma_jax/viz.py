"""Pictures of what a model sees, and of what its slices cost; they show themselves in a notebook.

    heat = gj.viz.image_attention(out.captured["attention_weights"], query=-1, span=(7, 263))
    gj.viz.attention_overlay(image, heat)

    gj.viz.draw_crops(image, gj.PanAndScan().boxes(image.width, image.height))

    gj.viz.plot_sensitivity(matformer.sensitivity(model, tokens_BT, fractions), fractions)
    gj.viz.plot_slices(matformer.search(model, tokens_BT, budget))

Images are whatever `gemma_jax.Image` takes, and come back as PIL images of the same size. Plots are
drawn with matplotlib (extra `notebook`) and come back as its axes.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma_jax.vision.images import Image, pillow
from gemma_jax.vision.pan_and_scan import Box

if TYPE_CHECKING:
    import jax
    from matplotlib.axes import Axes
    from PIL.Image import Image as PilImage

    from gemma_jax.matformer import Point

Colour = tuple[int, int, int]
RED: Colour = (255, 32, 0)
# Told apart by the colour-blind as well (Okabe and Ito, "Color Universal Design").
CROP_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7")


def image_attention(
    weights: "jax.Array | np.ndarray", query: int, span: tuple[int, int], *, row: int = 0
) -> np.ndarray:
    """How much one token looks at each part of an image, averaged over layers and heads.

    Args:
      weights: Attention weights of all layers `[L, B, N, T, S]` or of one `[B, N, T, S]`, from a
        forward pass without a cache. Slice them first for fewer layers or heads.
      query: Which of the T tokens looks; negative counts from the end.
      span: Where the image's soft tokens begin in the prompt, and where they have ended.
      row: Which row of the batch.

    Returns:
      float32 `[rows, columns]`, the square grid of soft tokens; the sum is what the token spends
      on the image, of 1.

    Raises:
      ValueError: Something lies outside the weights, or the span is no square.
    """
    if weights.ndim not in (4, 5):
        raise ValueError(
            f"expected weights [L, B, N, T, S] or [B, N, T, S]; got shape {list(weights.shape)}"
        )
    B, _, T, S = weights.shape[-4:]
    for name, place, size in (("row", row, B), ("query", query, T)):
        if not -size <= place < size:
            raise ValueError(f"{name}={place} must lie in [-{size}, {size})")
    start, end = span
    side = math.isqrt(max(end - start, 0))
    if not 0 <= start < end <= S or side * side != end - start:
        raise ValueError(f"{span=} must lie in [0, {S}] and hold a square number of soft tokens")
    looks = np.asarray(weights[..., row, :, query, start:end], np.float32)
    return looks.reshape(-1, side, side).mean(axis=0)


def attention_overlay(
    image, weights: np.ndarray, *, colour: Colour = RED, alpha: float = 0.8
) -> "PilImage":
    """The image under a veil, as dense as the attention.

    Args:
      image: The image, or the crop, that the weights belong to.
      weights: `[rows, columns]`, not negative; only their ratios matter. They are stretched over
        the image with smooth transitions.
      colour: Red, green and blue of the veil, 0 to 255.
      alpha: How much the veil hides where the weight is largest; without weight it is not there.
    """
    grid = np.asarray(weights, np.float32)
    if grid.ndim != 2 or not grid.size or not (np.isfinite(grid) & (grid >= 0)).all():
        raise ValueError(
            f"expected finite weights [rows, columns], none negative; got shape {list(grid.shape)}"
            + (f" with values from {grid.min():g} to {grid.max():g}" if grid.size else "")
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"{alpha=} must lie in [0, 1]")
    picture = Image(image).to_pil()
    heat = pillow().fromarray(grid / (grid.max() or 1))
    heat = np.asarray(heat.resize(picture.size, pillow().Resampling.BILINEAR))
    veil = pillow().fromarray(np.rint(255 * alpha * heat).astype(np.uint8))
    return pillow().composite(pillow().new("RGB", picture.size, colour), picture, veil)


def draw_crops(image, boxes: Sequence[Box]) -> "PilImage":
    """The image with a frame along the inside of each box, in turns of four colours."""
    picture = Image(image).to_pil()
    from PIL.ImageDraw import Draw

    draw, line = Draw(picture), max(1, min(picture.size) // 100)
    for i, (left, top, right, bottom) in enumerate(boxes):
        colour = CROP_COLOURS[i % len(CROP_COLOURS)]
        draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=line)
    return picture


def plot_sensitivity(
    matrix: np.ndarray, fractions: Sequence[float], *, ax: "Axes | None" = None
) -> "Axes":
    """What it costs to narrow each layer alone: layers from left to right, widths downwards.

    Args:
      matrix: `[L, fractions]`, from `matformer.sensitivity`.
      fractions: Those that it was measured at.
      ax: Where to draw; default: a figure of its own.
    """
    matrix = np.asarray(matrix, np.float32)
    if matrix.ndim != 2 or matrix.shape[1] != len(fractions) or not matrix.size:
        raise ValueError(
            f"expected a matrix [L, {len(fractions)}], a column for each fraction; got shape "
            f"{list(matrix.shape)}"
        )
    ax = _axes(ax, (8, 2.4))
    # White is no loss at all; what narrowing happens to improve is not worth a colour of its own.
    heat = ax.imshow(matrix.T, cmap="Reds", vmin=0, aspect="auto")
    ax.set(xlabel="layer", ylabel="width kept", yticks=range(len(fractions)))
    ax.set_yticklabels([f"{fraction:.0%}" for fraction in fractions])
    ax.set_xticks(range(0, len(matrix), 1 + len(matrix) // 20))
    ax.figure.colorbar(heat, ax=ax, label="added loss\n(nats per token)")
    return ax


def plot_slices(
    points: "Sequence[Point]", *, names: Sequence[str] = (), ax: "Axes | None" = None
) -> "Axes":
    """Loss of slices against their parameters; a line joins those that none smaller is as good as.

    Args:
      points: Slices that were measured, as from `matformer.search`, in any order.
      names: To write beside the points, in their order; `""` for none, or fewer names than points.
      ax: Where to draw, for instance over other points; default: a figure of its own.
    """
    if not points:
        raise ValueError("no points given; give at least one")
    if len(names) > len(points):
        raise ValueError(f"{len(names)} names for {len(points)} points")
    ax = _axes(ax, (6, 4))
    best = []
    for point in sorted(points, key=lambda point: (point.parameters, point.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    (line,) = ax.plot([p.parameters for p in best], [p.loss for p in best])
    sizes, losses = zip(*[(point.parameters, point.loss) for point in points])
    ax.scatter(sizes, losses, color=line.get_color(), zorder=2)
    for name, size, loss in zip(names, sizes, losses):
        ax.annotate(name, (size, loss), xytext=(5, 5), textcoords="offset points")
    ax.set(xlabel="effective parameters", ylabel="loss (nats per token)")
    ax.xaxis.set_major_formatter("{x:,.0f}" if max(sizes) < 1e7 else _billions)
    return ax


def _billions(parameters: float, _) -> str:
    return f"{parameters / 1e9:.2f} B"


def _axes(ax: "Axes | None", size: tuple[float, float]) -> "Axes":
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'gemma-jax[notebook]'") from None
    return plt.subplots(figsize=size, layout="constrained")[1]
