"""Plots of what goes on between a model's layers: predictions, parts, attention, patches.

In heat maps by layer and token the first layer lies below, as the stream runs upwards.

Local letters: X choices that are kept.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma_jax.text import Tokenizer
from gemma_jax.vision.images import Image
from gemma_jax.viz.style import COLOURS, RED, axes, number_layers, pyplot, styled, with_columns

if TYPE_CHECKING:
    import jax
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

    from gemma_jax.evaluation.logit_lens import LogitLens

LONGEST = 12  # characters of a token that are shown
VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


def token_labels(tok: Tokenizer, ids: "Sequence[int] | np.ndarray | jax.Array") -> list[str]:
    """Short texts of tokens for the axes of a plot: `␣` is a space, `↵` a new line.

    What the fonts of plots lack is written as `\\u4f60`, and what is long is cut.

    Args:
      ids: Token ids, as many labels come back.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> gj.viz.token_labels(tok, tok.encode("How many digits?", bos=True))
      ['<bos>', 'How', '␣many', '␣digits', '?']
    """
    return [_label(tok.decode([i])) for i in np.asarray(ids, np.int64).tolist()]


@styled
def plot_logit_lens(
    lens: "LogitLens",
    tok: Tokenizer,
    words: Sequence[str],
    *,
    row: int = 0,
    ax: "Axes | None" = None,
) -> "Axes":
    """What a model would say next after each layer: the likeliest token, and how likely it is.

    Args:
      lens: From `gemma_jax.logit_lens`.
      tok: For the texts of the tokens.
      words: The tokens that were read, for the places below; fewer than the lens has leave the
        last ones out (of a padded row).
      row: Which row of the batch.
      ax: Where to draw; default: a figure of its own.
    """
    ids_LBT = np.asarray(lens.ids_LBTX[..., 0])
    B, T = ids_LBT.shape[1:]
    if not -B <= row < B:
        raise ValueError(f"row={row} must lie in [-{B}, {B})")
    if not 1 <= len(words) <= T:
        raise ValueError(f"{len(words)} words for {T} tokens; give one for each, or for the first")
    ids_LT = ids_LBT[:, row, : len(words)]
    probs_LT = np.asarray(lens.probs_LBTX[:, row, : len(words), 0], np.float32)
    heat = _by_layer(probs_LT, words, ax, width=0.85, cmap="Blues", vmin=0, vmax=1)
    heat.axes.figure.colorbar(heat, ax=heat.axes, label="probability of the token", pad=0.01)
    for layer, ids in enumerate(ids_LT):
        for place, text in enumerate(token_labels(tok, ids)):
            colour = "white" if probs_LT[layer, place] > 0.55 else "black"
            middle = {"ha": "center", "va": "center", "clip_on": True}
            heat.axes.text(place, layer, text, color=colour, fontsize=7, parse_math=False, **middle)
    return heat.axes


@styled
def plot_patching(
    restored_LT: "np.ndarray | jax.Array",
    words: Sequence[str],
    *,
    label: str = "restored logit difference\n(1: as in the clean run)",
    ax: "Axes | None" = None,
) -> "Axes":
    """What a patch at each layer and token brings back; blue restores, red does the opposite.

    Args:
      restored_LT: float `[L, T]`: for each patched pass, which share of the difference between two
        runs it makes up for.
      words: The T tokens of the run that is patched.
      label: What the values are.
      ax: Where to draw; default: a figure of its own.
    """
    count = len(words)
    values = with_columns(restored_LT, count, f"values [L, {count}], a column for each token")
    largest = float(np.nanmax(np.abs(values))) or 1.0
    heat = _by_layer(values, words, ax, width=0.5, cmap="RdBu", vmin=-largest, vmax=largest)
    heat.axes.figure.colorbar(heat, ax=heat.axes, label=label, pad=0.01)
    return heat.axes


@styled
def plot_contributions(
    parts: "Mapping[str, np.ndarray | jax.Array]",
    *,
    label: str = "added to the logit",
    ax: "Axes | None" = None,
) -> "Axes":
    """What each part of each layer adds: bars side by side, of a colour for each part.

    Args:
      parts: By name, one value for each layer, `[L]`, or a single one for what comes before the
        layers. Batches that hold one row may keep that axis.
      label: What the values are.
      ax: Where to draw; default: a figure of its own.
    """
    values = {name: np.asarray(part, np.float32) for name, part in parts.items()}
    values = {n: v[..., 0] if v.ndim and v.shape[-1] == 1 else v for n, v in values.items()}
    layers = {len(v) for v in values.values() if v.ndim == 1}
    if len(layers) != 1 or any(v.ndim > 1 for v in values.values()):
        shapes = {name: list(np.shape(part)) for name, part in parts.items()}
        raise ValueError(f"expected parts [L], or single values, of one row; got shapes {shapes}")
    (L,) = layers
    ax = axes(ax, (max(5.0, 2 + 0.3 * L), 3))
    by_layer = [name for name, v in values.items() if v.ndim]
    width = 0.8 / len(by_layer)
    before = 0
    for (name, v), colour in zip(values.items(), COLOURS * len(values)):
        if v.ndim:
            offset = (by_layer.index(name) - (len(by_layer) - 1) / 2) * width
            ax.bar(np.arange(L) + offset, v, width, color=colour, label=name)
        else:
            before += 1
            ax.bar(-before, float(v), 0.8, color=colour, label=name)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="layer", ylabel=label)
    number_layers(ax, L)
    ax.grid(visible=True, axis="y")
    ax.legend(ncols=len(values), loc="lower right", bbox_to_anchor=(1, 1))  # above, on no bar
    return ax


@styled
def plot_attention(
    weights_TS: "np.ndarray | jax.Array",
    words: Sequence[str],
    *,
    queries: Sequence[str] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Where each token of a text looks, in one head: a row for each token that looks.

    Args:
      weights_TS: float `[T, S]`: of `forward`'s `attention_weights`, one layer, row and head (or a
        mean over some).
      words: The S tokens that are looked at.
      queries: The T tokens that look; default: `words`.
      ax: Where to draw; default: a figure of its own.
    """
    weights = np.asarray(weights_TS, np.float32)
    queries = words if queries is None else queries
    if weights.shape != (len(queries), len(words)) or not weights.size:
        raise ValueError(
            f"expected weights [{len(queries)}, {len(words)}], a row for each token that looks; "
            f"got shape {list(weights.shape)}"
        )
    ax = axes(ax, (2 + 0.3 * len(words), 1 + 0.3 * len(queries)))
    heat = ax.imshow(weights, cmap="Blues", vmin=0, aspect="auto")
    _name_tokens(ax, words)
    ax.set(xlabel="token looked at", ylabel="token that looks", yticks=range(len(queries)))
    _write(ax.set_yticklabels(queries))
    ax.figure.colorbar(heat, ax=ax, label="attention weight")
    return ax


