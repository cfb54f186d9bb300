"""A pass that computes only what somebody reads.

Of a token whose logits nobody wants, later passes read keys and values alone. The last layer that
makes any is the last one; in Gemma 3n, the one before those that share. So:

    layers before it          of all tokens
    its keys and values       of all tokens
    the rest of it            of the wanted tokens alone, if any
    layers after it           of the wanted tokens alone, if any
"""

from collections.abc import Collection, Sequence
from functools import partial

import jax

from gemma_jax.config import LayerSpec
from gemma_jax.decoder.attention import Attention
from gemma_jax.decoder.context import Context, tokens_at
from gemma_jax.decoder.model import Block, Gemma, LayerInputs
from gemma_jax.nn.ffn import FeedForward
from gemma_jax.nn.layer_stack import Caches, LayerOutput, run_layers

BEFORE_LAYERS = frozenset(("embeddings", "inputs_embeds", "per_layer_inputs"))  # captures


def may_skip(model: Gemma, tokens: int, logits: str, capture: Collection[str]) -> bool:
    """Whether a pass over so many tokens per row may leave out some of them in some layers.

    Not if logits of all are wanted, or what is captured has all tokens. Nor with layers, or parts
    of layers, of somebody's own, which may mix tokens in other ways than by attention.
    """
    fewer = logits == "none" or (logits == "last" and tokens > 1)
    return fewer and BEFORE_LAYERS.issuperset(capture) and _is_plain(model)


def _is_plain(model: Gemma) -> bool:
    blocks = [block for group in model.blocks for block in group]
    return all(
        (type(block), type(block.attn), type(block.ffn)) == (Block, Attention, FeedForward)
        for block in blocks
    )


def last_with_keys(specs: Sequence[LayerSpec]) -> int:
    """The last layer that makes keys and values of its own."""
    return max(i for i, spec in enumerate(specs) if spec.makes_keys)


def run_wanted(
    model: Gemma,
    x: jax.Array,
    ctx: Context,
    caches: Caches | None,
    inputs: LayerInputs,
    wanted_BT: jax.Array | None,
) -> LayerOutput:
    """`run_layers` over all layers, of which some compute the wanted tokens alone.

    Args:
      x: The stream or streams of all tokens; of the wanted ones when it comes back.
      wanted_BT: int32, which ones out of each row; `None` for none.
    """
    run = partial(run_layers, model.blocks, model.layer_groups)
    last, depth = last_with_keys(model.cfg.layers), len(model.cfg.layers)
    out = run(x, ctx, caches, inputs, layers=range(last))
    ctx = ctx.share(out.shared_kv)
    just = range(last, last + 1)
    out = run(out.x, ctx, out.cache, inputs, layers=just, method="keys_values")
    if wanted_BT is None:
        return out
    x = tokens_at(wanted_BT, out.x, axis=out.x.ndim - 2)
    ctx, inputs = ctx.share(out.shared_kv).at(wanted_BT), inputs.at(wanted_BT)
    return run(x, ctx, out.cache, inputs, layers=range(last, depth))
