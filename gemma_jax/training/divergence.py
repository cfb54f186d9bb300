"""How far what a student expects next lies from what a teacher does, token by token, in blocks.

    for each block of tokens    logits [B, block, V] of both  ->  divergence [B, block]

so the logits of all tokens never exist at one time. The backward pass computes those of each block
again, and sums the gradient of the student's table in float32, whatever the table is.

Blocks are cut from the tokens and not from the vocabulary, as those of the cross-entropy are: what
a teacher finds likely (its top) is known once all logits of a token are.

Local letters: E events that probabilities are compared of; J tokens that a teacher finds likeliest.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.losses import final_norm
from gemma_jax.decoder.model import Gemma
from gemma_jax.storages import one_of
from gemma_jax.weights.contract import contract
from gemma_jax.weights.protocol import StandIn, Weight, head_rows
from gemma_kernels.platform import target_platform
from gemma_kernels.quantized_matmul import QuantizedMatrix

KINDS = ("forward_kl", "reverse_kl", "jsd")
FORMS = ("tail", "renormalised", "full")
BLOCK_BYTES = 512 << 20  # of the student's logits of a block
CPU_BLOCK_BYTES = 128 << 20
LEAST_TAIL = 2.0**-24  # of stored probabilities, whose sum is rounded


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hidden:
    """Holds what logits are made of.

    Attributes:
      x_BTD: Activations in front of the head.
      table: The head: `[V, D]`, an array or what stands in its place.
      soft_cap: On the logits; `None` for none.
    """

    x_BTD: jax.Array
    table: Weight
    soft_cap: float | None = field(default=None, metadata={"static": True})

    @classmethod
    def of(cls, model: Gemma, batch: Batch) -> "Hidden":
        """What a model makes of a batch."""
        table = model.embed.output.get_value()
        rows = head_rows(table)
        # What is quantised is multiplied as it is; of anything else there is an array to learn.
        table = table if isinstance(rows, QuantizedMatrix) else rows
        return cls(final_norm(model, batch), table, model.soft_cap)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopTokens:
    """Holds what a teacher found likeliest to follow each token.

    Attributes:
      ids_BTJ: int32, each once.
      logps_BTJ: float32; their log-probabilities over the whole vocabulary, at temperature 1.
    """

    ids_BTJ: jax.Array
    logps_BTJ: jax.Array


@dataclass(frozen=True)
class Divergence:
    """Says what is compared, and how; see `distill`."""

    kind: str = "forward_kl"
    temperature: float = 1.0
    top_k: int | None = None
    form: str | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be {one_of(KINDS)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} must be above 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k!r} must be at least 1, or left out for all tokens")
        if self.form is not None and self.form not in FORMS:
            raise ValueError(f"form={self.form!r} must be {one_of(FORMS)}")
        if self.form == "full" and self.kind != "forward_kl":
            raise ValueError(
                f"kind={self.kind!r} of form='full' is not finite: the teacher gives no "
                "probability to what the student does; use form='tail' or 'renormalised'"
            )

    def check_top(self, stored: bool, size: int | None, vocab_size: int) -> None:
        """Raises `ValueError` if there is no such top among the tokens of a vocabulary.

        Args:
          stored: Whether it is stored; then `size` is how many tokens of it are.
        """
        if stored and self.top_k not in (None, size):
            raise ValueError(f"top_k={self.top_k} of {size} tokens that are stored; leave it out")
        if stored and self.form in (None, "tail") and self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature} changes what is left for the tail, which stored "
                "log-probabilities do not say: use 1, another form, or the teacher itself"
            )
        size = size if stored else self.top_k
        if size is None and self.form is not None:
            raise ValueError(f"form={self.form!r} is of a top-k teacher: give top_k, too")
        most = vocab_size if self.form in ("renormalised", "full") else vocab_size - 1
        if size is not None and size > most:
            raise ValueError(f"top_k={size} must be at most {most}, of {vocab_size} tokens")


def token_divergences(
    student: Hidden,
    teacher: Hidden | TopTokens,
    divergence: Divergence = Divergence(),
    *,
    block: int | None = None,
) -> jax.Array:
    """Computes the divergence of each token, in nats; differentiable in the student.

    Args:
      teacher: Is not differentiated.
      block: Tokens of each row whose logits exist at one time; `None` chooses.

    Returns:
      float32 `[B, T]`.

    Raises:
      ValueError: Two vocabularies, or a top that does not fit them.
    """
    (B, T, _), V = student.x_BTD.shape, student.table.shape[0]
    stored = isinstance(teacher, TopTokens)
    divergence.check_top(stored, teacher.ids_BTJ.shape[-1] if stored else None, V)
    if not stored and teacher.table.shape[0] != V:
        raise ValueError(
            f"the teacher says one of {teacher.table.shape[0]} tokens, the student one of {V}; "
            "distillation needs one vocabulary"
        )
    most = CPU_BLOCK_BYTES if target_platform() == "cpu" else BLOCK_BYTES
    size = min(block or max(most // (4 * B * V), 1), T)
    if stored:
        rows, table, cap = (teacher.ids_BTJ, teacher.logps_BTJ), None, None
    else:
        rows, table, cap = (teacher.x_BTD,), teacher.table, teacher.soft_cap
    rule = _Rule(divergence, student.soft_cap, cap)
    with jax.named_scope("divergence"):
        rows, table = lax.stop_gradient((rows, table))
        return _in_blocks(rule, size, student.x_BTD, student.table, rows, table)


@dataclass(frozen=True)
class _Rule:
    """From logits of the student and rows of the teacher, of the same tokens, to divergences."""

    divergence: Divergence
    cap: float | None
    teacher_cap: float | None

    def __call__(self, logits_BTV: jax.Array, rows: tuple, table: Weight | None) -> jax.Array:
        of = self.divergence
        z_BTV = _capped(logits_BTV, self.cap) / of.temperature
        if table is None:
            ids_BTJ, logps_BTJ = rows
            top_BTJ = logps_BTJ.astype(jnp.float32) / of.temperature
            rest_BT = jnp.log(jnp.maximum(1 - jnp.sum(jnp.exp(top_BTJ), -1), LEAST_TAIL))
        else:
            teacher_BTV = _capped(_logits(rows[0], table), self.teacher_cap) / of.temperature
            logp_BTV = jax.nn.log_softmax(teacher_BTV)
            if of.top_k is None:
                return _divergence(of.kind, logp_BTV, jax.nn.log_softmax(z_BTV))
            top_BTJ, ids_BTJ = lax.top_k(logp_BTV, of.top_k)
            rest_BT = _outside(logp_BTV, ids_BTJ)
        chosen_BTJ = jnp.take_along_axis(z_BTV, ids_BTJ, axis=-1)
        if of.form == "renormalised":
            logq_BTJ = jax.nn.log_softmax(chosen_BTJ)
            return _divergence(of.kind, jax.nn.log_softmax(top_BTJ), logq_BTJ)
        lse_BT1 = jax.nn.logsumexp(z_BTV, axis=-1, keepdims=True)
        if of.form == "full":
            return _divergence(of.kind, jax.nn.log_softmax(top_BTJ), chosen_BTJ - lse_BT1)
        logp_BTE = jnp.concatenate([top_BTJ, rest_BT[..., None]], axis=-1)
        z_BTE = jnp.concatenate([chosen_BTJ, _outside(z_BTV, ids_BTJ)[..., None]], axis=-1)
        return _divergence(of.kind, logp_BTE, z_BTE - lse_BT1)


def _divergence(kind: str, logp_BTE: jax.Array, logq_BTE: jax.Array) -> jax.Array:
    if kind == "forward_kl":
        return _kl(logp_BTE, logq_BTE)
    if kind == "reverse_kl":
        return _kl(logq_BTE, logp_BTE)
    logm_BTE = jnp.logaddexp(logp_BTE, logq_BTE) - jnp.log(2.0)
    return (_kl(logp_BTE, logm_BTE) + _kl(logq_BTE, logm_BTE)) / 2


def _kl(logp_BTE: jax.Array, logq_BTE: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(logp_BTE) * (logp_BTE - logq_BTE), axis=-1)


def _outside(z_BTV: jax.Array, ids_BTJ: jax.Array) -> jax.Array:
    """Log-sum-exp over all other tokens: nothing cancels, however little is left for them."""
    others_BTV = jnp.put_along_axis(z_BTV, ids_BTJ, -jnp.inf, axis=-1, inplace=False)
    return jax.nn.logsumexp(others_BTV, axis=-1)


def _capped(logits_BTV: jax.Array, cap: float | None) -> jax.Array:
    return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)


def _logits(x_BTD: jax.Array, table: Weight) -> jax.Array:
    """In float32, whatever the activations are in."""
    if isinstance(table, StandIn):
        return contract("BTD,VD->BTV", x_BTD.astype(jnp.float32), table)
    return _product("BTD,VD->BTV", x_BTD, table.astype(x_BTD.dtype))


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(equation, x, y, precision=exact, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_blocks(rule: _Rule, size: int, x_BTD, table, rows, teacher_table) -> jax.Array:
    return _forward(rule, size, x_BTD, table, rows, teacher_table)[0]


def _forward(rule, size, x_BTD, table, rows, teacher_table):
    def of_block(block):
        x_BTD, rows = block
        return rule(_logits(x_BTD, table), rows, teacher_table)

    losses_BT = _joined(lax.map(of_block, _cut((x_BTD, rows), size)), x_BTD.shape[1])
    return losses_BT, (x_BTD, table, rows, teacher_table)


def _backward(rule, size, saved, d_BT):
    x_BTD, table, rows, teacher_table = saved
    learns = not isinstance(table, StandIn)

    def step(dtable_VD, block):
        x_BTD, rows, d_BT = block
        logits_BTV, pull_x = jax.vjp(lambda x_BTD: _logits(x_BTD, table), x_BTD)
        _, pull = jax.vjp(lambda logits_BTV: rule(logits_BTV, rows, teacher_table), logits_BTV)
        (dlogits_BTV,) = pull(d_BT)
        if not learns:
            return dtable_VD, pull_x(dlogits_BTV)[0]
        dlogits_BTV = dlogits_BTV.astype(x_BTD.dtype)
        dtable_VD += _product("BTV,BTD->VD", dlogits_BTV, x_BTD)
        return dtable_VD, _product("BTV,VD->BTD", dlogits_BTV, table.astype(x_BTD.dtype))

    dtable_VD = jnp.zeros(table.shape, jnp.float32) if learns else None
    dtable_VD, dx = lax.scan(step, dtable_VD, _cut((x_BTD, rows, d_BT), size))
    dx_BTD = _joined(dx, x_BTD.shape[1]).astype(x_BTD.dtype)
    return dx_BTD, dtable_VD.astype(table.dtype) if learns else None, None, None


_in_blocks.defvjp(_forward, _backward)


def _cut(arrays: Any, size: int) -> Any:
    """Arrays `[B, T, ...]` as blocks of `size` tokens, `[blocks, B, size, ...]`."""

    def cut(array: jax.Array) -> jax.Array:
        rest = -array.shape[1] % size
        array = jnp.pad(array, ((0, 0), (0, rest)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(len(array), -1, size, *array.shape[2:]), 1, 0)

    return jax.tree.map(cut, arrays)


def _joined(blocks: jax.Array, T: int) -> jax.Array:
    """The way back, without what was filled up."""
    array = jnp.moveaxis(blocks, 0, 1)
    return array.reshape(len(array), -1, *array.shape[3:])[:, :T]