@styled
def plot_image_attention(
    image, weights: "np.ndarray | jax.Array", *, ax: "Axes | None" = None
) -> "Axes":
    """An image, and over each part how much attention its soft token gets.

    Args:
      image: The image, or the crop, that the weights belong to.
      weights: `[rows, columns]` of soft tokens, not negative, as from `image_attention`.
      ax: Where to draw; default: a figure of its own.
    """
    grid = soft_token_grid(weights)
    picture = Image(image).to_pil()
    ax = axes(ax, (4.4, 0.4 + 3.6 * min(picture.height / picture.width, 3)))
    ax.imshow(picture, interpolation="nearest")
    extent = (-0.5, picture.width - 0.5, picture.height - 0.5, -0.5)
    from matplotlib.colors import LinearSegmentedColormap

    red = [channel / 255 for channel in RED]
    veil = LinearSegmentedColormap.from_list("veil", [(*red, 0.0), (*red, 0.8)])
    top = float(grid.max()) or 1.0
    options = {"vmin": 0, "vmax": top, "extent": extent, "interpolation": "nearest"}
    heat = ax.imshow(grid, cmap=veil, **options)
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    label = f"attention to each soft token\n({100 * grid.sum():.0f}% in all)"
    ax.figure.colorbar(heat, ax=ax, label=label)
    return ax


def soft_token_grid(weights: "np.ndarray | jax.Array") -> np.ndarray:
    """Attention weights `[rows, columns]` in float32; refuses what cannot be such."""
    grid = np.asarray(weights, np.float32)
    if grid.ndim != 2 or not grid.size or not (np.isfinite(grid) & (grid >= 0)).all():
        raise ValueError(
            f"expected finite weights [rows, columns], none negative; got shape {list(grid.shape)}"
            + (f" with values from {grid.min():g} to {grid.max():g}" if grid.size else "")
        )
    return grid


def _by_layer(
    values_LT: np.ndarray, words: Sequence[str], ax: "Axes | None", *, width: float, **options
) -> "AxesImage":
    """A heat map with layers upwards and tokens to the right; a token is so many inches wide."""
    L, T = values_LT.shape
    ax = axes(ax, (2 + width * T, 1.2 + 0.21 * L))
    heat = ax.imshow(values_LT, origin="lower", aspect="auto", **options)
    _name_tokens(ax, words)
    ax.set(xlabel="token", ylabel="layer", yticks=range(0, L, 1 + L // 32))
    return heat


def _name_tokens(ax: "Axes", words: Sequence[str]) -> None:
    ax.set_xticks(range(len(words)))
    _write(ax.set_xticklabels(words, rotation=60, ha="right", rotation_mode="anchor"))


def _write(labels) -> None:
    """Texts as they are: `$` is no formula."""
    for label in labels:
        label.set_parse_math(False)


def _label(text: str) -> str:
    known, label = _glyphs(), ""
    for c in text.translate(VISIBLE):
        c = c if ord(c) in known else c.encode("ascii", "backslashreplace").decode()
        if len(label + c) > LONGEST:
            return f"{label[: LONGEST - 1]}…" if len(c) == 1 else f"{label}…"
        label += c
    return label


def _glyphs() -> frozenset[int]:
    """Characters of the font that comes with matplotlib."""
    pyplot()
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())
