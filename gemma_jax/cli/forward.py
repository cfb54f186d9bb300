"""`gemma-jax forward`: run stored inputs through a model and write what comes out."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_jax.cli import common

TEXT_INPUTS = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "labels"}


def command(
    model: common.Model,
    inputs: Annotated[Path, typer.Option(help="Safetensors file with input_ids [B,T] and more.")],
    output: Annotated[Path, typer.Option(help="Safetensors file to write, float32.")],
    capture: Annotated[str, typer.Option(help="Further outputs, by name, comma-separated.")] = "",
    dtype: common.DTypeOption = common.DType.float32,
    weights: common.WeightsOption = None,
    numerics: common.NumericsOption = common.NumericsName.hf,
    attention_impl: common.AttentionOption = None,
) -> None:
    """Run stored inputs; write logits and captured intermediate results as float32."""
    common.set_up_jax()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import save_file

    from gemma_jax.files import replacing
    from gemma_jax.model import CAPTURES, forward

    names = tuple(name for name in capture.split(",") if name)
    if unknown := set(names) - set(CAPTURES):
        raise ValueError(f"cannot capture {', '.join(unknown)}; choose from {', '.join(CAPTURES)}")
    arrays = common.read_inputs(inputs)
    if unknown := set(arrays) - TEXT_INPUTS:
        raise ValueError(f"{inputs}: a text model cannot use {', '.join(sorted(unknown))}")
    ids, mask = common.input_rows(arrays, inputs)
    net = common.load_model(
        model, dtype=dtype, weights=weights, numerics=numerics, attention_impl=attention_impl
    )
    if ids.min() < 0 or ids.max() >= net.cfg.vocab_size:
        raise ValueError(f"{inputs}: input_ids must lie in [0, {net.cfg.vocab_size})")

    # transformers masks by place in the row and rotates by position_ids, which count every place
    # unless given; rows are one run of real tokens, so places and our positions mask alike.
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1)
    rope = arrays.get("position_ids", np.broadcast_to(np.arange(ids.shape[1]), ids.shape))
    if rope.shape not in (ids.shape, (1, ids.shape[1])):
        raise ValueError(f"{inputs}: position_ids {rope.shape} must match input_ids {ids.shape}")
    rope = np.broadcast_to(rope, ids.shape)
    if "attention_mask" not in arrays and (np.diff(rope, axis=1) != 1).any():
        raise ValueError(
            f"{inputs}: position_ids must count up by one; packed sequences are not supported"
        )
    out = jax.jit(forward, static_argnames=("capture",))(
        net,
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(positions, jnp.int32),
        rope_positions_BT=jnp.asarray(rope, jnp.int32),
        capture=names,
    )
    results = {"logits": out.logits, **out.captured}
    with replacing(output) as path:
        save_file({k: np.asarray(v, np.float32) for k, v in results.items()}, path)
