"""The programs that a plan compiles: real ones, with shapes in the place of arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.cache import Cache, init_cache
from gemma_jax.decoder.model import Gemma, abstract_model
from gemma_jax.inference.decode import advance, empty_state
from gemma_jax.inference.prefill import PrefillChunk
from gemma_jax.inference.sampling import Sampling, SamplingRows
from gemma_jax.inference.session import CHUNK
from gemma_jax.nn.layer_groups import Layout
from gemma_jax.quantisation import store_weights
from gemma_jax.runtime import Runtime
from gemma_jax.sharding import Partition
from gemma_jax.storages import StorageRules, WeightStorage, is_narrower
from gemma_jax.weights.tree import flat_params, with_params

Mode = Literal["decode", "prefill", "train"]


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
      mode: One token for every row; the last chunk of prompt of every row, with its first new
        token (chunks before it cost less: nobody reads their logits); or a step of training on
        whole rows, of which `planning.training` says more.
      batch: Rows; in training, of a micro-batch.
      context: Tokens that the caches hold; in training, the length of a row.
      dtype: Of activations and, unless they are given, of weights and caches.
      weights: How matrices are stored, as in `LoadOptions`: `"int8"`, `"int4:64"`, `"bfloat16"`,
        or by patterns of names. What is trained are arrays always.
      cache_dtype: Of keys and values.
    """

    mode: Mode
    batch: int
    context: int
    dtype: str = "bfloat16"
    weights: WeightStorage | StorageRules | None = None
    cache_dtype: str | None = None
    attention_impl: str = "auto"

    @property
    def chunk(self) -> int:
        """New tokens per row and step."""
        return {"decode": 1, "prefill": min(CHUNK, self.context), "train": self.context}[self.mode]


def placed_model(
    cfg: GemmaConfig,
    work: Work,
    partition: Partition,
    runtime: Runtime | None = None,
    layout: Layout = "scan",
    stores: bool = True,
) -> Gemma:
    """The model as it would be loaded; the vision tower too, if the model has one.

    Args:
      runtime: How it computes, in all that `work` does not say.
      stores: Whether weights that are narrower than the arithmetic are stored, as in loading;
        otherwise they are arrays, which have gradients.
    """
    runtime = replace(
        runtime or Runtime(remat=work.mode == "train"),
        dtype=jnp.dtype(work.dtype),
        attention_impl=work.attention_impl,
        partition=partition,
    )
    stored = work.weights
    # As in loading: arrays, unless what is stored is narrower than the arithmetic.
    by_name = isinstance(stored, Mapping)
    narrower = stores and stored and (by_name or is_narrower(stored, work.dtype))
    dtype = work.dtype if narrower else stored or work.dtype
    model = abstract_model(cfg, runtime=runtime, layout=layout)

    def narrow(model: Gemma) -> Gemma:
        store = store_weights(stored)(model) if stored and narrower else lambda path, array: array
        arrays = {path: p.get_value().astype(dtype) for path, p in flat_params(model).items()}
        return with_params(model, {path: store(path, array) for path, array in arrays.items()})

    # The mesh in context tells how weights lie on the chips that the plan is for.
    with jax.sharding.use_abstract_mesh(partition.mesh.abstract_mesh):
        return with_shardings(jax.eval_shape(narrow, model), partition)


def abstract_cache(cfg: GemmaConfig, work: Work, model: Gemma, partition: Partition) -> Cache:
    dtype = work.cache_dtype or work.dtype
    make = partial(init_cache, cfg, model.layer_groups, work.batch, work.context, dtype)
    return with_shardings(jax.eval_shape(make), partition)


def with_shardings(tree: Any, partition: Partition) -> Any:
    """Shapes and dtypes, with the shardings that arrays would have."""
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        tree,
        partition.shardings(tree),
    )


def lower(model: Gemma, work: Work, partition: Partition) -> jax.stages.Lowered:
    """One step of generation, traced and lowered for the mesh of `partition`."""
    # The mesh in context tells kernels which chip they are for.
    with jax.sharding.use_abstract_mesh(partition.mesh.abstract_mesh):
        return _lower_generation(model, work, partition)


def _lower_generation(model: Gemma, work: Work, partition: Partition) -> jax.stages.Lowered:
    B, cfg = work.batch, model.cfg
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    state = jax.eval_shape(
        partial(
            empty_state,
            cfg=cfg,
            layer_groups=model.layer_groups,
            max_len=work.context,
            dtype=jnp.dtype(work.cache_dtype or work.dtype),
            new_tokens=CHUNK,
        ),
        jax.ShapeDtypeStruct((B,), jnp.uint32),
        SamplingRows.of([Sampling()] * B, cfg.vocab_size),
        ints(B, 4),
    )
    prompt = None
    if work.mode == "prefill":
        chunk = ints(B, work.chunk)
        prompt = PrefillChunk(Batch(chunk, chunk), jax.ShapeDtypeStruct((B,), bool))
    state, prompt = with_shardings((state, prompt), partition)
    return advance.lower(model, state, prompt, loop=prompt is None)
