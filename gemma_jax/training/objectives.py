"""What a step can lower: functions `(model, batch, key) -> (loss, metrics)`.

Options of one are given by `functools.partial`. Where a loss is a mean over tokens, its metrics say
over how many (`tokens`), so that the means of several batches can be weighted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.losses import counts_of, loss_and_weight, targets_of, token_losses
from gemma_jax.decoder.model import Gemma
from gemma_jax.matformer.slicing import at
from gemma_jax.matformer.submodel import Slice
from gemma_jax.multimodal.media import Media
from gemma_jax.training.divergence import Divergence, Hidden, token_divergences


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainBatch:
    """Holds the inputs of a pass, and what is to be said of them.

    Attributes:
      batch: What the model reads.
      targets_BT: int32; see `loss`.
      weights_BT: float32; see `loss`.
      media: Images and sounds, for towers to read in every step: so these may be trained, too.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> tokens = np.array([[2, 5, 7]])
      >>> answer = gj.TrainBatch(tokens, weights_BT=np.array([[0.0, 0.0, 1.0]]))
      >>> answer.weights_BT.shape
      (1, 3)
    """

    batch: Batch | jax.Array
    targets_BT: jax.Array | None = None
    weights_BT: jax.Array | None = None
    media: Media | None = None

    @classmethod
    def of(cls, batch: "TrainBatch | Batch | jax.Array") -> "TrainBatch":
        """A batch as it is, its inputs in full; anything else as one whose tokens all count."""
        batch = batch if isinstance(batch, TrainBatch) else cls(batch)
        return replace(batch, batch=Batch.of(batch.batch))

    def read(self, model: Gemma) -> Batch:
        """What the decoder of `model` reads: soft tokens in their places, as its towers make them.

        Every objective reads its batches so.

        Raises:
          ValueError: There are soft tokens already beside the media, or the model has no encoder
            for them.
        """
        batch = Batch.of(self.batch)
        if self.media is None:
            return batch
        if batch.soft is not None:
            raise ValueError("the batch has soft tokens already: leave out these or its media")
        return replace(batch, soft=self.media.soft(model))


def next_token(
    model: Gemma,
    batch: TrainBatch | Batch | jax.Array,
    key: jax.Array | None = None,
    *,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the mean cross-entropy of the next token; see `loss`.

    Returns:
      The loss, and `tokens`: how many targets count, each as much as it weighs.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> model, tok = gj.load("checkpoints/digits", modalities=("text",), layout="scan")
      >>> tokens = np.array([tok.encode("Which digit is left?", bos=True)])
      >>> loss, metrics = gj.next_token(model, tokens)
      >>> print(f"{loss:.2f} over {metrics['tokens']:.0f} tokens")
      6.74 over 5 tokens
    """
    batch = TrainBatch.of(batch)
    value, tokens = loss_and_weight(
        model,
        batch.read(model),
        targets_BT=batch.targets_BT,
        weights_BT=batch.weights_BT,
        z_loss=z_loss,
    )
    return value, {"tokens": tokens}


