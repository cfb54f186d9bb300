"""Chooses the encoder of a kind of input by the type of its config.

A tower registers what builds it, as `vision/encoder.py` does; the model holds each encoder under
the name that its config has in `GemmaConfig`. How its soft tokens enter a text says the `Modality`.
"""

from dataclasses import fields
from functools import singledispatch

from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.nn.layer_groups import Layout


@singledispatch
def encoder_of(
    config: object, cfg: GemmaConfig, *, rngs: nnx.Rngs, layout: Layout
) -> nnx.Module | None:
    """The encoder that a part of a config describes, by its type; `None` for all other parts.

    Args:
      config: The part, `cfg.vision` say.
      cfg: The whole of it, for the width of soft tokens.
    """
    return None


def encoders_of(cfg: GemmaConfig, *, rngs: nnx.Rngs, layout: Layout) -> dict[str, nnx.Module]:
    """Name of a part of the config -> its encoder, in the order of the config."""
    parts = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    made = {name: encoder_of(part, cfg, rngs=rngs, layout=layout) for name, part in parts.items()}
    return {name: encoder for name, encoder in made.items() if encoder is not None}
