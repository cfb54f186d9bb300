"""What a layer keeps for its gradient; all else is computed again in the backward pass.

Fast to small: a policy's name stands for the results that it keeps, beside what enters a layer. The
costly ones are those of the matrices; norms, rotations, activations and, within attention, the
scores are cheap to make again or never kept.

| policy                 | kept of a layer                                       |
|------------------------|-------------------------------------------------------|
| `none`                 | everything that the gradient reads                    |
| `minimal_with_context` | the results of all seven matrices, and what heads see |
| `minimal`              | the results of all seven matrices                     |
| `save_all_but_hidden`  | what `save_attention` keeps, and the FFN's result     |
| `save_attention`       | queries, keys, values, and attention's result         |
| `save_qkv`             | queries, keys and values                              |
| `save_out`             | attention's result                                    |
| `full`                 | nothing                                               |
| `offload`              | what `minimal` keeps, in the memory of the host       |
| `offload_qkv`          | what `save_qkv` keeps, in the memory of the host      |

Layers of towers have no such names: there, every policy but `none` keeps nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

Kept = Literal[
    "attn_q", "attn_k", "attn_v", "attn_context", "attn_out", "ffn_gate", "ffn_up", "ffn_down"
]
_QKV: tuple[Kept, ...] = ("attn_q", "attn_k", "attn_v")
_ALL: tuple[Kept, ...] = (*_QKV, "attn_out", "ffn_gate", "ffn_up", "ffn_down")
NONE, FULL = "none", "full"
SAVED: Mapping[str, tuple[Kept, ...]] = {
    "minimal_with_context": (*_ALL, "attn_context"),
    "minimal": _ALL,
    "save_all_but_hidden": (*_QKV, "attn_out", "ffn_down"),
    "save_attention": (*_QKV, "attn_out"),
    "save_qkv": _QKV,
    "save_out": ("attn_out",),
}
OFFLOADED: Mapping[str, tuple[Kept, ...]] = {"offload": _ALL, "offload_qkv": _QKV}
POLICIES = (NONE, *SAVED, FULL, *OFFLOADED)
HOST = "pinned_host"
F = TypeVar("F", bound=Callable[..., Any])


def keep(name: Kept, x: jax.Array) -> jax.Array:
    """The array itself, which policies know by this name."""
    return checkpoint_name(x, name)


def checkpointed(function: F, policy: str, device: jax.Device | None = None) -> F:
    """The function, whose gradient keeps what a policy says.

    Args:
      device: Of those that it runs on; default: of those that arrays are put on.

    Raises:
      ValueError: The device's host has no memory that could be read from.
    """
    if policy == NONE:
        return function
    if policy in OFFLOADED:
        _check_host(policy, device or jax.devices()[0])
        rule = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(OFFLOADED[policy]),
            offload_src="device",
            offload_dst=HOST,
        )
        return jax.checkpoint(function, policy=rule)
    rule = jax.checkpoint_policies.save_only_these_names(*SAVED.get(policy, ()))
    return jax.checkpoint(function, policy=rule if policy in SAVED else None)


def check_policy(policy: str) -> None:
    """Raises: ValueError: A name that is none of a policy, which would keep nothing unnoticed."""
    if policy not in POLICIES:
        raise ValueError(f"remat={policy!r} must be one of: {', '.join(POLICIES)}")


def _check_host(policy: str, device: jax.Device) -> None:
    if device.platform in ("tpu", "gpu", "cuda"):  # also chips that are only planned for
        return
    if HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise ValueError(
            f"remat={policy!r} needs memory of kind {HOST}, which a {device.platform} does not "
            f"have; take one of: {', '.join(name for name in POLICIES if name not in OFFLOADED)}"
        )
