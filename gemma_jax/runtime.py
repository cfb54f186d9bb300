"""How a model computes, as opposed to what it is."""

from dataclasses import dataclass, field

import jax.numpy as jnp

from gemma_jax.numerics import NUMERICS, Numerics
from gemma_jax.platforms import leave_out_absent_tpu
from gemma_jax.remat import FULL, NONE, check_policy
from gemma_jax.sharding import Partition
from gemma_jax.storages import CACHE_STORAGES, one_of

leave_out_absent_tpu()  # every model needs this module: nobody who runs one can forget it


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Says how a model computes (dtypes, attention, mesh); `GemmaConfig` says what it is.

    Attributes:
      dtype: Dtype of activations. Parameters may be stored in another.
      numerics: Whose roundings to follow; see `numerics.py`.
      attention_impl: Name of an attention implementation; `"auto"`: by platform and shape.
      vision_dtype: Dtype inside the vision tower; `None` for `dtype`.
      cache_dtype: Dtype of keys and values in caches, int8 with a scale per token and head; `None`
        for `dtype`.
      remat: What a layer keeps for its gradient, by the name of a policy of `gemma_jax.remat`; all
        else is computed again in the backward pass. `False` is `"none"`: it keeps everything;
        `True` is `"full"`: only what passes between layers.
      partition: The mesh that the model lies on, and how; `None` on one device.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits", cache_dtype="int8")
      >>> model.runtime.dtype, model.runtime.kv_dtype
      (dtype('float32'), dtype('int8'))
    """

    dtype: jnp.dtype = field(default_factory=lambda: jnp.dtype("float32"))
    numerics: Numerics = NUMERICS["hf"]
    attention_impl: str = "auto"
    vision_dtype: jnp.dtype | None = None
    cache_dtype: jnp.dtype | None = None
    remat: bool | str = False
    partition: Partition | None = None

    def __post_init__(self):
        if self.cache_dtype not in (None, *CACHE_STORAGES):
            raise ValueError(f"cache_dtype={self.cache_dtype} must be {one_of(CACHE_STORAGES)}")
        check_policy(self.remat_policy)

    @property
    def remat_policy(self) -> str:
        """The name of what a layer keeps for its gradient."""
        return {False: NONE, True: FULL}.get(self.remat, self.remat)

    @property
    def kv_dtype(self) -> jnp.dtype:
        """Dtype of keys and values in caches."""
        return self.cache_dtype or self.dtype
