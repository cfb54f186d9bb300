"""Distillation: a student learns what a teacher expects next, not only what did come.

    p = softmax(teacher / temperature), q = softmax(student / temperature)

    forward_kl  sum p (log p - log q)    covers all that the teacher finds possible
    reverse_kl  sum q (log q - log p)    keeps to what the teacher finds likely
    jsd         (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2

Of a top-k teacher only the k likeliest tokens S of each place count, or are stored. There are three
readings of what becomes of the rest:

    tail          one event more, "any other token", with what is left of p and of q
    renormalised  p and q are made to sum up to one over S: what q gives to others costs nothing
    full          p is, q is not: what q gives to others is a loss, also where p gives it as much

With the last, q = p is not the minimum; with the one before, it is one of many. With a tail it is
the minimum, and a divergence is never larger than that over all tokens.

Hinton et al., 2015; Agarwal et al., 2024 (GKD). Losses are not multiplied by the squared
temperature.

Local letters: I items that soft tokens come in; J tokens that a teacher finds likeliest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.losses import counts_of, targets_of, token_losses
from gemma_jax.decoder.model import Gemma
from gemma_jax.training.divergence import Divergence, Hidden, TopTokens, token_divergences
from gemma_jax.training.model_pair import ModelPair, two_models
from gemma_jax.training.objectives import TrainBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DistillBatch:
    """Holds a batch, and what a teacher said of it earlier.

    Attributes:
      rows: As of `next_token`: the places that count are those whose next token does.
      top_ids_BTJ: int32; the likeliest tokens after each place, each once, in any order.
      top_logps_BTJ: float32; their log-probabilities over the whole vocabulary, at temperature 1.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> ids = np.array([[[5, 9], [7, 4], [1, 3]]])
      >>> batch = gj.DistillBatch(np.array([[2, 5, 7]]), ids, np.log(np.full(ids.shape, 0.4)))
    """

    rows: TrainBatch | Batch | jax.Array
    top_ids_BTJ: jax.Array
    top_logps_BTJ: jax.Array


def distill(
    model: Gemma | ModelPair,
    batch: DistillBatch | TrainBatch | Batch | jax.Array,
    key: jax.Array | None = None,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    top_k: int | None = None,
    form: str | None = None,
    alpha: float = 1.0,
    teacher: Callable[[Gemma], Gemma] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the mean divergence of a student from its teacher, over the places that count.

    There is one teacher, out of three: a second model of any shape with the same vocabulary, in a
    `ModelPair` (see `pair_with`); the model itself, changed by `teacher`; or its likeliest tokens,
    in the batch. No gradient goes through it.

    Args:
      kind: `forward_kl`, `reverse_kl` or `jsd`; formulas stand at the top of this file.
      temperature: Divides the logits of both.
      top_k: So many of the teacher's tokens count at each place; default: all, or all stored ones.
      form: Of the top-k teacher: `tail` (default), `renormalised` or `full`, the last of which only
        the forward KL has.
      alpha: Share of the divergence in the loss; the rest is the cross-entropy of the labels.
      teacher: From the model to the teacher.

    Returns:
      The loss; `tokens`, over how many it is the mean, each as much as it weighs; `divergence`; and
      `cross_entropy` where `alpha` is below 1.

    Raises:
      ValueError: Unknown or impossible options, no teacher or several, or another vocabulary.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> teacher, tok = gj.load("checkpoints/digits", modalities=("text",), layout="scan")
      >>> student = gj.fake_quantise(teacher, "int4:32")
      >>> tokens = np.array([tok.encode("Which digit is left?", bos=True)])
      >>> loss, metrics = gj.distill(gj.ModelPair(student, teacher), tokens, top_k=8)
      >>> loss > 0, int(metrics["tokens"])
      (Array(True, dtype=bool), 5)
    """
    check_distill(
        kind=kind, temperature=temperature, top_k=top_k, form=form, alpha=alpha, teacher=teacher
    )
    stored = isinstance(batch, DistillBatch)
    student, other = two_models(model, teacher, stored, "teacher")
    rows = TrainBatch.of(batch.rows if isinstance(batch, DistillBatch) else batch)
    read = rows.read(student)
    targets_BT, weights_BT = targets_of(read, rows.targets_BT, rows.weights_BT)
    counts_BT = counts_of(student, targets_BT, weights_BT)
    hidden = Hidden.of(student, read)
    said = (
        TopTokens(batch.top_ids_BTJ, batch.top_logps_BTJ)
        if isinstance(batch, DistillBatch)
        else Hidden.of(other, _for_teacher(rows, student, other))
    )
    rule = Divergence(kind, temperature, top_k, form)
    total = jnp.sum(counts_BT)
    safe = jnp.where(total == 0, 1, total)
    divergence = jnp.sum(token_divergences(hidden, said, rule) * counts_BT) / safe
    metrics = {"tokens": total, "divergence": divergence}
    if alpha == 1:
        return divergence, metrics
    losses_BT = token_losses(student, hidden.x_BTD, targets_BT, weights_BT=counts_BT)
    metrics["cross_entropy"] = jnp.sum(losses_BT) / safe
    return alpha * divergence + (1 - alpha) * metrics["cross_entropy"], metrics


def check_distill(
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    top_k: int | None = None,
    form: str | None = None,
    alpha: float = 1.0,
    teacher: Callable | None = None,
) -> None:
    """Raises `ValueError` for options that `distill` does not have."""
    Divergence(kind, temperature, top_k, form)
    if not 0 <= alpha <= 1:
        raise ValueError(f"{alpha=} must lie in [0, 1]: it is the share of the divergence")
    if not (teacher is None or callable(teacher)):
        raise ValueError(f"{teacher=} must be a function from a model to its teacher")


def _for_teacher(rows: TrainBatch, student: Gemma, teacher: Gemma) -> Batch:
    """What the teacher reads: media by its own towers, with all of its channels."""
    read = rows.read(teacher)
    width = teacher.cfg.d_model
    if read.soft is not None and read.soft.embeddings_ITD.shape[-1] != width:
        raise ValueError(
            f"soft tokens of width {student.cfg.d_model} are the student's; the teacher's are of "
            f"width {width}: give the batch media, which each model reads for itself"
        )
    return replace(read, ffn_widths_L=None)
