"""What a Gemma is made of, as frozen data. No arrays, no dtypes, no device.

A model is one `GemmaConfig`; what may differ from layer to layer lives in a `LayerSpec`. The
generations differ only in these values: Gemma 1 has global layers alone, Gemma 2 adds soft caps
and post-norms and alternates local with global, Gemma 3 drops the caps for QK-norm and makes five
of six layers local. Gemma 3n brings parts of its own, each in a config of its own: AltUp, LAuReL,
per-layer embeddings; its last layers share keys and values, its first ones are sparse.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from gemma_jax.encoder_config import AudioConfig, MobileNetConfig, VisionConfig
from gemma_jax.field_types import check_positive, check_types
from gemma_jax.text_embedding_config import TextEmbeddingConfig

Activation = Literal["gelu_tanh", "gelu", "silu", "relu"]


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Describes one decoder layer: its attention, rotary embedding and feed-forward width.

    Attributes:
      kind: `"local"` (sees `window` keys, itself included) or `"global"` (sees all keys before it).
      window: Number of visible keys of a local layer, its own included; `None` for a global one. If
        the model reads both ways, as many to either side (see `GemmaConfig.bidirectional`).
      rope_theta: Base wavelength of the rotary embedding.
      rope_scale: Linear position scaling; angles are divided by it (8 in the global layers of
        Gemma 3 4B, 12B and 27B, else 1).
      d_ff: Width `F` of the feed-forward network.
      sparsity: Share of the gate that is cut off, by a threshold that would be exact if the gate
        were normally distributed (Gemma 3n's first layers, 0.95).
      kv: Whose keys and values the layer attends to: its `"own"`; its own, which later layers of
        its kind read as well (`"lent"`); or those that were lent (`"shared"`, Gemma 3n's last
        layers). See `share_kv`.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.LayerSpec(kind="local", window=512, d_ff=2048).window
      512
    """

    kind: Literal["local", "global"]
    window: int | None = None
    rope_theta: float = 10_000.0
    rope_scale: float = 1.0
    d_ff: int
    sparsity: float = 0.0
    kv: Literal["own", "lent", "shared"] = "own"

    def __post_init__(self):
        check_types(self)
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must lie in [0, 1)")
        if (self.window is not None) != (self.kind == "local"):
            raise ValueError(f"a {self.kind} layer cannot have window={self.window}")
        check_positive(self, "rope_theta", "rope_scale", "d_ff")
        if self.window is not None:
            check_positive(self, "window")


def share_kv(specs: Sequence[LayerSpec], num_shared: int) -> tuple[LayerSpec, ...]:
    """The last `num_shared` layers read keys and values of the last layer of their kind before.

    Raises:
      ValueError: No layer of that kind comes before.
    """
    first = len(specs) - num_shared
    if not 0 <= num_shared <= len(specs):
        raise ValueError(f"{num_shared=} must lie in [0, {len(specs)}]")
    lenders = {spec.kind: i for i, spec in enumerate(specs[:first])}
    shared = {spec.kind for spec in specs[first:]}
    if missing := shared - set(lenders):
        raise ValueError(
            f"{num_shared=} of {len(specs)} layers: no {missing.pop()} layer before them has keys "
            "and values to share"
        )
    lending = {lenders[kind] for kind in shared}

    def role(i: int) -> Literal["own", "lent", "shared"]:
        return "shared" if i >= first else "lent" if i in lending else "own"

    return tuple(replace(spec, kv=role(i)) for i, spec in enumerate(specs))


@dataclass(frozen=True, kw_only=True)
class AltUpConfig:
    """Alternating updates: several residual streams, of which one layer computes but one.

    Attributes:
      num_streams: A.
      active: The stream that the layers read.
      coef_clip: Bound on the mixing coefficients where the named numerics applies it.
      correct_scale: Scale the active stream by a learned vector before the per-layer input.
    """

    num_streams: int = 4
    active: int = 0
    coef_clip: float | None = 120.0
    correct_scale: bool = True

    def __post_init__(self):
        check_types(self)
        check_positive(self, "num_streams")
        if not 0 <= self.active < self.num_streams:
            raise ValueError(f"active={self.active} must lie in [0, {self.num_streams})")


