"""Steps of training on stored inputs, for holding against those of another library.

Inputs carry Hugging Face's names and layouts: `input_ids`, `labels` (aligned with the ids, -100 for
no target), `attention_mask`, `position_ids`, `segment_ids` (of packed rows: 1, 2, ...; 0 is
padding), `completion_mask`, `token_type_ids`, `pixel_values`, `input_features`; `NAME_0`, `NAME_1`
are those of one step each; `lr` the rates of the steps. Settings say the rest:

| key              | what it says                                                             |
|------------------|--------------------------------------------------------------------------|
| `optimiser`      | `betas`, `eps`, `weight_decay`, `clip`, `lrs`, `decays`, `frozen`        |
| `micro_rows`     | rows of each micro-batch, `[[0, 1], [1, 3]]`                             |
| `k`              | of the teacher's largest logits                                          |
| `outputs`        | names that are wanted: `loss`, `param.NAME`, `sigmoid_beta0.1.loss`, ... |

Local letters: I items that soft tokens come in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.adapters import adapt, merge
from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.model import Gemma
from gemma_jax.loading import load_model
from gemma_jax.multimodal.encode import Clips
from gemma_jax.multimodal.media import Media
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.placeholders import runs
from gemma_jax.training.lora import train_adapters
from gemma_jax.training.objectives import TrainBatch
from gemma_jax.training.trainable import Params, Trainable, trainable

Arrays = dict[str, np.ndarray]
Name = Callable[[Any, list[str]], Arrays]  # of trained parameters, or their gradients, and names


@dataclass(frozen=True)
class Case:
    """Holds what is asked for.

    Attributes:
      arrays: Inputs by name.
      settings: See the top of this file.
      parts: What is trained.
      named: From what is shaped like `parts.trained` to arrays by the names that are wanted.
      merged: The same for the model without its adapter.
      other: The reference, or the teacher.
    """

    arrays: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]
    parts: Trainable
    named: Name
    merged: Callable[[list[str]], Arrays] | None = None
    other: Gemma | None = None

    @property
    def cfg(self) -> GemmaConfig:
        return self.model.cfg

    @property
    def model(self) -> Gemma:
        return self.parts.join(self.parts.trained, self.parts.frozen)

    def wanted(self, front: str) -> list[str]:
        """Names of outputs that begin so, without that."""
        names = self.settings.get("outputs", {})
        return [name.removeprefix(front) for name in names if name.startswith(front)]

    def batch(self, step: int | None = None, rows: slice = slice(None)) -> TrainBatch:
        """Inputs as the objectives read them; of one step where each has its own."""
        end = "" if step is None or f"input_ids_{step}" not in self.arrays else f"_{step}"
        names = ("input_ids", "attention_mask", "labels", "position_ids", "segment_ids")
        given = {n: self.arrays[n + end][rows] for n in names if n + end in self.arrays}
        ids_BT = given["input_ids"].astype(np.int32)
        segments_BT, rope_BT = given.get("segment_ids"), given.get("position_ids")
        real_BT = given.get("attention_mask", np.ones_like(ids_BT)) != 0
        if segments_BT is not None:
            real_BT = real_BT & (segments_BT > 0)
        positions_BT = np.where(real_BT, np.cumsum(real_BT, axis=1) - 1, -1).astype(np.int32)
        read = Batch(
            ids_BT,
            positions_BT,
            rope_positions_BT=None if rope_BT is None else rope_BT.astype(np.int32),
            documents_BT=None if segments_BT is None else segments_BT.astype(np.int32),
        )
        return TrainBatch(read, _targets(given.get("labels")), media=self._media(ids_BT, rows))

    def _refuse_places(self, ids_BT: np.ndarray, name: str, key: str) -> None:
        known = [one.placeholder for one in modalities_of(self.cfg) if one.name == name]
        if places := int(np.isin(ids_BT, known).sum()):
            raise ValueError(f"{places} places for soft tokens in input_ids, but no {key}")

    def _media(self, ids_BT: np.ndarray, rows: slice) -> Media | None:
        """What towers read for these rows; items lie in the order of their placeholders."""
        found, before = {}, {}
        all_ids = self.arrays.get("input_ids", ids_BT)
        for name, key in (("image", "pixel_values"), ("audio", "input_features")):
            if key not in self.arrays:
                self._refuse_places(ids_BT, name, key)
                continue
            placeholder = placeholder_of(self.cfg, name)
            places = (all_ids == placeholder).sum(axis=1)
            per_item = int(places.sum()) // len(self.arrays[key])
            ends = np.concatenate([[0], np.cumsum(places // per_item)])
            start, stop, _ = rows.indices(len(all_ids))
            before[name] = slice(ends[start], ends[stop])
            found[name] = self.arrays[key][before[name]]
        if "audio" in found and (mask := self.arrays.get("input_features_mask")) is not None:
            lengths_I = (mask[before["audio"]] != 0).sum(axis=1).astype(np.int32)
            found["audio"] = Clips(found["audio"], lengths_I)
        if not any(len(items) for items in found.values()):
            return None
        media = Media.of(self.cfg, ids_BT, found)
        types_BT = self.arrays.get("token_type_ids")
        return replace(media, block_BT=None if types_BT is None else runs(types_BT[rows] == 1))


def load_case(
    source: str,
    inputs: Sequence[Path],
    settings: Mapping[str, Any],
    *,
    beside: Path,
    adapter: Path | None = None,
    reference: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Case:
    """Loads what a case needs, in float32.

    Args:
      source: Of the model.
      inputs: Safetensors files; names may begin with `in.`, and `out.` is left out.
      beside: Folder of the settings. Inputs without `input_ids` have those of the file
        `MODEL_steps.safetensors` there, and a reference or teacher is looked for there. Settings
        that say `NAME_as_in` of an array have it from the file of the same name in that folder
        beside this one.
    """
    arrays = _read(inputs)
    for key, folder in settings.items():
        if (name := key.removesuffix("_as_in")) != key and name not in arrays:
            arrays[name] = _read([beside.parent / folder / inputs[0].name])[name]
    model = load_model(source, dtype="float32", weights="float32", progress=progress)
    other = _other(arrays, settings, beside, reference)
    if adapter is not None:
        return Case(arrays, settings, *_adapted(model, adapter), other)
    parts = _trainable(model, settings.get("optimiser", {}).get("frozen", ()))
    named = lambda tree, names: _tensors(parts.join(tree, parts.frozen), names)  # noqa: E731
    return Case(arrays, settings, parts, named, None, other)


def _read(inputs: Sequence[Path]) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    arrays: dict[str, np.ndarray] = {}
    for path in inputs:
        try:
            found = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file: {error}") from None
        found = {k.removeprefix("in."): v for k, v in found.items() if not k.startswith("out.")}
        if not any(name.startswith("input_ids") for name in (*arrays, *found)):
            front = path.stem.removesuffix("_accumulate").partition("_steps")[0]
            sibling = path.with_name(f"{front}_steps.safetensors")
            if sibling != path and sibling.is_file():
                found = _read([sibling]) | found
        arrays |= found
    if unknown := sorted({_bare(name) for name in arrays} - set(NAMES)):
        raise ValueError(f"cannot use {', '.join(unknown)}; expected {', '.join(NAMES)}")
    return arrays


NAMES = (
    "input_ids", "labels", "attention_mask", "position_ids", "segment_ids", "completion_mask",
    "token_type_ids", "pixel_values", "input_features", "input_features_mask", "lr",
)  # fmt: skip


def _bare(name: str) -> str:
    front, _, number = name.rpartition("_")
    return front if number.isdigit() else name


def _other(arrays, settings, beside: Path, given: str | None) -> Gemma | None:
    """The reference of preferences, or the teacher."""
    kind = "reference" if "completion_mask" in arrays else "teacher"
    if given is None:
        said = settings.get(kind)
        places = [beside / kind, *([beside / said, beside.parent / said] if said else [])]
        given = next((str(place) for place in places if place.is_dir()), None)
    if given is None:
        return None
    return load_model(given, dtype="float32", weights="float32")


def _trainable(model: Gemma, frozen: Sequence[str]) -> Trainable:
    """All but the modules that are named as transformers does."""
    if not frozen:
        return trainable(model)
    from gemma_checkpoints import tensor_names

    theirs = tensor_names(model)
    parts = {name for names in theirs.values() for name in names[0].split(".")}
    if unknown := [name for name in frozen if name not in parts]:
        raise ValueError(f"frozen: this model has no {', '.join(unknown)}")
    return trainable(model, lambda path, _: not set(frozen) & set(theirs[path][0].split(".")))


def _adapted(model: Gemma, folder: Path) -> tuple[Trainable, Name, Callable]:
    """What is trained of a model with an adapter, how that is named, and the merged model's."""
    from gemma_checkpoints.hf.adapters import read_adapter
    from gemma_checkpoints.hf.adapters_out import trained_by_key

    adapter = read_adapter(model, folder)
    parts = train_adapters(adapt(model, adapter), adapter.whole.keys())
    adapted = parts.join(parts.trained, parts.frozen)

    def named(trained: Params, names: list[str]) -> Arrays:
        arrays = trained_by_key(adapted, trained)
        if unknown := [name for name in names if name not in arrays]:
            raise ValueError(f"{folder} trains no {', '.join(unknown[:4])}")
        return {name: arrays[name] for name in names}

    return parts, named, lambda names: _tensors(merge(adapted), names)


def _tensors(model: Gemma, names: list[str]) -> Arrays:
    from gemma_checkpoints import tensors_by_name

    return tensors_by_name(model, names)


def _targets(labels_BT: np.ndarray | None) -> np.ndarray | None:
    """Labels stand at their own token; targets at the one before it."""
    if labels_BT is None:
        return None
    following_BT = np.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return np.where(following_BT < 0, -1, following_BT).astype(np.int32)


def placeholder_of(cfg: GemmaConfig, name: str) -> int:
    """Id of the places for soft tokens of a modality."""
    found = [one.placeholder for one in modalities_of(cfg) if one.name == name]
    if not found:
        raise ValueError(f"inputs for {name}, which this model does not read")
    return found[0]
