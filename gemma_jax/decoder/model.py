"""The decoder: blocks, the stack of them, and one forward pass.

x = embed(tokens) * sqrt(D), or soft tokens in the place of some
for each layer:  x = x + post_norm(attention(pre_norm(x)))
                 x = x + post_norm(ffn(pre_norm(x)))
logits = embed.T(final_norm(x)), or head.T(...) of a model with a head of its own

Gemma 3n puts this into the middle of several streams: a layer predicts them all, computes one, and
corrects them all by its result. Gemma 4 has one stream; a layer ends with its per-layer input, and
a scale.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import jax
from flax import nnx

from gemma_jax.audio.encoder import AudioEncoder
from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.decoder.attention import Attention
from gemma_jax.decoder.cache import KeysValues, LayerCache
from gemma_jax.decoder.context import Context, tokens_at
from gemma_jax.nn.altup import AltUp, Streams
from gemma_jax.nn.embed import Embedder, ModalityEmbedder
from gemma_jax.nn.embedding_head import EmbeddingHead
from gemma_jax.nn.encoders import encoders_of
from gemma_jax.nn.ffn import FeedForward
from gemma_jax.nn.laurel import Laurel
from gemma_jax.nn.layer_groups import Layout, group_layers
from gemma_jax.nn.layer_scale import LayerScale
from gemma_jax.nn.layer_stack import LayerOutput, stack_layers
from gemma_jax.nn.norm import RMSNorm
from gemma_jax.nn.per_layer import PerLayerEmbedder, PerLayerInput
from gemma_jax.runtime import Runtime
from gemma_jax.vision.encoder import VisionEncoder
from gemma_jax.vision.mobilenet import MobileNetEncoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInputs:
    """What one layer gets besides the stream; stacked along a leading L for all of them.

    Attributes:
      vector_BTP: Its part of the per-layer inputs, in models that have them.
      width: Feed-forward channels to compute with; `None` for all.
      layer: Its number, for patches; `None` without.
    """

    vector_BTP: jax.Array | None = None
    width: jax.Array | None = None
    layer: jax.Array | None = None

    def at(self, chosen_BT: jax.Array) -> "LayerInputs":
        """The inputs, of all layers, for some tokens alone; see `Context.at`."""
        if self.vector_BTP is None:
            return self
        return replace(self, vector_BTP=tokens_at(chosen_BT, self.vector_BTP, axis=2))


class Block(nnx.Module):
    """Computes one decoder layer: attention and feed-forward, each between norms, on a stream.

    With AltUp and LAuReL as far as the config has them, and the sub-blocks that the spec names:
    per-layer inputs, a scale (hf `Gemma3nTextDecoderLayer`, `Gemma4TextDecoderLayer`).

    A subclass may put other modules in the place of its own, or have another `compute`;
    `Gemma(cfg, block=...)` makes a model of it. The feed-forward `ffn` may be any module that maps
    `[B, T, D]` to the same; what some models have besides (widths of MatFormers, sparsity) it is
    given by name. Attention writes caches: another one is best made as a subclass of `Attention`.

    Examples:
      >>> import gemma_jax as gj
      >>> from flax import nnx
      >>> class Squared(nnx.Module):
      ...     def __init__(self, cfg, spec, *, rngs):
      ...         self.up = nnx.Linear(cfg.d_model, spec.d_ff, rngs=rngs)
      ...         self.down = nnx.Linear(spec.d_ff, cfg.d_model, rngs=rngs)
      ...
      ...     def __call__(self, x_BTD):
      ...         return self.down(nnx.relu(self.up(x_BTD)) ** 2)
      >>> class SquaredBlock(gj.Block):
      ...     def __init__(self, cfg, spec, *, rngs):
      ...         super().__init__(cfg, spec, rngs=rngs)
      ...         self.ffn = Squared(cfg, spec, rngs=rngs)
      >>> cfg = gj.load_model("checkpoints/digits").cfg
      >>> model = gj.Gemma(cfg, rngs=nnx.Rngs(0), block=SquaredBlock)
      >>> model.blocks[0][0].ffn.up.kernel.shape[-2:]  # in front: layers that are stacked
      (64, 256)
    """

    def __init__(self, cfg: GemmaConfig, spec: LayerSpec, *, rngs: nnx.Rngs):
        def norm():
            return RMSNorm(cfg, "D")

        self.spec, named = spec, cfg.sub_blocks_of(spec)
        self.altup = AltUp(cfg, rngs=rngs) if cfg.altup else None
        self.laurel = Laurel(cfg, rngs=rngs) if cfg.laurel_rank else None
        self.per_layer = PerLayerInput(cfg, rngs=rngs) if "per_layer" in named else None
        self.pre_attn_norm = norm()
        self.attn = Attention(cfg, spec, rngs=rngs)
        self.post_attn_norm = norm() if cfg.post_norms else None
        self.pre_ffn_norm = norm()
        self.ffn = FeedForward(cfg, spec, rngs=rngs)
        self.post_ffn_norm = norm() if cfg.post_norms else None
        self.layer_scale = LayerScale() if "layer_scale" in named else None

    def __call__(
        self,
        x: jax.Array,
        ctx: Context,
        cache: LayerCache | None,
        inputs: LayerInputs = LayerInputs(),
    ) -> LayerOutput:
        """The stream `[B, T, D]`, or streams `[A, B, T, D]`, after this layer."""
        numerics, extra = ctx.runtime.numerics, {}
        ctx = replace(ctx, layer=inputs.layer)
        note = partial(ctx.note, extra)
        if self.altup is not None:
            with jax.named_scope("altup"):
                x = note("altup_predictions", self.altup.predict(x, numerics, note))
        y_BTD, cache, kv, captured = self.compute(
            x if self.altup is None else x[self.altup.active], ctx, cache, inputs.width
        )
        if self.altup is None:
            x = active_BTD = y_BTD
        else:
            with jax.named_scope("altup"):
                x = self.altup.correct(x, y_BTD, numerics, note)
                active_BTD = self.altup.scaled(x)
        if self.per_layer is not None:
            with jax.named_scope("per_layer"):
                y_BTD = self.per_layer(active_BTD, inputs.vector_BTP, numerics, note)
                y_BTD = note("per_layer_outputs", y_BTD)
                # The first stream is left alone, whichever one is active.
                x = x + y_BTD if self.altup is None else x.at[1:].add(y_BTD)
        if self.layer_scale is not None:
            x = self.layer_scale(x)
        shared_kv = {self.spec.kind: kv} if self.spec.kv == "lent" else {}
        x = note("layer_outputs", x)
        return LayerOutput(x=x, cache=cache, captured=captured | extra, shared_kv=shared_kv)

    def keys_values(
        self,
        x: jax.Array,
        ctx: Context,
        cache: LayerCache | None,
        inputs: LayerInputs = LayerInputs(),
    ) -> LayerOutput:
        """What later passes read of these tokens, and nothing else: keys and values, in the cache.

        The layer itself reads them, too, where they are put into the context: so it may run for
        fewer queries than it has keys.
        """
        numerics = ctx.runtime.numerics
        x_BTD = x if self.altup is None else self.altup.predict(x, numerics)[self.altup.active]
        kv, cache = self.attn.keys_values(self.pre_attn_norm(x_BTD, numerics), ctx, cache)
        return LayerOutput(x=x, cache=cache, shared_kv={self.spec.kind: kv})

    def compute(
        self,
        x_BTD: jax.Array,
        ctx: Context,
        cache: LayerCache | None,
        width: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None, KeysValues, dict[str, jax.Array]]:
        """Attention, with LAuReL beside it, and feed-forward, on one stream.

        Args:
          x_BTD: The residual stream.
          ctx: What the pass knows: positions, masks, the `Runtime`.
          cache: The layer's, or `None`.
          width: Of the feed-forward; `None` for all of it.

        Returns:
          The stream after the layer, the cache after this pass, what attention attended to, and
          captured intermediates by name.
        """
        numerics = ctx.runtime.numerics
        normed_BTD = self.pre_attn_norm(x_BTD, numerics)
        with jax.named_scope("attention"):
            y_BTD, cache, kv, captured = self.attn(normed_BTD, ctx, cache)
            y_BTD = y_BTD if self.post_attn_norm is None else self.post_attn_norm(y_BTD, numerics)
            x_BTD += ctx.note(captured, "attention_outputs", y_BTD)
        if self.laurel is not None:
            with jax.named_scope("laurel"):
                y_BTD = ctx.note(captured, "laurel", self.laurel(normed_BTD, numerics))
                x_BTD = (x_BTD + y_BTD) / math.sqrt(2)
        with jax.named_scope("ffn"):
            sparsity = self.spec.sparsity
            given = {"width": width, "deviations": ctx.deviations[sparsity] if sparsity else None}
            given = {name: value for name, value in given.items() if value is not None}
            out = self.ffn(self.pre_ffn_norm(x_BTD, numerics), **given)
            y_BTD, masks = out if isinstance(out, tuple) else (out, {})
            y_BTD = y_BTD if self.post_ffn_norm is None else self.post_ffn_norm(y_BTD, numerics)
            x_BTD += ctx.note(captured, "ffn_outputs", y_BTD)
        return x_BTD, cache, kv, captured | masks


MakeBlock = Callable[..., nnx.Module]  # of config and spec, and of `rngs` by name


def make_block(block: MakeBlock, cfg: GemmaConfig, spec: LayerSpec, rngs: nnx.Rngs) -> nnx.Module:
    """A layer by a factory of the user's.

    Raises:
      TypeError: The factory takes other arguments, or what it makes is called with others.
    """
    name = getattr(block, "__name__", None) or f"<{type(block).__name__}>"
    # What a class takes is asked of its own method: that of nnx's metaclass takes everything.
    made_by = partial(block.__init__, None) if inspect.isclass(block) else block
    if not (callable(block) and _takes(made_by, cfg, spec, rngs=rngs)):
        raise TypeError(
            f"block={name} must be called as block(cfg, spec, rngs=rngs): a subclass of "
            "gj.Block, or a function that makes one"
        )
    made = block if inspect.isclass(block) else type(layer := block(cfg, spec, rngs=rngs))
    is_layer = issubclass(made, nnx.Module) and "__call__" in dir(made)  # not the metaclass's
    if not (is_layer and _takes(made.__call__, None, None, None, None, None)):
        raise TypeError(
            f"block={name} makes {made.__name__}, which is no layer: give a subclass of "
            "gj.Block, or what is called as one, (x, ctx, cache, inputs)"
        )
    return block(cfg, spec, rngs=rngs) if inspect.isclass(block) else layer


def _takes(function: Callable, *args: object, **named: object) -> bool:
    try:
        inspect.signature(function).bind(*args, **named)
    except TypeError:
        return False
    return True


class Gemma(nnx.Module):
    """Holds the parameters of a model. Stateless: caches go into `forward` and come back from it.

    A new one has random weights: those of linear maps come from a normal distribution with a
    variance of one over the number of inputs, those of the embedding with one over `d_model` (rows
    are scaled by `sqrt(d_model)` when read), and norms begin as the identity. Streams and logits
    have a variance near one then, and losses lie half a nat above a uniform guess.

    Layers that are alike are stacked: a parameter in `blocks[group][position]` has an axis in front
    of its own, of the layers that are stacked there; in the layout `"unrolled"` it is one layer.
    `block` is mapped over that axis and need not know of it. A module that is put into a finished
    model has to have it.

    Args:
      cfg: What the model is.
      rngs: Where its random weights come from.
      runtime: How it computes.
      layout: How layers are stacked; see `gemma_jax.nn.layer_groups`.
      block: Makes a layer, `(cfg, spec, *, rngs) -> module`, which is called as `Block` is: a
        subclass of it, as a rule. `save_orbax` notes what its modules are called, and loading asks
        for the same `block`; other formats refuse such a model.

    Examples:
      >>> import gemma_jax as gj
      >>> from flax import nnx
      >>> model = gj.load_model("checkpoints/digits")  # or gj.Gemma(cfg, rngs=nnx.Rngs(0))
      >>> model.blocks[0][0].attn.q.w.shape[-3:], model.blocks[0][0].attn.q.w.dims
      ((4, 32, 64), 'NHD')
    """

    vision: VisionEncoder | MobileNetEncoder | None = None
    audio: AudioEncoder | None = None
    text_embedding: EmbeddingHead | None = None

    def __init__(
        self,
        cfg: GemmaConfig,
        *,
        rngs: nnx.Rngs,
        runtime: Runtime = Runtime(),
        layout: Layout = "scan",
        block: MakeBlock = Block,
    ):
        if not isinstance(cfg, GemmaConfig):
            raise TypeError(
                f"cfg must be a GemmaConfig, such as gj.preset(name), got {type(cfg).__name__}"
            )
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs must be nnx.Rngs(seed), got {type(rngs).__name__}")
        self.cfg, self.runtime, self.make_block = cfg, runtime, block
        self.layer_groups = group_layers(cfg.layers, layout)
        self.embed = Embedder(cfg, rngs=rngs)
        self.modality_embedders = nnx.List(
            [ModalityEmbedder(cfg, ids, rngs=rngs) for ids in cfg.modality_vocabularies]
        )
        self.blocks = stack_layers(
            lambda spec, r: make_block(block, cfg, spec, r), self.layer_groups, rngs
        )
        self.per_layer = PerLayerEmbedder(cfg, rngs=rngs) if cfg.per_layer else None
        self.streams = Streams(cfg, rngs=rngs) if cfg.altup else None
        self.final_norm = RMSNorm(cfg, "D")
        for name, encoder in encoders_of(cfg, rngs=rngs, layout=layout).items():
            setattr(self, name, encoder)  # `vision`, say
        if cfg.text_embedding is not None:
            self.text_embedding = EmbeddingHead(cfg.text_embedding, cfg.d_model, rngs=rngs)

    def __call__(self, *args, **options):
        """Says how a model is run, as a hint to those who call it."""
        raise TypeError("a model is run by gj.forward(model, ids) or gj.generate(model, tok, text)")

    @property
    def soft_cap(self) -> float | None:
        """Cap on the logits, under the numerics in use."""
        cfg, numerics = self.cfg, self.runtime.numerics
        left_out = cfg.optional_final_cap and not numerics.optional_final_cap
        return None if left_out else cfg.final_soft_cap


@lru_cache(maxsize=32)  # tracing takes a while, and many callers want the same one
def abstract_model(
    cfg: GemmaConfig,
    *,
    runtime: Runtime = Runtime(),
    layout: Layout = "scan",
    block: MakeBlock = Block,
) -> Gemma:
    """The model with `jax.ShapeDtypeStruct`s for arrays. Shared by callers: not to be changed."""
    make = partial(Gemma, cfg, runtime=runtime, layout=layout, block=block)
    return jax.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