def elastic(
    model: Gemma,
    batch: TrainBatch | Batch | jax.Array,
    key: jax.Array | None = None,
    *,
    submodels: Sequence[Slice] = (),
    widths: tuple[int, ...] = (),
    same_width: bool = False,
    alpha: float = 0.0,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the mean of the losses of a MatFormer and of models inside it, on the same tokens.

    Devvrit et al., 2023. The models: the whole; each of `submodels`; and one of other feed-forward
    widths in every step, in one program: drawn from `widths`, or the batch's `ffn_widths_L`.

    Args:
      submodels: Need an unrolled model; see `matformer.at`.
      widths: To draw from with the step's key, for each layer by itself.
      same_width: Draw one width for all layers.
      alpha: Share of the divergence from the whole in the loss of each model inside it; the rest is
        the cross-entropy of the labels. No gradient goes to the whole through it.
      kind, temperature: Of this divergence; see `distill`.
      z_loss: Of all cross-entropies; see `loss`.

    Returns:
      The loss; the cross-entropies `whole`, `slice_0` and so on, and `narrow`; with `alpha`, the
      divergences `slice_0_divergence` and so on; `mean_width` of what was drawn; and `tokens`. With
      `alpha=1` there are no cross-entropies but that of the whole.

    Raises:
      ValueError: Unknown or impossible options, or widths from two sides or without a key.

    Examples:
      >>> import gemma_jax as gj
      >>> import jax
      >>> import numpy as np
      >>> from gemma_jax import matformer
      >>> model, tok = gj.load("checkpoints/elastic")
      >>> tokens = np.array([tok.encode("The tuple is a list that", bos=True)])
      >>> half = matformer.Slice(ffn_widths=(128,) * 10)
      >>> loss, metrics = gj.elastic(model, tokens, submodels=(half,))
      >>> sorted(metrics)
      ['slice_0', 'tokens', 'whole']
      >>> drawn, metrics = gj.elastic(model, tokens, jax.random.key(0), widths=(64, 128, 256))
      >>> sorted(metrics)
      ['mean_width', 'narrow', 'tokens', 'whole']
    """
    check_elastic(widths=widths, alpha=alpha, kind=kind, temperature=temperature)
    batch = TrainBatch.of(batch)
    read = batch.read(model)  # towers belong to the whole: all models inside see the same
    plain, metrics = replace(read, ffn_widths_L=None), {}
    inside = {f"slice_{i}": (at(model, submodel), plain) for i, submodel in enumerate(submodels)}
    if widths:
        read = replace(read, ffn_widths_L=_drawn(model, read, key, widths, same_width))
        metrics["mean_width"] = jnp.mean(jnp.asarray(read.ffn_widths_L, jnp.float32))
    if read.ffn_widths_L is not None:
        inside["narrow"] = (model, read)
    targets_BT, weights_BT = targets_of(plain, batch.targets_BT, batch.weights_BT)
    counts_BT = counts_of(model, targets_BT, weights_BT)
    total = jnp.sum(counts_BT)

    def entropy(part: Gemma, x_BTD: jax.Array) -> jax.Array:
        return _mean(
            token_losses(part, x_BTD, targets_BT, weights_BT=counts_BT, z_loss=z_loss), total
        )

    whole, rule = Hidden.of(model, plain), Divergence(kind, temperature)
    losses = [entropy(model, whole.x_BTD)]
    for name, (part, rows) in inside.items():
        hidden, said = Hidden.of(part, rows), {}
        if alpha < 1:
            said[name] = entropy(part, hidden.x_BTD)
        if alpha > 0:
            apart_BT = token_divergences(hidden, whole, rule) * counts_BT
            said[f"{name}_divergence"] = _mean(apart_BT, total)
        shares = [share for share in (1 - alpha, alpha) if share > 0]
        losses.append(jnp.asarray(sum(share * v for share, v in zip(shares, said.values()))))
        metrics |= said
    return sum(losses[1:], losses[0]) / len(losses), metrics | {"whole": losses[0], "tokens": total}


def _mean(losses_BT: jax.Array, total: jax.Array) -> jax.Array:
    return jnp.sum(losses_BT) / jnp.where(total == 0, 1, total)


def check_elastic(
    *,
    widths: tuple[int, ...] = (),
    alpha: float = 0.0,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    **others: object,
) -> None:
    """Raises `ValueError` for options that `elastic` does not have."""
    Divergence(kind, temperature)
    if not 0 <= alpha <= 1:
        raise ValueError(f"{alpha=} must lie in [0, 1]: it is the share of the divergence")
    if not all(isinstance(width, int) and width >= 1 for width in widths):
        raise ValueError(f"widths={list(widths)} must be whole numbers of channels, at least 1")


def _drawn(
    model: Gemma, read: Batch, key: jax.Array | None, widths: tuple[int, ...], same: bool
) -> jax.Array:
    """Widths of all layers, int32 `[L]`."""
    layers, least = len(model.cfg.layers), min(spec.d_ff for spec in model.cfg.layers)
    if read.ffn_widths_L is not None:
        raise ValueError("the batch has ffn_widths_L already: leave out these or widths")
    if key is None:
        raise ValueError("widths are drawn with a key; give one, as make_step does")
    if max(widths) > least:
        raise ValueError(f"width {max(widths)} is more than the {least} channels of a layer")
    drawn = jax.random.choice(key, jnp.array(widths, jnp.int32), () if same else (layers,))
    return jnp.broadcast_to(drawn, layers)
