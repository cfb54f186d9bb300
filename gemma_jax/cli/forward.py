"""`gemma-jax forward`: run stored inputs through a model and write what comes out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.inputs import read_text_inputs, real_tokens

if TYPE_CHECKING:
    import numpy as np


def command(
    model: common.Model,
    inputs: Annotated[
        Path,
        typer.Option(
            exists=True, dir_okay=False, help="Safetensors file with input_ids [B, T] and more."
        ),
    ],
    output: Annotated[
        Path, typer.Option(dir_okay=False, help="Safetensors file to write, float32.")
    ],
    capture: Annotated[str, typer.Option(help="Further outputs, by name, comma-separated.")] = "",
    dtype: common.DTypeOption = common.DType.float32,
    weights: common.WeightsOption = None,
    numerics: common.NumericsOption = common.NumericsName.hf,
    attention_impl: common.AttentionOption = None,
) -> None:
    """Run stored inputs and write what comes out.

    That is the logits, and intermediate results by --capture; always as float32.
    """
    common.set_up_jax()
    import jax.numpy as jnp

    from gemma_jax.files import replacing
    from gemma_jax.model import forward

    arrays = read_text_inputs(inputs)
    ids, positions, rope = arrays["input_ids"], *_positions(arrays, inputs)
    names = _captures(capture)
    with replacing(output) as path:  # entered first: a wrong path should not cost a model's loading
        net = common.load_model(
            model, dtype=dtype, weights=weights, numerics=numerics, attention_impl=attention_impl
        )
        if ids.min() < 0 or ids.max() >= net.cfg.vocab_size:
            raise ValueError(
                f"{inputs}: input_ids must lie in [0, {net.cfg.vocab_size}), the model's "
                f"vocabulary; got {ids.min()} to {ids.max()}"
            )
        with progress.compiling():
            out = forward(
                net,
                jnp.asarray(ids, jnp.int32),
                jnp.asarray(positions, jnp.int32),
                rope_positions_BT=jnp.asarray(rope, jnp.int32),
                capture=names,
            )
            _write({"logits": out.logits, **out.captured}, path, output)


def _captures(names: str) -> tuple[str, ...]:
    from gemma_jax.model import CAPTURES

    wanted = tuple(name.strip() for name in names.split(",") if name.strip())
    if unknown := [name for name in wanted if name not in CAPTURES]:
        raise ValueError(f"cannot capture {', '.join(unknown)}; choose from {', '.join(CAPTURES)}")
    return wanted


def _positions(arrays: dict[str, "np.ndarray"], file: Path) -> tuple["np.ndarray", "np.ndarray"]:
    """Positions for the mask and for the rotary embedding, both `[B, T]`.

    transformers masks by place in the row and rotates by `position_ids`, which count every place
    unless given. A row is one run of real tokens, so places and positions mask alike.
    """
    import numpy as np

    mask = real_tokens(arrays, file)
    rope = arrays.get("position_ids", np.arange(mask.shape[1])[None])
    if rope.shape not in (mask.shape, (1, mask.shape[1])):
        raise ValueError(
            f"{file}: position_ids {list(rope.shape)} must match input_ids {list(mask.shape)}"
        )
    rope = np.broadcast_to(rope, mask.shape)
    if "attention_mask" not in arrays and (np.diff(rope, axis=1) != 1).any():
        raise ValueError(
            f"{file}: position_ids must count up by one; packed sequences are not supported"
        )
    return np.where(mask, np.cumsum(mask, axis=1) - 1, -1), rope


def _write(results: dict, path: Path, output: Path) -> None:
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file({name: np.asarray(array, np.float32) for name, array in results.items()}, path)
    except SafetensorError as error:  # its text holds the system's: no space left, and so on
        raise OSError(f"{output} cannot be written: {error}") from None
