"""Which drafts a model keeps: the check of speculative decoding.

Algorithm 1 of Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023:
text that was drafted and checked is distributed as the model's own; greedy text is the model's.

Or text is the very one that it would be without drafts: `agree` draws each token as it is drawn
without, and keeps the drafts that are the same. Of a draft that the host looked up this keeps as
many; of drafts that were drawn, nearly as many where both draws use the same random numbers (Daliri
et al., "Coupling without Communication and Drafter-Invariant Speculative Decoding", 2024).

Local letters: X drafts of one pass, T = X + 1 tokens of which one is the model's own.
"""

import jax
import jax.numpy as jnp

from gemma_jax.inference.sampling import SamplingRows, best, distribution, penalised, sample


def verify(
    logits_BTV: jax.Array,
    drafts_BX: jax.Array,
    log_q_BXV: jax.Array,
    keys_B: jax.Array,
    start_B: jax.Array,
    sampling: SamplingRows,
) -> tuple[jax.Array, jax.Array]:
    """Chooses how many drafts are kept, and the model's own token after them.

    Args:
      logits_BTV: The model's, before each draft and after the last; -inf for illegal tokens.
      drafts_BX: int32.
      log_q_BXV: Log-probabilities that the drafts were drawn from.
      keys_B: One random key per row.
      start_B: Position of the token before the first draft.

    Returns:
      `[B, T]` tokens of which the first `kept + 1` are chosen, and `kept_B`.
    """
    X = drafts_BX.shape[1]
    if sampling.greedy == "all":
        best_BT = best(logits_BTV)
        return best_BT, _leading(drafts_BX == best_BT[:, :X])
    log_p_BTV = distribution(logits_BTV, sampling)

    def of_draft(log_BXV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(log_BXV, drafts_BX[..., None], axis=-1)[..., 0]

    uniform_BX = jnp.stack(
        [jax.vmap(jax.random.uniform)(draft_keys(keys_B, start_B + x, 1)) for x in range(X)],
        axis=1,
    )
    kept_B = _leading(jnp.log(uniform_BX) < of_draft(log_p_BTV[:, :X]) - of_draft(log_q_BXV))
    # The first draft that is not kept is replaced out of what it was proposed too seldom for.
    at_B11 = kept_B[:, None, None]
    p_BV = jnp.exp(jnp.take_along_axis(log_p_BTV, at_B11, axis=1)[:, 0])
    # After the last draft nothing was proposed.
    q_BXV = jnp.pad(jnp.exp(log_q_BXV), ((0, 0), (0, 1), (0, 0)))
    q_BV = jnp.take_along_axis(q_BXV, at_B11, axis=1)[:, 0]
    rest_BV = jnp.maximum(p_BV - q_BV, 0)
    # Rounding may leave nothing where the two agree.
    rest_BV = jnp.where(jnp.sum(rest_BV, axis=1, keepdims=True) > 0, rest_BV, p_BV)
    own_B = draw(draft_keys(keys_B, start_B + kept_B, 2), jnp.log(rest_BV), sampling)
    drafts_BT = jnp.pad(drafts_BX, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(X + 1) == kept_B[:, None], own_B[:, None], drafts_BT), kept_B


def agree(
    logits_BTV: jax.Array,
    drafts_BX: jax.Array,
    count_B: jax.Array | None,
    keys_B: jax.Array,
    start_B: jax.Array,
    sampling: SamplingRows,
) -> tuple[jax.Array, jax.Array]:
    """Draws the model's token at each place, and keeps the drafts that are the same.

    Args:
      logits_BTV: As for `verify`, after all processors and penalties.
      drafts_BX: int32.
      count_B: How many drafts of a row there are; `None`: all.
      keys_B: One random key per row.
      start_B: Position of the token before the first draft.

    Returns:
      As `verify`.
    """
    B, T, _ = logits_BTV.shape
    position_BT = start_B[:, None] + 1 + jnp.arange(T)
    keys_BT = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(keys_B, position_BT)
    rows = jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a), T, axis=0), sampling)
    own_BT = sample(logits_BTV.reshape(B * T, -1), keys_BT.reshape(-1), rows).reshape(B, T)
    same_BX = drafts_BX == own_BT[:, :-1]
    if count_B is not None:
        same_BX &= jnp.arange(T - 1) < count_B[:, None]
    return own_BT, _leading(same_BX)


def penalised_drafts(
    logits_BTV: jax.Array,
    drafts_BX: jax.Array,
    seen_BV: jax.Array | None,
    rows: SamplingRows,
    counts_BV: jax.Array | None,
) -> jax.Array:
    """`penalised` before each draft and after the last: each knows the drafts before it."""
    if not (rows.penalty or rows.counts):
        return logits_BTV
    rows_B, steps = jnp.arange(len(drafts_BX)), []
    for t in range(drafts_BX.shape[1] + 1):
        if t and seen_BV is not None:
            seen_BV = seen_BV.at[rows_B, drafts_BX[:, t - 1]].set(True)
        if t and counts_BV is not None:
            counts_BV = counts_BV.at[rows_B, drafts_BX[:, t - 1]].add(1)
        steps.append(penalised(logits_BTV[:, t], seen_BV, rows, counts_BV))
    return jnp.stack(steps, axis=1)


def draft_keys(keys_B: jax.Array, position_B: jax.Array, use: int) -> jax.Array:
    """Random keys for the token after `position`, one kind for each of their uses."""
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, position_B)
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, use)


def draw(keys_B: jax.Array, log_p_BV: jax.Array, sampling: SamplingRows) -> jax.Array:
    """Draws a token per row from a `distribution`, int32 `[B]`."""
    if sampling.greedy == "all":
        return best(log_p_BV)
    return jax.vmap(jax.random.categorical)(keys_B, log_p_BV).astype(jnp.int32)


def _leading(true_BX: jax.Array) -> jax.Array:
    """How many are true before the first that is not."""
    return jnp.sum(jnp.cumprod(true_BX.astype(jnp.int32), axis=1), axis=1)
