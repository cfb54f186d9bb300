"""Choosing the next token from logits."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Says how to choose tokens: greedily by default. Raises `ValueError` for impossible values.

    Applied in the order of transformers' logits processors: repetition penalty, temperature,
    top-k, top-p, min-p.

    Attributes:
      temperature: Logits are divided by it; 0 takes the most probable token.
      top_k: Keep the `k` most probable tokens; 0 keeps all.
      top_p: Keep the fewest tokens whose probabilities sum to at least `top_p`.
      min_p: Keep tokens at least `min_p` times as probable as the most probable one.
      repetition_penalty: Logits of tokens seen so far (prompt included) are divided by it if
        positive, multiplied if negative.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.Sampling(temperature=0.7, top_k=64, top_p=0.95).top_k
      64
      >>> gj.Sampling(top_p=2)
      Traceback (most recent call last):
      ValueError: top_p=2 must be above 0 and at most 1
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        checks = {
            "temperature": (0 <= self.temperature < float("inf"), "a finite number, 0 or more"),
            "top_k": (self.top_k >= 0 and self.top_k == int(self.top_k), "an integer, 0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (
                0 < self.repetition_penalty < float("inf"),
                "a finite number above 0",
            ),
        }
        for name, (fine, wanted) in checks.items():
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)} must be {wanted}")

    def program(self) -> "SamplingProgram":
        """The same, as an argument of a jitted function."""
        return SamplingProgram(
            temperature=float(self.temperature),
            top_p=float(self.top_p),
            min_p=float(self.min_p),
            repetition_penalty=float(self.repetition_penalty),
            greedy=self.temperature == 0,
            top_k=int(self.top_k),
            use_top_p=self.top_p < 1,
            use_min_p=self.min_p > 0,
            use_penalty=self.repetition_penalty != 1,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplingProgram:
    """`Sampling` split into values that may change freely and switches that cost a compilation."""

    temperature: float
    top_p: float
    min_p: float
    repetition_penalty: float
    greedy: bool = field(metadata={"static": True})
    top_k: int = field(metadata={"static": True})
    use_top_p: bool = field(metadata={"static": True})
    use_min_p: bool = field(metadata={"static": True})
    use_penalty: bool = field(metadata={"static": True})


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, seen_BV: jax.Array | None, how: SamplingProgram
) -> jax.Array:
    """One token id per row, int32 `[B]`.

    Every row has a key of its own, so what it draws does not depend on the rows beside it.
    `seen_BV` (bool) is needed for the repetition penalty only.
    """
    if how.use_penalty:
        penalised_BV = jnp.where(
            logits_BV > 0, logits_BV / how.repetition_penalty, logits_BV * how.repetition_penalty
        )
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    if how.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(lambda logits_V, key: _draw(logits_V / how.temperature, key, how))(
        logits_BV, keys_B
    )


def distribution(logits: jax.Array, how: SamplingProgram) -> jax.Array:
    """Log-probabilities that `sample` draws from, `[..., V]`; -inf for what the rules leave out.

    The repetition penalty is not among them. Greedy choice leaves the logits as they are.
    """
    if how.greedy:
        return logits

    def one(logits_V: jax.Array) -> jax.Array:
        kept, candidates = _rules(logits_V / how.temperature, how)
        return jax.nn.log_softmax(jnp.full_like(logits_V, -jnp.inf).at[candidates].set(kept))

    flat = jax.vmap(one)(logits.reshape(-1, logits.shape[-1]))
    return flat.reshape(logits.shape)


def _draw(logits_V: jax.Array, key: jax.Array, how: SamplingProgram) -> jax.Array:
    logits, candidates = _rules(logits_V, how)
    return candidates[jax.random.categorical(key, logits)].astype(jnp.int32)


def _rules(logits_V: jax.Array, how: SamplingProgram) -> tuple[jax.Array, jax.Array]:
    """Logits after top-k, top-p and min-p, and the tokens they belong to."""
    # Only top-k and top-p need the candidates in descending order.
    candidates = jnp.arange(logits_V.size, dtype=jnp.int32)
    if how.top_k or how.use_top_p:
        count = min(how.top_k or logits_V.size, logits_V.size)
        logits_V, candidates = jax.lax.top_k(logits_V, count)
    if how.use_top_p:
        probs_V = jax.nn.softmax(logits_V)
        before_V = jnp.cumsum(probs_V) - probs_V
        logits_V = jnp.where(before_V < how.top_p, logits_V, -jnp.inf)
    if how.use_min_p:
        floor = jnp.max(logits_V) + jnp.log(how.min_p)
        logits_V = jnp.where(logits_V >= floor, logits_V, -jnp.inf)
    return logits_V, candidates
