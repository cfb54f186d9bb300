"""What comes from outside: texts, and safetensors files of token ids, pixels and mel frames.

Local letters: M mel bands.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from gemma_jax.config import GemmaConfig
    from gemma_jax.encoder_config import AudioConfig, MobileNetConfig, VisionConfig

# Hugging Face's names. The last two are known, and change nothing in a forward pass.
NAMES = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "pixel_values",
    "input_features",
    "input_features_mask",
    "num_crops",
    "labels",
)

# Name of a modality -> of the array that its encoder reads.
ITEMS = {"image": "pixel_values", "audio": "input_features"}


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
      ValueError: Ids outside the vocabulary, images or sounds for a model without a tower for them,
        or of another size or number than the model and the ids ask for.
    """
    import numpy as np

    from gemma_jax.multimodal.modality import modalities_of

    ids, modalities = arrays["input_ids"], modalities_of(cfg)
    words = ids[~np.isin(ids, [modality.placeholder for modality in modalities])]
    if words.size and (words.min() < 0 or words.max() >= cfg.vocab_size):
        raise ValueError(
            f"{path}: input_ids must lie in [0, {cfg.vocab_size}), the model's vocabulary; "
            f"got {words.min()} to {words.max()}"
        )
    _check_pixels(arrays, cfg.vision, path)
    _check_features(arrays, cfg.audio, path)
    for modality in modalities:
        name, items = ITEMS[modality.name], arrays.get(ITEMS[modality.name])
        places = int((ids == modality.placeholder).sum())
        if items is None and places:
            raise ValueError(f"{path}: {places} places for soft tokens, but no {name}")
        if items is not None and places != (need := len(items) * modality.tokens_per_item):
            raise ValueError(
                f"{path}: {len(items)} {modality.items} need {need} places "
                f"(id {modality.placeholder}) in input_ids; there are {places}"
            )


def items_of(arrays: dict[str, "np.ndarray"], name: str) -> "np.ndarray | list[np.ndarray] | None":
    """What the encoder of a modality reads, item by item; frames that are not real are left out."""
    items, mask = arrays.get(ITEMS[name]), arrays.get("input_features_mask")
    if name != "audio" or items is None or mask is None:
        return items
    return [frames_TM[real_T != 0] for frames_TM, real_T in zip(items, mask)]


def _check_pixels(arrays, vision: "VisionConfig | MobileNetConfig | None", path: Path) -> None:
    from gemma_jax.encoder_config import VisionConfig

    if (pixels := arrays.get("pixel_values")) is None:
        return
    if vision is None:
        raise ValueError(f"{path}: pixel_values given, but this model has no vision tower")
    # MobileNetV5 takes other sizes too, and says itself which.
    size = vision.image_size if isinstance(vision, VisionConfig) else pixels.shape[-1]
    if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size) or pixels.dtype.kind != "f":
        raise ValueError(
            f"{path}: pixel_values must be floats [I, 3, {vision.image_size}, "
            f"{vision.image_size}], got {pixels.dtype} {list(pixels.shape)}"
        )


def _check_features(arrays, audio: "AudioConfig | None", path: Path) -> None:
    """The mel frames of clips, and which of them are real: a stretch from the first on."""
    import numpy as np

    features, mask = arrays.get("input_features"), arrays.get("input_features_mask")
    if features is None:
        if mask is not None:
            raise ValueError(f"{path}: input_features_mask given, but no input_features")
        return
    if audio is None:
        raise ValueError(f"{path}: input_features given, but this model has no audio tower")
    if features.ndim != 3 or features.shape[2] != audio.num_mels or features.dtype.kind != "f":
        raise ValueError(
            f"{path}: input_features must be floats [I, T, {audio.num_mels}], got "
            f"{features.dtype} {list(features.shape)}"
        )
    if not features.shape[1]:
        raise ValueError(f"{path}: clips without a single frame in input_features")
    if mask is not None and mask.shape != features.shape[:2]:
        raise ValueError(
            f"{path}: input_features_mask {list(mask.shape)} must be {list(features.shape[:2])}, "
            "as input_features"
        )
    if mask is not None and not (mask != 0).any(axis=1).all():
        raise ValueError(f"{path}: a clip without a single real frame in input_features_mask")
    if mask is not None and (np.diff((mask != 0).astype(np.int8), axis=1) > 0).any():
        raise ValueError(f"{path}: input_features_mask must be ones, then zeros, in every row")
    real = features if mask is None else features[mask != 0]
    if not np.isfinite(real).all():
        raise ValueError(f"{path}: input_features hold NaN or infinity")


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
