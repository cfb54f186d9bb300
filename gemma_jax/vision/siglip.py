"""The SigLIP tower: pixels to one vector per patch.

x = patches(pixels) + positions
for each layer:  x = x + attention(layer_norm(x))
                 x = x + ffn(layer_norm(x))
layer_norm(x)

Every patch sees every other one (hf `models/siglip/modeling_siglip.py`; no pooling head).

Local letters: I images; Q patches of an image; C width of the tower; Y pixel rows of a patch; X
pixel columns; U colour channels. N, H, F and L are the tower's own: an image is what a row of the
batch is in the text.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.encoder_config import VisionConfig
from gemma_jax.nn.einsum import Einsum
from gemma_jax.nn.layer_groups import Layout, group_layers
from gemma_jax.nn.layer_stack import LayerOutput, run_layers, stack_layers
from gemma_jax.nn.norm import LayerNorm
from gemma_jax.runtime import Runtime
from gemma_kernels.attention import AttentionSpec, attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TowerContext:
    """What all layers of one pass share; the tower's part of `Context`."""

    runtime: Runtime = field(metadata={"static": True})
    capture: frozenset[str] = field(default=frozenset(), metadata={"static": True})

    def place(self, x_IQC: jax.Array) -> jax.Array:
        """The stream where a mesh has it: whole on every device, as images are few."""
        partition = self.runtime.partition
        return x_IQC if partition is None else partition.constrain(x_IQC)


class Patches(nnx.Module):
    """Each patch of pixels to a vector, plus a learned vector for its place."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        sizes = cfg.sizes
        self.patch_size = cfg.patch_size
        self.proj = Einsum("IQUYX,CUYX->IQC", sizes, bias=True, rngs=rngs)
        positions = rngs.normal((sizes["Q"], sizes["C"])) * sizes["C"] ** -0.5
        self.positions = nnx.Param(positions, dims="QC")

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """`pixels [I, U, height, width]` to `[I, Q, C]`; patches in reading order."""
        I, U, height, width = pixels.shape
        Y = X = self.patch_size
        grid = pixels.reshape(I, U, height // Y, Y, width // X, X)
        patches_IQUYX = jnp.transpose(grid, (0, 2, 4, 1, 3, 5)).reshape(I, -1, U, Y, X)
        return self.proj(patches_IQUYX) + self.positions[...].astype(pixels.dtype)


class TowerAttention(nnx.Module):
    """Every patch attends to every patch of its image."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        sizes = cfg.sizes
        self.q = Einsum("IQC,NHC->IQNH", sizes, bias=True, rngs=rngs)
        self.k = Einsum("IQC,NHC->IQNH", sizes, bias=True, rngs=rngs)
        self.v = Einsum("IQC,NHC->IQNH", sizes, bias=True, rngs=rngs)
        self.o = Einsum("IQNH,CNH->IQC", sizes, bias=True, rngs=rngs)
        self.spec = AttentionSpec(scale=sizes["H"] ** -0.5, masked=False)

    def __call__(self, x_IQC: jax.Array, ctx: TowerContext) -> jax.Array:
        def attend(q_IQNH, k_IQNH, v_IQNH):
            name = ctx.runtime.attention_impl
            return attention(q_IQNH, k_IQNH, v_IQNH, spec=self.spec, implementation=name)

        heads = (self.q(x_IQC), self.k(x_IQC), self.v(x_IQC))
        if (partition := ctx.runtime.partition) is None:
            out_IQNH = attend(*heads)
        else:
            out_IQNH = partition.run(attend, "IQNH", *(("IQNH", x) for x in heads))
        return self.o(out_IQNH)


class TowerFeedForward(nnx.Module):
    """`down(gelu(up x))` with the tanh approximation of GELU."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        self.up = Einsum("IQC,FC->IQF", cfg.sizes, bias=True, rngs=rngs)
        self.down = Einsum("IQF,CF->IQC", cfg.sizes, bias=True, rngs=rngs)

    def __call__(self, x_IQC: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_IQC), approximate=True))


class TowerBlock(nnx.Module):
    """One layer of the tower; the interface is that of the decoder's `Block`, without a cache."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        self.pre_attn_norm = LayerNorm("C", cfg.d_tower, cfg.norm_eps)
        self.attn = TowerAttention(cfg, rngs=rngs)
        self.pre_ffn_norm = LayerNorm("C", cfg.d_tower, cfg.norm_eps)
        self.ffn = TowerFeedForward(cfg, rngs=rngs)

    def __call__(self, x_IQC: jax.Array, ctx: TowerContext, cache: None) -> LayerOutput:
        with jax.named_scope("attention"):
            x_IQC += self.attn(self.pre_attn_norm(x_IQC), ctx)
        with jax.named_scope("ffn"):
            x_IQC += self.ffn(self.pre_ffn_norm(x_IQC))
        return LayerOutput(x=x_IQC, captured={"layer_outputs": x_IQC})


class Tower(nnx.Module):
    """`pixels [I, 3, size, size]` in [-1, 1] to `[I, Q, C]`."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs, layout: Layout):
        self.layer_groups = group_layers((cfg,) * cfg.num_layers, layout)
        self.patches = Patches(cfg, rngs=rngs)
        self.blocks = stack_layers(
            lambda spec, r: TowerBlock(spec, rngs=r), self.layer_groups, rngs
        )
        self.final_norm = LayerNorm("C", cfg.d_tower, cfg.norm_eps)

    def __call__(
        self, pixels: jax.Array, ctx: TowerContext
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        x_IQC = self.patches(pixels)
        out = run_layers(self.blocks, self.layer_groups, x_IQC, ctx, None)
        return self.final_norm(out.x), out.captured
