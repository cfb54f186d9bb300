"""What comes from outside: texts, and safetensors files of token ids and pixels."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from gemma_jax.config import GemmaConfig

# Hugging Face's names. The last two are known, and change nothing in a forward pass.
NAMES = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "pixel_values",
    "num_crops",
    "labels",
)


def utf8(text: str | bytes, what: str) -> str:
    """The text in `text`. What Python takes from a command line may hold bytes that are none.

    Raises:
      ValueError: It is not UTF-8, or empty.
    """
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} is not valid UTF-8 at byte {error.start}; convert it to UTF-8"
        ) from None
    if not text:
        raise ValueError(f"{what} is empty; give at least one character")
    return text


def read_inputs(path: Path) -> dict[str, "np.ndarray"]:
    """Arrays of a safetensors file by name, without a leading `in.`; outputs (`out.`) left out.

    Raises:
      ValueError: Not a safetensors file, without `input_ids [B, T]`, with names that no model here
        knows, or with arrays that do not fit together.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if not name.startswith("out.")]
            arrays = {name.removeprefix("in."): file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None
    if unknown := sorted(arrays.keys() - set(NAMES)):
        raise ValueError(f"{path}: cannot use {', '.join(unknown)}; expected {_list(NAMES)}")
    ids = arrays.get("input_ids")
    if ids is None or ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        found = [f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items()]
        raise ValueError(f"{path} must hold integer input_ids [B, T]; it holds {_list(found)}")
    types = arrays.get("token_type_ids", ids)
    if types.shape != ids.shape:
        raise ValueError(
            f"{path}: token_type_ids {list(types.shape)} must match input_ids {list(ids.shape)}"
        )
    return arrays


def check_for_model(arrays: dict[str, "np.ndarray"], cfg: "GemmaConfig", path: Path) -> None:
    """Holds inputs against the model they are for.

    Raises:
      ValueError: Ids outside the vocabulary, images for a model that reads text alone, images of
        another size or number than the model and the ids ask for.
    """
    ids, pixels, vision = arrays["input_ids"], arrays.get("pixel_values"), cfg.vision
    places = 0 if vision is None else int((ids == vision.image_token).sum())
    words = ids if vision is None else ids[ids != vision.image_token]
    if words.size and (words.min() < 0 or words.max() >= cfg.vocab_size):
        raise ValueError(
            f"{path}: input_ids must lie in [0, {cfg.vocab_size}), the model's vocabulary; "
            f"got {words.min()} to {words.max()}"
        )
    if pixels is None:
        if places:
            raise ValueError(f"{path}: {places} places for soft tokens, but no pixel_values")
        return
    if vision is None:
        raise ValueError(f"{path}: pixel_values given, but this model reads text alone")
    size = vision.image_size
    if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size) or pixels.dtype.kind != "f":
        raise ValueError(
            f"{path}: pixel_values must be floats [I, 3, {size}, {size}], got {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    if places != len(pixels) * vision.num_soft_tokens:
        raise ValueError(
            f"{path}: {len(pixels)} images need {len(pixels) * vision.num_soft_tokens} places "
            f"(id {vision.image_token}) in input_ids; there are {places}"
        )


def real_tokens(inputs: dict[str, "np.ndarray"], path: Path) -> "np.ndarray":
    """The attention mask as bool `[B, T]`: in each row one run of real tokens amid padding.

    Raises:
      ValueError: The mask does not match the ids, has holes, or leaves a row empty.
    """
    import numpy as np

    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", np.ones_like(ids)) != 0
    if mask.shape != ids.shape:
        raise ValueError(
            f"{path}: attention_mask {list(mask.shape)} must match input_ids {list(ids.shape)}"
        )
    runs_B = np.sum(np.diff(np.pad(mask, ((0, 0), (1, 0))).astype(np.int8), axis=1) == 1, axis=1)
    if (runs_B != 1).any():
        row = int(np.argmax(runs_B != 1))
        raise ValueError(
            f"{path}: attention_mask of row {row} has {runs_B[row]} runs of ones; expected one, "
            "with padding before or after it"
        )
    return mask


def _list(names) -> str:
    return ", ".join(names) or "nothing"
