"""Direct preference optimisation (DPO): of two answers, the better one is to become likelier.

    d = log p(answer) - log p_reference(answer), summed over the tokens of an answer
    x = beta (d_chosen - d_rejected)

    sigmoid    -log s(x)                                           Rafailov et al., 2023, eq. 7
    smoothed   -(1 - eps) log s(x) - eps log s(-x)                 conservative DPO, Mitchell, 2023
    robust     (-(1 - eps) log s(x) + eps log s(-x)) / (1 - 2 eps)    Chowdhury et al., 2024
    ipo        (d_chosen / n_chosen - d_rejected / n_rejected - 1 / (2 beta))^2    as trl has it
    ipo_sums   (d_chosen - d_rejected - 1 / (2 beta))^2            Azar et al., 2023, eq. 17

IPO is in use in two readings. The paper's is of log-probabilities of whole answers. trl divides
them by the numbers of tokens first, so its beta means something else, and long answers weigh less.

Local letters: E documents packed in a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.losses import counts_of, final_norm, targets_of, token_losses
from gemma_jax.decoder.model import Gemma
from gemma_jax.storages import one_of
from gemma_jax.training.model_pair import ModelPair, two_models
from gemma_jax.training.objectives import TrainBatch

KINDS = ("sigmoid", "smoothed", "robust", "ipo", "ipo_sums")
SMOOTHED = ("smoothed", "robust")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreferenceBatch:
    """Holds pairs of answers: rows 0 to N - 1 the chosen ones, N to 2 N - 1 the rejected ones.

    Attributes:
      rows: Row `i` and row `N + i` are a pair. The tokens of an answer are those whose
        `weights_BT` is not 0, each as much as it weighs; prompts weigh 0. A pair without any is
        left out, so a batch may be filled up with such. In packed rows, a document of row `i` and
        the one with the same number, of 0 to T, in row `N + i` are a pair.
      reference_logps_B: float32, what `completion_logps` of the reference is: log-probabilities of
        the answers, stored earlier. Of packed rows `[B, E]`, by number of the document.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> tokens = np.array([[2, 5, 7, 8], [2, 5, 9, 4]])
      >>> answers = np.array([[0, 0, 1, 1], [0, 0, 1, 1]], np.float32)
      >>> batch = gj.PreferenceBatch(gj.TrainBatch(tokens, weights_BT=answers))
    """

    rows: TrainBatch
    reference_logps_B: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pairs:
    """Holds what was found of each pair, `[N, E]`; `E` is 1 where rows are not packed.

    Attributes:
      losses: Of the objective.
      counts: 1 for a pair, 0 where there is none.
      logps_chosen, logps_rejected: Of the policy.
      rewards_chosen, rewards_rejected: `beta` times what they lie above those of the reference.
    """

    losses: jax.Array
    counts: jax.Array
    logps_chosen: jax.Array
    logps_rejected: jax.Array
    rewards_chosen: jax.Array
    rewards_rejected: jax.Array


def dpo(
    model: Gemma | ModelPair,
    batch: PreferenceBatch,
    key: jax.Array | None = None,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference: Callable[[Gemma], Gemma] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the mean loss of preference over pairs.

    There is one reference, out of three: a second model, in a `ModelPair` (see `pair_with`); the
    model itself, changed by `reference`, such as with its adapters off; or log-probabilities in the
    batch. No gradient goes through it.

    Args:
      kind: `sigmoid`, `smoothed`, `robust`, `ipo` (trl's, of means over tokens) or `ipo_sums` (the
        paper's); formulas stand at the top of this file.
      beta: How closely the policy is held to the reference.
      label_smoothing: The eps of `smoothed` and `robust`: the share of pairs that are the wrong way
        round; in [0, 0.5).
      reference: From the model to the reference.

    Returns:
      The loss; and `pairs`, over how many it is the mean, and of these the means `rewards_chosen`,
      `rewards_rejected`, `margins` (their difference), `accuracy` (the share whose margin is above
      0), `logps_chosen` and `logps_rejected`.

    Raises:
      ValueError: Unknown or impossible options, no reference or several, or an odd number of rows.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> model = gj.load_model("checkpoints/digits", modalities=("text",), layout="scan")
      >>> tokens = np.array([[2, 5, 7, 8], [2, 5, 9, 4]])
      >>> answers = np.array([[0, 0, 1, 1], [0, 0, 1, 1]], np.float32)
      >>> batch = gj.PreferenceBatch(gj.TrainBatch(tokens, weights_BT=answers))
      >>> loss, metrics = gj.dpo(gj.ModelPair(model, model), batch, beta=0.1)
      >>> print(f"{loss:.3f} of {metrics['pairs']:.0f} pair")  # the policy is the reference yet
      0.693 of 1 pair
    """
    pairs = preferences(
        model, batch, kind=kind, beta=beta, label_smoothing=label_smoothing, reference=reference
    )
    total = jnp.sum(pairs.counts)

    def mean(of_pairs: jax.Array) -> jax.Array:
        return jnp.sum(of_pairs * pairs.counts) / jnp.where(total == 0, 1, total)

    margins = pairs.rewards_chosen - pairs.rewards_rejected
    said = {
        "rewards_chosen": pairs.rewards_chosen,
        "rewards_rejected": pairs.rewards_rejected,
        "margins": margins,
        "accuracy": (margins > 0).astype(jnp.float32),
        "logps_chosen": pairs.logps_chosen,
        "logps_rejected": pairs.logps_rejected,
    }
    return mean(pairs.losses), {"pairs": total} | {name: mean(v) for name, v in said.items()}


