"""A config as the planner takes it: the step of its run, without its data and weights."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.model import Gemma
from gemma_jax.matformer.submodel import Slice
from gemma_jax.multimodal.media import Media
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.numerics import resolve_numerics
from gemma_jax.planning.lowering import Work
from gemma_jax.planning.training import Made, MakeOther, Training
from gemma_jax.runs.config import RunConfig
from gemma_jax.runs.parts import make_parts
from gemma_jax.runtime import Runtime
from gemma_jax.storages import AUTO, STORED
from gemma_jax.training.objective_names import OBJECTIVES
from gemma_jax.training.objectives import TrainBatch
from gemma_jax.training.optimizers import make_optimizer
from gemma_jax.training.preference import PreferenceBatch

PLANNED = ("adapter", "frozen", "objective", "optimizer", "micro_batches", "remat", "load")


def planned_work(config: RunConfig) -> Work:
    """What a plan calls work, of a config.

    Raises:
      ValueError: Weights as files have them, which a plan does not read.
    """
    load, data = config.load, config.data
    if load.weights in (AUTO, STORED):
        raise ValueError(
            f"load.weights={load.weights!r} is what a file has, and a plan reads none; name a "
            "storage, as in weights='int8'"
        )
    if load.per_layer_table != "device":
        raise ValueError("a plan puts all weights on the devices: leave out load.per_layer_table")
    if load.activations != "float":
        raise ValueError("a plan counts products of floats: leave out load.activations")
    if load.rules is not None:
        raise ValueError("a plan of training splits by the rules for training: leave out rules")
    return Work(
        mode="train",
        batch=data.rows,
        context=data.tokens_per_row,
        dtype=jnp.dtype(load.dtype or "bfloat16").name,
        weights=load.weights,
        attention_impl=load.attention_impl,
    )


def planned_axes(config: RunConfig) -> dict[str, int] | None:
    """Devices along the axes of the mesh, if the config has one."""
    mesh = config.load.mesh
    return None if mesh is None else {str(axis): n for axis, n in dict(mesh).items()}  # pyright: ignore[reportArgumentType]


def planned_config(cfg: GemmaConfig, config: RunConfig) -> GemmaConfig:
    """The architecture without the towers that the run does not load."""
    if (wanted := config.load.modalities) is None:
        return cfg
    vision = cfg.vision if "image" in wanted else None
    audio = cfg.audio if "audio" in wanted else None
    return replace(cfg, vision=vision, audio=audio)


def planned_training(
    config: RunConfig, reference: GemmaConfig | None, tables: Mapping[str, Any]
) -> Training:
    """What is trained, and how: the parts, objective and optimizer that the run makes, too.

    Args:
      reference: Architecture of the second model, if the config names one.
      tables: The config as it was written.
    """
    load, objective = config.load, config.objective
    slices = [Slice(**given) for given in objective.get("submodels", ())]
    return Training(
        make=partial(_made, config, reference),
        batch=partial(_batch, config),
        micro_batches=config.micro_batches,
        models=1 + bool(objective.get("widths")),  # all channels are computed, whatever is drawn
        slices=slices,
        own_reference=_own_reference(config),
        rows_per_row=2 if config.data.pairs else 1,
        runtime=Runtime(
            numerics=resolve_numerics(load.numerics),
            vision_dtype=None if load.vision_dtype is None else jnp.dtype(load.vision_dtype),
            remat=False,  # as in loading; `make_parts` puts in what the config says
        ),
        layout=load.layout or "scan",
        stores=True,
        said={name: tables[name] for name in PLANNED if name in tables},
    )


def _own_reference(config: RunConfig) -> bool:
    """Whether the model itself, without its adapters, is what the objective compares with."""
    return OBJECTIVES[config.objective["name"]].other is not None and config.reference is None


def _made(
    config: RunConfig, reference: GemmaConfig | None, model: Gemma, make_other: MakeOther
) -> Made:
    def other() -> Gemma:
        assert reference is not None
        return make_other(planned_config(reference, config))

    parts, objective, model = make_parts(config, model, other)
    steps = config.steps or len(config.optimizer.rates) or 1
    return Made(parts, objective, make_optimizer(config.optimizer, model, steps))


def _batch(config: RunConfig, cfg: GemmaConfig, rows: int, tokens: int) -> Any:
    """The shapes of what `training.data` assembles; of images, as many as the config names."""

    def of(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, tokens), dtype)

    data, media = config.data, None
    if data.max_sounds:
        raise ValueError("data.max_sounds: the lengths of sounds are not known without the files")
    if data.max_images:
        modalities = [m for m in modalities_of(cfg) if m.name == "image"]
        if not modalities or cfg.vision is None:
            raise ValueError("data.max_images: the model does not see, or leaves out its tower")
        size, items = cfg.vision.image_size, rows * data.max_images
        pixels = jax.ShapeDtypeStruct((items, 3, size, size), jnp.float32)
        block = of(jnp.int32) if modalities[0].bidirectional else None
        media = Media(inputs={"image": pixels}, index_BT=of(jnp.int32), block_BT=block)
    documents = of(jnp.int32) if data.packing != "off" else None
    batch = Batch(of(jnp.int32), of(jnp.int32), documents_BT=documents)
    read = TrainBatch(batch, weights_BT=of(jnp.float32), media=media)
    return PreferenceBatch(read) if data.pairs else read
