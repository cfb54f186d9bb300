"""The functions that most callers want: a name or a path in, a model out."""

from collections.abc import Callable, Collection
from pathlib import Path

import jax

from gemma_jax.decoder.model import Block, Gemma, MakeBlock
from gemma_jax.nn.layer_groups import Layout
from gemma_jax.runtime import Runtime
from gemma_jax.weights.off_device import Place

from .catalog import Notify, resolve
from .changed_config import ChangeConfig
from .errors import CheckpointError
from .formats import is_checkpoint, no_checkpoint, open_source
from .kept import Keep
from .load import Placement, Transform, load_source
from .tokenizers import VOCABULARIES, find_tokenizer


def load_weights(
    src: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    modalities: Collection[str] | None = None,
    mmproj: str | Path | None = None,
    layout: Layout = "scan",
    runtime: Runtime = Runtime(),
    placement: Placement | None = None,
    transform: Transform | None = None,
    per_layer_table: Place = "device",
    per_layer_dtype: jax.typing.DTypeLike | None = None,
    config: ChangeConfig | None = None,
    block: MakeBlock = Block,
    keep: Keep | None = None,
    progress: Callable[[int, int], None] | None = None,
    notify: Notify | None = None,
) -> Gemma:
    """Loads a checkpoint of any format, holding one small piece per thread in host memory.

    Args:
      src: A `.gguf` file, a Hugging Face folder, a folder that `save_orbax` wrote, or a name of
        the catalog.
      dtype: Of the parameters. Default: as stored; quantised tensors become float32.
      modalities: Names out of `"text"`, `"image"` and `"audio"`. `("text",)` leaves the towers of a
        model that sees or hears on the disk, neither read nor allocated, and Gemma 3n's vocabulary
        of each with it; `("text", "image")` insists on one. Default: all that the checkpoint has.
      mmproj: The GGUF file with the vision tower of a Gemma 3 whose decoder is `src`, a GGUF file
        as well. None is looked for.
      layout: How layers are stacked; see `gemma_jax.nn.layer_groups`.
      runtime: How the model will compute. Independent of `dtype`.
      placement: `(path, dims, shape) -> Sharding | None`: where each Param goes. Its pieces go
        straight there, and only those are read that devices of this process hold.
      transform: A function of the model, still without arrays, that returns `(path, array) ->
        value`. That is applied to each Param as soon as it is complete, so that a model can be
        quantised while it never exists as a whole.
      per_layer_table: Where Gemma 3n's table of per-layer embeddings goes: with the other
        parameters, to the memory of the host, or nowhere: it stays in its safetensors file. Off the
        device it is not transformed.
      per_layer_dtype: Of the rows of that table off the device; default: `dtype`.
      config: Makes another config of the checkpoint's, for the same tensors: other windows or rope,
        say, or without some of the last layers, whose tensors are not read then. Layers are taken
        from the front, whichever of several equal ones the config keeps.
      block: Makes the layers; see `gemma_jax.Gemma`. A model that was saved with blocks of its own
        is loaded with these alone.
      keep: `(param, matrix) -> value`, applied to each Param whose tensors are quantised: they
        stay as they are stored, bit for bit, and are neither widened nor transformed. What has no
        form in memory, or is stacked with layers of another type, is widened all the same, and
        `notify` is told. Default: all are widened.
      progress: Called with (bytes done, bytes in all), counted after decoding.
      notify: See `resolve`; told as well what could not be kept.

    Raises:
      CheckpointError: everything that is wrong with the checkpoint, in one error.
      ValueError: a modality that is none, a place for a table that the model does not have.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> model = gc.load_weights("checkpoints/digits")
      >>> model.embed.table.dtype  # as stored
      dtype(bfloat16)
    """
    return load_source(
        open_source(resolve(src, notify=notify), mmproj=mmproj),
        dtype=dtype,
        modalities=modalities,
        layout=layout,
        runtime=runtime,
        placement=placement,
        transform=transform,
        per_layer_table=per_layer_table,
        per_layer_dtype=per_layer_dtype,
        config=config,
        block=block,
        keep=keep,
        notify=notify,
        progress=progress,
    )


def tokenizer_path(src: str | Path, *, notify: Notify | None = None) -> Path:
    """Finds the file with the vocabulary of `src`; a GGUF file has it inside.

    Raises:
      CheckpointError: there is none, or `src` is no checkpoint at all.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> gc.tokenizer_path("checkpoints/digits").name
      'tokenizer.model'
    """
    path = resolve(src, notify=notify)
    found = find_tokenizer(path)
    if found is None:
        if not is_checkpoint(path):
            raise no_checkpoint(path)
        raise CheckpointError(
            path,
            f"no tokenizer found: expected {' or '.join(VOCABULARIES[:2])}; gemma_jax.save "
            "puts one beside the weights, load_model needs none",
        )
    return found