def preferences(
    model: Gemma | ModelPair,
    batch: PreferenceBatch,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference: Callable[[Gemma], Gemma] | None = None,
) -> Pairs:
    """What `dpo` is the mean of."""
    check_dpo(kind=kind, beta=beta, label_smoothing=label_smoothing, reference=reference)
    given = batch.reference_logps_B is not None
    policy, other = two_models(model, reference, given, "reference")
    rows = TrainBatch.of(batch.rows)
    logps_BE, tokens_BE = completion_logps(policy, rows)
    if len(logps_BE) % 2:
        raise ValueError(f"{len(logps_BE)} rows are no pairs: N chosen ones, then N rejected ones")
    theirs_BE = (
        _stored(batch.reference_logps_B, logps_BE.shape)
        if other is None
        else completion_logps(other, rows)[0]
    )
    return compare(
        logps_BE, tokens_BE, theirs_BE, kind=kind, beta=beta, label_smoothing=label_smoothing
    )


def compare(
    logps_BE: jax.Array,
    tokens_BE: jax.Array,
    reference_logps_BE: jax.Array,
    *,
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
) -> Pairs:
    """What is found of pairs whose log-probabilities are known, of policy and reference."""
    above_BE = logps_BE - jax.lax.stop_gradient(reference_logps_BE)
    (chosen, rejected), (chosen_tokens, rejected_tokens) = (
        jnp.split(array_BE, 2) for array_BE in (above_BE, tokens_BE)
    )
    if kind == "ipo":
        x = chosen / jnp.maximum(chosen_tokens, 1) - rejected / jnp.maximum(rejected_tokens, 1)
    else:
        x = chosen - rejected
    logps_chosen, logps_rejected = jnp.split(logps_BE, 2)
    return Pairs(
        losses=_loss(kind, x, beta, label_smoothing),
        counts=((chosen_tokens > 0) | (rejected_tokens > 0)).astype(jnp.float32),
        logps_chosen=logps_chosen,
        logps_rejected=logps_rejected,
        rewards_chosen=beta * chosen,
        rewards_rejected=beta * rejected,
    )


def completion_logps(model: Gemma, rows: TrainBatch) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of what is weighted in each row (nats), and over how many tokens.

    Returns:
      float32 `[B, E]` twice: E is 1, or of packed rows T + 1, by number of the document. Logits of
      all tokens never exist at one time.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> model = gj.load_model("checkpoints/digits", modalities=("text",), layout="scan")
      >>> rows = gj.TrainBatch(np.array([[2, 5, 7]]), weights_BT=np.array([[0.0, 0.0, 1.0]]))
      >>> logps, tokens = gj.completion_logps(model, rows)
      >>> logps.shape, int(tokens[0, 0])
      ((1, 1), 1)
    """
    read = rows.read(model)
    targets_BT, weights_BT = targets_of(read, rows.targets_BT, rows.weights_BT)
    counts_BT = counts_of(model, targets_BT, weights_BT)
    x_BTD = final_norm(model, read)
    losses_BT = token_losses(model, x_BTD, targets_BT, weights_BT=counts_BT)
    return _by_document(read, -losses_BT), _by_document(read, counts_BT)


def check_dpo(
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference: Callable | None = None,
) -> None:
    """Raises `ValueError` for options that `dpo` does not have."""
    if kind not in KINDS:
        raise ValueError(f"{kind=} must be {one_of(KINDS)}")
    if not beta > 0:
        raise ValueError(f"{beta=} must be above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{label_smoothing=} must lie in [0, 0.5)")
    if label_smoothing and kind not in SMOOTHED:
        raise ValueError(
            f"{label_smoothing=} is not part of {kind=}; it is of {' and '.join(SMOOTHED)}"
        )
    if not (reference is None or callable(reference)):
        raise ValueError(f"{reference=} must be a function from a model to its reference")


def _loss(kind: str, x: jax.Array, beta: float, eps: float) -> jax.Array:
    """Of the differences between chosen and rejected ones."""
    if kind in ("ipo", "ipo_sums"):
        return jnp.square(x - 1 / (2 * beta))
    right, wrong = -jax.nn.log_sigmoid(beta * x), -jax.nn.log_sigmoid(-beta * x)
    if kind == "smoothed":
        return (1 - eps) * right + eps * wrong
    if kind == "robust":
        return ((1 - eps) * right - eps * wrong) / (1 - 2 * eps)
    return right


def _by_document(batch: Batch, array_BT: jax.Array) -> jax.Array:
    """Sums over each row, or over each document of each row."""
    if batch.documents_BT is None:
        return jnp.sum(array_BT, axis=1, keepdims=True)
    count = array_BT.shape[1] + 1
    return jax.vmap(lambda row_T, documents_T: jnp.zeros(count).at[documents_T].add(row_T))(
        array_BT, jnp.asarray(batch.documents_BT)
    )


def _stored(logps: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """What is stored of the reference, as `[B, E]`."""
    logps_BE = jnp.asarray(logps, jnp.float32)
    logps_BE = logps_BE[:, None] if logps_BE.ndim == 1 else logps_BE
    missing = shape[1] - logps_BE.shape[-1]
    if logps_BE.ndim != 2 or len(logps_BE) != shape[0] or missing < 0:
        raise ValueError(
            f"stored log-probabilities of shape {list(logps.shape)} for {shape[0]} rows; expected "
            f"[{shape[0]}], or [{shape[0]}, documents] of packed rows"
        )
    return jnp.pad(logps_BE, ((0, 0), (0, missing)))
