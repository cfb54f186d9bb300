"""Adapters of PEFT: folders in and out, and new ones by PEFT's names of modules."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from gemma_jax.adapters import HEAD, TABLE, Adapter, factors_of
from gemma_jax.decoder.model import Gemma
from gemma_jax.resident_adapters import hold
from gemma_jax.training.lora import Lora, begin, chosen_by_name
from gemma_jax.training.trainable import Trainable
from gemma_jax.weights.adapted import Adapted
from gemma_jax.weights.protocol import Weight
from gemma_jax.weights.tree import flat_params


def lora(model: Gemma, settings: Lora = Lora(), key: jax.Array | None = None) -> Trainable:
    """Puts new low-rank adapters beside a model's weights, and says what of it is trained.

    Args:
      model: With weights in any form; without arrays (`jax.ShapeDtypeStruct`) for planning.
      settings: Which matrices, and how.
      key: Of the random factors; default: `jax.random.key(0)`.

    Returns:
      The triple of `trainable`, of float32 factors: `make_step(objective, optimizer, join)`. The
      model that `join` makes computes what `model` does at first.

    Raises:
      ValueError: Targets that this model does not have; a model that has adapters already.

    Examples:
      >>> import gemma_jax as gj
      >>> import jax
      >>> model = gj.load_model("checkpoints/digits", weights="int8")
      >>> settings = gj.Lora(rank=4, target_modules=("q_proj", "v_proj"))
      >>> trained, frozen, join = gj.lora(model, settings, jax.random.key(0))
      >>> {array.shape[:2] for path, array in trained.items() if path[-1] == "a"}
      {(1, 4)}
    """
    key = jax.random.key(0) if key is None else key
    if settings.target_modules is None:
        chosen, whole = chosen_by_name(model, settings)
    else:
        from gemma_checkpoints.hf.new_adapters import chosen_by_peft

        chosen, whole = chosen_by_peft(model, settings)
    return begin(model, chosen, whole, settings, key)


def load_adapter(model: Gemma, folder: str | Path, *, only_decoder: bool = False) -> Gemma:
    """Puts the adapter of a PEFT folder into a model; it shares all arrays of this one.

    Args:
      folder: With `adapter_config.json` and `adapter_model.safetensors`; LoRA, DoRA and rsLoRA of
        matrices and embeddings, with parameters that were saved whole.
      only_decoder: Leaves out what the folder has for towers that the model does not have.

    Raises:
      ValueError: The folder asks for what is not done here, or does not fit the model, with all
        that is wrong: keys that fit nothing, and modules without factors.

    Examples:
      >>> import gemma_jax as gj
      >>> import tempfile
      >>> model = gj.load_model("checkpoints/digits")
      >>> trained, frozen, join = gj.lora(model, gj.Lora(rank=2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     saved = gj.save_adapter(join(trained, frozen), f"{folder}/mine")
      ...     again = gj.load_adapter(model, saved)
      >>> again.blocks[0][0].attn.q.w.get_value().a.shape
      (1, 2, 64)
    """
    from gemma_checkpoints import load_adapter

    return load_adapter(model, folder, only_decoder=only_decoder)


def save_adapter(
    model: Gemma, folder: str | Path, settings: Lora | None = None, *, base: str | None = None
) -> Path:
    """Saves the adapters of a model as a new PEFT folder; `load_adapter` and PEFT read it.

    Args:
      model: With adapters: `join(state.trained, frozen)`, after training.
      folder: Must not exist, or be empty. It appears whole or not at all.
      settings: By which the adapters were made. They say what was trained whole; without them only
        factors are saved.
      base: Name or path of the base model, which PEFT loads first.

    Raises:
      ValueError: The model has no adapters, or some where transformers has no module for PEFT; the
        folder is taken or cannot be written.

    Examples:
      >>> import gemma_jax as gj
      >>> import tempfile
      >>> settings = gj.Lora(rank=2, target_modules=("q_proj", "v_proj"))
      >>> trained, frozen, join = gj.lora(gj.load_model("checkpoints/digits"), settings)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     saved = gj.save_adapter(join(trained, frozen), f"{folder}/mine", settings)
      ...     sorted(path.name for path in saved.iterdir())
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    from gemma_checkpoints import save_adapter

    return save_adapter(model, folder, settings, base=base)


def with_adapters(model: Gemma, adapters: Mapping[str, str | Path | Gemma]) -> Gemma:
    """Holds several adapters beside one model; `choose_adapters` says which of them rows have.

    Their targets and ranks may differ, and DoRA may stand beside LoRA. The factors of all of them
    lie on the device; those of the rows are gathered in every product.

    Args:
      adapters: Name -> PEFT folder, or this model with an adapter.

    Returns:
      The model with none of them chosen.

    Raises:
      ValueError: An adapter that does not fit, or holds whole parameters (`modules_to_save`).

    Examples:
      >>> import gemma_jax as gj
      >>> model = gj.load_model("checkpoints/digits", modalities=("text",))
      >>> trained, frozen, join = gj.lora(model, gj.Lora(rank=2))
      >>> held = gj.with_adapters(model, {"one": join(trained, frozen)})
      >>> held.blocks[0][0].attn.q.w.get_value().names
      ('one',)
    """
    return hold(model, {name: _adapter(model, given) for name, given in adapters.items()})


def _adapter(model: Gemma, given: str | Path | Gemma) -> Adapter:
    if not isinstance(given, Gemma):
        from gemma_checkpoints.hf.adapters import read_adapter

        return read_adapter(model, given)
    factors = factors_of(given)
    own_head = model.cfg.tied_head and not given.cfg.tied_head and TABLE in factors
    base = {path: param.get_value() for path, param in flat_params(model).items()}
    for path, param in flat_params(given).items():
        value, name = param.get_value(), ".".join(map(str, path))
        value = value.base if isinstance(value, Adapted) else value
        if name != HEAD and not _same(value, base.get(path)):
            raise ValueError(f"{name}: the adapted model has another weight than this one")
    return Adapter(factors, own_head=own_head)


def _same(value: Weight, other: Weight | None) -> bool:
    """Whether two weights are the same arrays, or hold the same numbers."""
    ours, theirs = jax.tree.leaves(value), jax.tree.leaves(other)
    return len(ours) == len(theirs) and all(
        a is b or bool(jnp.array_equal(a, b)) for a, b in zip(ours, theirs)
    )
