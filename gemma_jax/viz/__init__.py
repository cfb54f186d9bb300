"""Pictures of what a model sees, and of what its slices cost; they show themselves in a notebook.

    heat = gj.viz.image_attention(out.captured["attention_weights"], query=-1, span=(7, 263))
    gj.viz.attention_overlay(image, heat)

    gj.viz.draw_crops(image, gj.PanAndScan().boxes(image.width, image.height))

    words = gj.viz.token_labels(tok, ids)
    gj.viz.plot_logit_lens(gj.logit_lens(model, [ids]), tok, words)
    gj.viz.plot_contributions(gj.logit_contributions(model, [ids], token))
    gj.viz.plot_attention(out.captured["attention_weights"][layer, 0, head], words)
    gj.viz.plot_image_attention(image, heat)
    gj.viz.plot_patching(restored_LT, words)

    gj.viz.plot_mel(log_mel(clip.samples, sounds, num_mels), sounds)
    heat = gj.viz.sound_attention(out.captured["attention_weights"], queries=[-2, -1], span=(9, 33))
    gj.viz.plot_sound_attention(heat, words, seconds=0.16)

    plt.style.use(gj.viz.STYLE)  # for plots of your own to look like these
    gj.viz.plot_layers(norms, model.cfg.layers, label="norm of the gradient")
    gj.viz.plot_sensitivity(matformer.sensitivity(model, tokens_BT, fractions), fractions)
    gj.viz.plot_slices(matformer.search(model, tokens_BT, budget))
    gj.viz.plot_depths(probe(model, tok, tasks=["needle"]))  # of evaluation.probing

Images are whatever `gemma_jax.Image` takes, and come back as PIL images of the same size. Plots are
drawn with matplotlib (extra `notebook`) and come back as its axes.

Local letters: M mel bands.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma_jax.config import LayerSpec
from gemma_jax.encoder_config import SoundProcessing
from gemma_jax.vision.images import Image, pillow
from gemma_jax.vision.pan_and_scan import Box
from gemma_jax.viz.inside import (
    plot_attention,
    plot_contributions,
    plot_image_attention,
    plot_logit_lens,
    plot_patching,
    soft_token_grid,
    token_labels,
)
from gemma_jax.viz.style import (
    BLUE,
    COLOURS,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    STYLE,
    Colour,
    axes,
    number_layers,
    styled,
    with_columns,
)

if TYPE_CHECKING:
    import jax
    from matplotlib.axes import Axes
    from PIL.Image import Image as PilImage

    from gemma_jax.evaluation.probing import Found
    from gemma_jax.matformer import Point

__all__ = [
    "BLUE",
    "COLOURS",
    "CROP_COLOURS",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "RED",
    "SKY",
    "STYLE",
    "attention_overlay",
    "draw_crops",
    "image_attention",
    "plot_attention",
    "plot_contributions",
    "plot_depths",
    "plot_image_attention",
    "plot_layers",
    "plot_logit_lens",
    "plot_mel",
    "plot_patching",
    "plot_sensitivity",
    "plot_slices",
    "plot_sound_attention",
    "sound_attention",
    "token_labels",
]

CROP_COLOURS = (ORANGE, SKY, GREEN, PURPLE)


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
    S = _check_places(weights, row, [query])
    start, end = span
    side = math.isqrt(max(end - start, 0))
    if not 0 <= start < end <= S or side * side != end - start:
        raise ValueError(f"{span=} must lie in [0, {S}] and hold a square number of soft tokens")
    looks = np.asarray(weights[..., row, :, query, start:end], np.float32)
    return looks.reshape(-1, side, side).mean(axis=0)


def sound_attention(
    weights: "jax.Array | np.ndarray",
    queries: Sequence[int],
    span: tuple[int, int],
    *,
    row: int = 0,
) -> np.ndarray:
    """How much some tokens look at each soft token of a clip, averaged over layers and heads.

    Args:
      weights: As in `image_attention`.
      queries: Which of the T tokens look; negative counts from the end.
      span: Where the clip's soft tokens begin in the prompt, and where they have ended.
      row: Which row of the batch.

    Returns:
      float32 `[queries, soft tokens]`; the sum of a row is what a token spends on the sound, of 1.

    Raises:
      ValueError: Something lies outside the weights.
    """
    S = _check_places(weights, row, queries)
    start, end = span
    if not 0 <= start < end <= S:
        raise ValueError(f"{span=} must lie in [0, {S}] and hold a soft token at least")
    looks = np.asarray(weights[..., row, :, np.array(queries), start:end], np.float32)
    return looks.reshape(len(queries), -1, end - start).mean(axis=1)


def _check_places(weights: "jax.Array | np.ndarray", row: int, queries: Sequence[int]) -> int:
    """How many keys there are; refuses weights of another shape, and places outside them."""
    if weights.ndim not in (4, 5):
        raise ValueError(
            f"expected weights [L, B, N, T, S] or [B, N, T, S]; got shape {list(weights.shape)}"
        )
    B, _, T, S = weights.shape[-4:]
    places = [("row", row, B), *(("query", query, T) for query in queries)]
    for name, place, size in places:
        if not -size <= place < size:
            raise ValueError(f"{name}={place} must lie in [-{size}, {size})")
    return S


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
    grid = soft_token_grid(weights)
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


@styled
def plot_mel(
    mel_TM: np.ndarray,
    processing: SoundProcessing = SoundProcessing(),
    *,
    ax: "Axes | None" = None,
) -> "Axes":
    """Log-mel frames of a clip: time from left to right, low bands below.

    Args:
      mel_TM: float `[frames, bands]`, from `gemma_jax.audio.mel.log_mel`.
      processing: Of the frames, for the times below them.
      ax: Where to draw; default: a figure of its own.
    """
    mel_TM = np.asarray(mel_TM, np.float32)
    if mel_TM.ndim != 2 or not mel_TM.size:
        raise ValueError(f"expected mel frames [frames, bands]; got shape {list(mel_TM.shape)}")
    ax = axes(ax, (7, 2.4))
    seconds = len(mel_TM) * processing.hop_length / processing.sampling_rate
    extent = (0, seconds, 0, mel_TM.shape[1])
    heat = ax.imshow(mel_TM.T, origin="lower", aspect="auto", extent=extent)
    ax.set(xlabel="seconds", ylabel="mel band")
    ax.figure.colorbar(heat, ax=ax, label="log of magnitude")
    return ax


@styled
def plot_sound_attention(
    heat: np.ndarray, words: Sequence[str], seconds: float, *, ax: "Axes | None" = None
) -> "Axes":
    """Where in a clip each word looks: a row for each word, time from left to right.

    Args:
      heat: float `[words, soft tokens]`, from `sound_attention`. Each row is drawn on a scale of
        its own.
      words: What to write beside the rows.
      seconds: From one soft token to the next.
      ax: Where to draw; default: a figure of its own.
    """
    heat = np.asarray(heat, np.float32)
    if heat.ndim != 2 or len(words) != len(heat) or not heat.size:
        raise ValueError(
            f"expected weights [{len(words)}, soft tokens], a row for each word; got shape "
            f"{list(heat.shape)}"
        )
    ax = axes(ax, (7, 0.8 + 0.35 * len(words)))
    largest = heat.max(axis=1, keepdims=True)
    shown = heat / np.where(largest > 0, largest, 1)
    extent = (0, heat.shape[1] * seconds, len(words) - 0.5, -0.5)
    ax.imshow(shown, aspect="auto", cmap="Blues", vmin=0, extent=extent)
    ax.set(xlabel="seconds", ylabel="word", yticks=range(len(words)))
    ax.set_yticklabels(words)
    return ax


@styled
def plot_layers(
    values: Sequence[float],
    layers: Sequence[LayerSpec],
    *,
    label: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """A bar for each layer, of one colour for local layers and of another for global ones.

    Args:
      values: One for each layer.
      layers: `model.cfg.layers`.
      label: What the values are.
      ax: Where to draw; default: a figure of its own.
    """
    if len(values) != len(layers):
        raise ValueError(f"{len(values)} values for {len(layers)} layers; give one for each")
    ax = axes(ax, (7, 2.6))
    for kind, colour in (("local", SKY), ("global", BLUE)):
        places = [i for i, spec in enumerate(layers) if spec.kind == kind]
        if places:
            ax.bar(places, [values[i] for i in places], color=colour, label=f"{kind} layer")
    ax.set(xlabel="layer", ylabel=label)
    ax.grid(visible=True, axis="y")
    number_layers(ax, len(layers))
    ax.legend()
    return ax


@styled
def plot_sensitivity(
    matrix: np.ndarray, fractions: Sequence[float], *, ax: "Axes | None" = None
) -> "Axes":
    """What it costs to narrow each layer alone: layers from left to right, widths downwards.

    Args:
      matrix: `[L, fractions]`, from `matformer.sensitivity`.
      fractions: Those that it was measured at.
      ax: Where to draw; default: a figure of its own.
    """
    count = len(fractions)
    matrix = with_columns(matrix, count, f"a matrix [L, {count}], a column for each fraction")
    ax = axes(ax, (7, 2.4))
    # White is no loss at all; what narrowing happens to improve is not worth a colour of its own.
    heat = ax.imshow(matrix.T, cmap="Reds", vmin=0, aspect="auto")
    ax.set(xlabel="layer", ylabel="width kept", yticks=range(len(fractions)))
    ax.set_yticklabels([f"{100 * fraction:g}%" for fraction in fractions])
    number_layers(ax, len(matrix))
    ax.figure.colorbar(heat, ax=ax, label="added loss\n(nats per token)")
    return ax


@styled
def plot_depths(found: "Sequence[Found]", *, ax: "Axes | None" = None) -> "Axes":
    """What was found in long texts: lengths from left to right, depths downwards.

    Args:
      found: Of tasks with one needle, from `evaluation.probing.probe`; the mean of each place.
      ax: Where to draw; default: a figure of its own.
    """
    if not found or any(one.depth is None for one in found):
        raise ValueError("expected questions whose needle has a depth")
    lengths, depths = (
        sorted({getattr(one, name) for one in found}) for name in ("length", "depth")
    )
    shares = np.zeros((len(depths), len(lengths)))
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            some = [one.accuracy for one in found if (one.depth, one.length) == (depth, length)]
            shares[row, column] = 100 * np.mean(some) if some else np.nan
    ax = axes(ax, (1.5 + 0.7 * len(lengths), 1 + 0.45 * len(depths)))
    heat = ax.imshow(shares, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    ax.set(xlabel="length (tokens)", ylabel="depth", xticks=range(len(lengths)))
    ax.set(xticklabels=[str(n) for n in lengths], yticks=range(len(depths)))
    ax.set_yticklabels([f"{100 * depth:g}%" for depth in depths])
    ax.figure.colorbar(heat, ax=ax, label="found (%)")
    return ax


@styled
def plot_slices(
    points: "Sequence[Point]",
    *,
    names: Sequence[str] = (),
    label: str | None = None,
    line: bool = True,
    ax: "Axes | None" = None,
) -> "Axes":
    """Loss of slices against their parameters; a line joins those that none smaller is as good as.

    Args:
      points: Slices that were measured, as from `matformer.search`, in any order.
      names: To write beside the points, in their order; `""` for none, or fewer names than points.
      label: What the points are, for the legend.
      line: Whether to draw the line; without it the points are diamonds.
      ax: Where to draw, for instance over other points; default: a figure of its own.
    """
    if not points:
        raise ValueError("no points given; give at least one")
    if len(names) > len(points):
        raise ValueError(f"{len(names)} names for {len(points)} points")
    ax = axes(ax, (6, 4))
    sizes, losses = zip(*[(point.parameters, point.loss) for point in points])
    dots = ax.scatter(sizes, losses, label=label, zorder=3 - line, marker="o" if line else "D")
    if line:
        best = _none_smaller_as_good(points)
        joined = [p.parameters for p in best], [p.loss for p in best]
        ax.plot(*joined, color=dots.get_facecolor()[0], marker="")
    # Below and to the left of the best there is nothing that a name could cover.
    where = {"xytext": (-6, -6), "textcoords": "offset points", "ha": "right", "va": "top"}
    for name, size, loss in zip(names, sizes, losses):
        ax.annotate(name, (size, loss), **where)
    ax.set(xlabel="effective parameters", ylabel="loss (nats per token)")
    ax.margins(0.1)
    ax.grid(visible=True)
    ax.xaxis.set_major_formatter(_short)
    if label is not None:
        ax.legend()
    return ax


def _none_smaller_as_good(points: "Sequence[Point]") -> "list[Point]":
    best = []
    for point in sorted(points, key=lambda point: (point.parameters, point.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def _short(parameters: float, _=None) -> str:
    """In billions, millions or thousands."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return f"{parameters:g}"
