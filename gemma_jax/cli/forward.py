"""`gemma-jax forward`: run stored inputs through a model and write what comes out.

Local letters: I items that soft tokens come in.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.inputs import check_for_model, read_inputs, real_tokens
from gemma_jax.cli.model_options import ModelDType, ModelOptions, model_options

if TYPE_CHECKING:
    import numpy as np

    from gemma_jax.decoder.model import Gemma


@model_options(dtype=ModelDType.float32, refused={"cache_dtype": "forward keeps no cache"})
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
    *,
    options: ModelOptions,
) -> None:
    """Run stored inputs and write what comes out.

    That is the logits, and intermediate results by --capture; always as float32.
    """
    common.set_up_jax()
    import jax.numpy as jnp
    import numpy as np

    from gemma_jax.atomic_files import replacing
    from gemma_jax.decoder.batch import Batch
    from gemma_jax.decoder.forward import CAPTURES, forward

    arrays = read_inputs(inputs)
    ids, positions, rope = arrays["input_ids"], *_positions(arrays, inputs)
    names = _captures(capture)
    with replacing(output) as path:  # entered first: a wrong path should not cost a model's loading
        gemma = options.load(model)
        check_for_model(arrays, gemma.cfg, inputs)
        _check_towers(gemma, arrays, names)
        with progress.compiling():
            soft, seen = _soft_tokens(gemma, arrays, names)
            out = forward(
                gemma,
                Batch(
                    jnp.asarray(ids, jnp.int32),
                    jnp.asarray(positions, jnp.int32),
                    rope_positions_BT=jnp.asarray(rope, jnp.int32),
                    soft=soft,
                ),
                capture=tuple(name for name in names if name in CAPTURES),
            )
            results = {"logits": out.logits, **_by_layer(out.captured | seen)}
            common.save_arrays(
                {name: np.asarray(array, np.float32) for name, array in results.items()},
                path,
                output,
            )


def _by_layer(captured: dict) -> dict:
    """Layers of different shapes, as in a slice, one by one: `sparsity_masks.0`, ..."""
    arrays = {}
    for name, values in captured.items():
        layers = isinstance(values, tuple)
        arrays |= {f"{name}.{i}": a for i, a in enumerate(values)} if layers else {name: values}
    return arrays


# Tower, with which the names of its captures begin -> inputs without which it has nothing to do.
TOWERS = {"vision": "pixel_values", "audio": "input_features"}


def _captures(names: str) -> tuple[str, ...]:
    from gemma_jax.audio.encoder import AudioEncoder
    from gemma_jax.decoder.forward import CAPTURES
    from gemma_jax.multimodal.encode import AUDIO_TOKENS, IMAGE_TOKENS
    from gemma_jax.vision.encoder import VisionEncoder
    from gemma_jax.vision.mobilenet import MobileNetEncoder

    towers = (*VisionEncoder.captures, *MobileNetEncoder.captures, *AudioEncoder.captures)
    known = tuple(dict.fromkeys((*CAPTURES, *towers, IMAGE_TOKENS, AUDIO_TOKENS)))
    wanted = common.names(names)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"cannot capture {', '.join(unknown)}; choose from {', '.join(known)}")
    return wanted


def _check_towers(model: "Gemma", arrays: dict[str, "np.ndarray"], names: tuple[str, ...]) -> None:
    for part, inputs in TOWERS.items():
        if asked := [name for name in names if name.startswith(f"{part}.")]:
            if getattr(model, part, None) is None:
                raise ValueError(
                    f"this model has no {part} tower to capture {', '.join(asked)} from"
                )
            if inputs not in arrays:
                raise ValueError(f"no {inputs} in the inputs to capture {', '.join(asked)} from")


def _soft_tokens(model: "Gemma", arrays: dict[str, "np.ndarray"], names: tuple[str, ...]):
    """Soft tokens for the images and clips in the inputs, and what was captured on the way to them.

    Blocks that see each other both ways are where `token_type_ids` says so; without it transformers
    reads even the tokens of an image one after the other.
    """
    from gemma_jax.multimodal.encode import Clips, encode_audio, encode_images
    from gemma_jax.multimodal.modality import modalities_of
    from gemma_jax.multimodal.placeholders import place, runs

    modalities = {modality.name: modality for modality in modalities_of(model.cfg)}
    found, seen = {}, {}
    if "pixel_values" in arrays:
        asked = tuple(name for name in names if name.startswith("vision."))
        found["image"], seen = encode_images(model, arrays["pixel_values"], capture=asked)
    if "input_features" in arrays:
        asked = tuple(name for name in names if name.startswith("audio."))
        mask = arrays.get("input_features_mask")
        lengths_I = None if mask is None else (mask != 0).sum(axis=1).astype("int32")
        clips = Clips(arrays["input_features"], lengths_I)
        found["audio"], heard = encode_audio(model, clips, capture=asked)
        seen |= heard
    if not found:
        return None, {}
    used = [modalities[name] for name in found]
    soft = place(arrays["input_ids"], used, list(found.values()))
    if soft.block_BT is not None:
        given = arrays.get("token_type_ids")
        soft = replace(soft, block_BT=None if given is None else runs(given == 1))
    return soft, seen


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
