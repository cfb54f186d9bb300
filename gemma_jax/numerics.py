"""Where two reference implementations round differently, by name.

In float32 the differences are rounding noise; in bfloat16 they are not, so parity must say with
whom. `"hf"` follows Hugging Face transformers (`models/gemma3/modeling_gemma3.py`), `"gdm"`
google-deepmind/gemma (`gm/nn/_modules.py`, `_layers.py`, `gm/math/_positional_embeddings.py`).
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Says how a reference implementation rounds: one field per known difference.

    Attributes:
      norm_in_float32: RMSNorm runs in float32 and casts its product back (hf `Gemma3RMSNorm`), or
        stays in the activation dtype (gdm `_layers.RMSNorm`).
      rotate_in_float32: RoPE rotates in float32 and casts the result (gdm `apply_rope`), or casts
        cos and sin to the activation dtype first (hf `Gemma3RotaryEmbedding.forward`).
      divide_positions: Angles are `position / timescale / factor` (gdm), or
        `position * (1 / timescale / factor)` with a rounded inverse frequency (hf).
      scale_queries: The attention scale multiplies the queries (gdm), or the scores (hf).
      clip_altup: AltUp's coefficient weights are clipped in every pass (gdm `_altup.py`), or not
        at all outside of training (hf `Gemma3nTextAltUp`).
      optional_final_cap: The final soft cap applies also where a config calls it optional (hf), or
        not (gdm `_gemma3n.py` has none).
      softmax_in_float32: Scores go through the softmax in float32 (hf), or in the activation
        dtype (gdm).
      float16_matrices: Layers multiply float16 inside of activations in a wider dtype, with what
        enters clamped to float16's range: neither reference does. See `weights.float16`.

    Examples:
      >>> from gemma_jax.numerics import NUMERICS
      >>> NUMERICS["hf"].norm_in_float32, NUMERICS["gdm"].norm_in_float32
      (True, False)
    """

    norm_in_float32: bool
    rotate_in_float32: bool
    divide_positions: bool
    scale_queries: bool
    softmax_in_float32: bool
    clip_altup: bool
    optional_final_cap: bool
    float16_matrices: bool = False


NUMERICS = {
    "hf": Numerics(
        norm_in_float32=True,
        rotate_in_float32=False,
        divide_positions=False,
        scale_queries=False,
        softmax_in_float32=True,
        clip_altup=False,
        optional_final_cap=True,
    ),
    "gdm": Numerics(
        norm_in_float32=False,
        rotate_in_float32=True,
        divide_positions=True,
        scale_queries=True,
        softmax_in_float32=False,
        clip_altup=True,
        optional_final_cap=False,
    ),
}


def resolve_numerics(numerics: str | Numerics) -> Numerics:
    """`"hf"` or `"gdm"` -> `Numerics`; a `Numerics` passes through.

    `"float16"` is `"hf"` with matrices in float16, to be run with activations in float32.
    """
    if isinstance(numerics, Numerics):
        return numerics
    if numerics == "float16":
        return replace(NUMERICS["hf"], float16_matrices=True)
    if numerics not in NUMERICS:
        raise ValueError(f"{numerics=} must be one of: {', '.join(NUMERICS)}, float16")
    return NUMERICS[numerics]