@dataclass(frozen=True, kw_only=True)
class PerLayerConfig:
    """Per-layer embeddings: every token has a short vector for every layer.

    Attributes:
      width: P.
      vocab_size: Rows of the table; ids beyond read row 0.
    """

    width: int
    vocab_size: int

    def __post_init__(self):
        check_types(self)
        check_positive(self, "width", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class ModalityVocabulary:
    """Ids at the end of the vocabulary that are embedded in a tower's width (Gemma 3n).

    They mark where images and sounds begin and end, what soft tokens take the place of, and what
    is missing in them.

    Attributes:
      first_id, vocab_size: The ids are `[first_id, first_id + vocab_size)`.
      width: C of the tower.
      norm_eps: Added to the mean square in the norms of these embeddings.
    """

    first_id: int
    vocab_size: int
    width: int
    norm_eps: float = 1e-6

    def __post_init__(self):
        check_types(self)
        check_positive(self, "first_id", "vocab_size", "width", "norm_eps")


@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """Describes the architecture of one model: sizes, switches and one `LayerSpec` per layer.

    Attributes:
      vocab_size, d_model, num_heads, num_kv_heads, head_dim: V, D, N, K, H.
      query_pre_attn_scalar: Attention scores are multiplied by its inverse square root. It is
        `head_dim` everywhere except Gemma 2 27B (144) and Gemma 3 27B (168).
      layers: One spec per decoder layer, first to last.
      max_positions: Context length the model was trained for, in tokens.
      norm_eps: Added to the mean square in every RMSNorm.
      qk_norm: RMSNorm over each query and key head (Gemma 3).
      post_norms: RMSNorm after attention and feed-forward, before the residual sum (Gemma 2, 3).
      activation: Function of the feed-forward's gate: `"gelu_tanh"` (all published models; GELU by
        its tanh approximation), `"gelu"`, `"silu"` or `"relu"`.
      attn_soft_cap, final_soft_cap: `cap * tanh(x / cap)` on scores / logits (Gemma 2).
      optional_final_cap: The final cap is one that the numerics may leave out (Gemma 3n; see
        `Numerics.optional_final_cap`).
      scale_plus_one: RMSNorm multiplies by one plus its stored scale (Gemma 1 to 3), or by the
        scale itself (Gemma 3n).
      v_norm: RMSNorm without a scale over each value head (Gemma 3n).
      altup: Several residual streams (Gemma 3n).
      laurel_rank: R of the low-rank residual beside attention (Gemma 3n).
      per_layer: Per-layer embeddings (Gemma 3n).
      modality_vocabularies: Ids with embeddings of their own: of images, then of sounds (Gemma 3n).
      bidirectional: Tokens see those after them as well as those before (EmbeddingGemma): a local
        layer those less than `window` away, a global layer all. Such a model reads texts whole; it
        has no cache, and writes none.
      tied_head: Logits come from the embedding table (all published models), or from a head of
        its own.
      vision: The tower of models that read images: SigLIP (Gemma 3 from 4B on) or MobileNetV5
        (Gemma 3n); `None` without one.
      audio: The tower of models that hear (Gemma 3n); `None` without one.
      text_embedding: The head of models that make one vector of a text; `None` without one.
      origin: The name of the architecture in the file that this was read from. It says what else
        such files hold, and is never used for arithmetic: two configs that differ in it are equal.

    Examples:
      >>> import gemma_jax as gj
      >>> layer = gj.LayerSpec(kind="global", d_ff=32)
      >>> cfg = gj.GemmaConfig(
      ...     vocab_size=64, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8,
      ...     query_pre_attn_scalar=8, max_positions=128, layers=(layer,) * 3,
      ... )
      >>> cfg.sizes["N"], cfg.sizes["L"]  # query heads, layers
      (2, 3)
    """

    vocab_size: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_pre_attn_scalar: float
    layers: tuple[LayerSpec, ...]
    max_positions: int
    norm_eps: float = 1e-6
    qk_norm: bool = False
    post_norms: bool = False
    activation: Activation = "gelu_tanh"
    attn_soft_cap: float | None = None
    final_soft_cap: float | None = None
    optional_final_cap: bool = False
    scale_plus_one: bool = True
    v_norm: bool = False
    altup: AltUpConfig | None = None
    laurel_rank: int | None = None
    per_layer: PerLayerConfig | None = None
    modality_vocabularies: tuple[ModalityVocabulary, ...] = ()
    bidirectional: bool = False
    tied_head: bool = True
    vision: VisionConfig | MobileNetConfig | None = None
    audio: AudioConfig | None = None
    text_embedding: TextEmbeddingConfig | None = None
    origin: str | None = field(default=None, compare=False)

    def __post_init__(self):
        check_types(self)
        check_positive(
            self, "vocab_size", "d_model", "num_heads", "num_kv_heads", "head_dim", "max_positions",
            "query_pre_attn_scalar", "norm_eps",
        )  # fmt: skip
        for cap in ("attn_soft_cap", "final_soft_cap"):
            if getattr(self, cap) is not None:
                check_positive(self, cap)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        if not self.layers:
            raise ValueError("layers must hold at least one LayerSpec")
        if self.laurel_rank is not None:
            check_positive(self, "laurel_rank")
        _check_sharing(self.layers)
        if self.bidirectional:
            self._check_bidirectional()
        if isinstance(self.vision, MobileNetConfig):
            self._check_vocabulary("vision", self.vision.image_token, self.vision.d_tower)
        if self.audio is not None:
            self._check_vocabulary("audio", self.audio.audio_token, self.audio.d_tower)

    def _check_bidirectional(self) -> None:
        if self.vision is not None or self.audio is not None:
            raise ValueError("bidirectional=True is for models of text alone, without towers")
        if any(spec.kv != "own" for spec in self.layers):
            raise ValueError("bidirectional=True is for layers with keys and values of their own")

    def require_causal(self, what: str) -> None:
        """Refuses what needs a model that reads from left to right.

        Raises:
          ValueError: The model reads both ways.
        """
        if self.bidirectional:
            raise ValueError(
                f"this model reads texts both ways, and {what}; it makes embeddings: "
                "gj.embed(model, tok, texts), or gemma-jax embed"
            )

    def _check_vocabulary(self, tower: str, placeholder: int, width: int) -> None:
        """A tower that does not project its vectors itself needs an embedder that does."""
        vocabulary = self.vocabulary_of(placeholder)
        if vocabulary is None:
            raise ValueError(
                f"{tower}: none of modality_vocabularies has the placeholder {placeholder}; "
                "nothing would map the tower's vectors to d_model"
            )
        if (found := self.modality_vocabularies[vocabulary].width) != width:
            raise ValueError(f"{tower}: d_tower={width}, but its vocabulary has width={found}")

    def vocabulary_of(self, token: int) -> int | None:
        """Which of `modality_vocabularies` has the id `token`; `None` if none has.

        A tower whose placeholder is such an id gives vectors in its own width, and the embedder of
        the vocabulary takes them to the decoder's.
        """
        for i, ids in enumerate(self.modality_vocabularies):
            if ids.first_id <= token < ids.first_id + ids.vocab_size:
                return i
        return None

    @property
    def sizes(self) -> Mapping[str, int]:
        """Dimension letter -> size, for every letter that is the same in all layers."""
        return {
            "V": self.vocab_size,
            "D": self.d_model,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "G": self.num_heads // self.num_kv_heads,
            "H": self.head_dim,
            "L": len(self.layers),
            "A": self.altup.num_streams if self.altup else 1,
            "P": self.per_layer.width if self.per_layer else 0,
            "R": self.laurel_rank or 0,
        }


def _check_sharing(layers: tuple[LayerSpec, ...]) -> None:
    lent = set()
    for i, spec in enumerate(layers):
        if spec.kv == "shared" and spec.kind not in lent:
            raise ValueError(
                f"layer {i} shares keys and values, but no {spec.kind} layer lends any"
            )
        if spec.kv != "shared" and spec.kind in lent:
            raise ValueError(f"layer {i} has keys and values of its own after others are shared")
        if spec.kv == "lent":
            lent.add(spec.kind)
