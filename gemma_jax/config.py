"""What a Gemma is made of, as frozen data. No arrays, no dtypes, no device.

A model is one `GemmaConfig`; what may differ from layer to layer lives in a `LayerSpec`. The
generations differ only in these values: Gemma 1 has global layers alone, Gemma 2 adds soft caps
and post-norms and alternates local with global, Gemma 3 drops the caps for QK-norm and makes five
of six layers local. Gemma 3n brings parts of its own, each in a config of its own: AltUp, LAuReL,
per-layer embeddings; its last layers share keys and values, its first ones are sparse. Gemma 4
keeps the per-layer embeddings, and gives global layers heads of another size than local ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from gemma_jax.encoder_config import AudioConfig, MobileNetConfig, VisionConfig
from gemma_jax.field_types import check_positive, check_types, named_fields
from gemma_jax.text_embedding_config import TextEmbeddingConfig

Activation = Literal["gelu_tanh", "gelu", "silu", "relu"]
SubBlock = Literal["attention", "ffn", "per_layer", "layer_scale"]


@named_fields
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
        its kind read as well (`"lent"`); or those that were lent (`"shared"`, the last layers of
        Gemma 3n and 4). See `share_kv`.
      head_dim, num_kv_heads: H and K of this layer; `None` for those of the model. Gemma 4's global
        layers have heads twice as wide as its local ones.
      rotary_share: Share of a head's dimensions that the rotary embedding turns; the others pass as
        they are. Wavelengths count from the whole head (Gemma 4's global layers, a quarter; hf
        `_compute_proportional_rope_parameters`).
      values: What values are made of: a projection of their `"own"`, or that of the `"keys"`,
        before its norm and rotation (the global layers of the larger Gemma 4).
      sub_blocks: What the layer consists of, in order: `"attention"` and `"ffn"`, then, if named,
        `"per_layer"` (its per-layer input) and `"layer_scale"` (the stream times one stored number,
        Gemma 4). `None`: what the model has, without a scale.

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
    head_dim: int | None = None
    num_kv_heads: int | None = None
    rotary_share: float = 1.0
    values: Literal["own", "keys"] = "own"
    sub_blocks: tuple[SubBlock, ...] | None = None

    def __post_init__(self):
        check_types(self)
        for size in ("head_dim", "num_kv_heads"):
            if getattr(self, size) is not None:
                check_positive(self, size)
        if not 0 < self.rotary_share <= 1:
            raise ValueError(f"rotary_share={self.rotary_share} must lie in (0, 1]")
        order = get_args(SubBlock)
        if self.sub_blocks is not None:
            named = tuple(name for name in order if name in self.sub_blocks)
            if self.sub_blocks != named or named[:2] != order[:2]:
                raise ValueError(
                    f"sub_blocks={self.sub_blocks} must be {order[:2]}, and then as many as there "
                    f"are of {order[2:]}, in this order"
                )
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must lie in [0, 1)")
        if (self.window is not None) != (self.kind == "local"):
            raise ValueError(f"a {self.kind} layer cannot have window={self.window}")
        check_positive(self, "rope_theta", "rope_scale", "d_ff")
        if self.window is not None:
            check_positive(self, "window")

    @property
    def makes_keys(self) -> bool:
        """Whether the layer makes keys and values, for itself or for others too."""
        return self.kv != "shared"


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


@named_fields
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


@named_fields
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


@named_fields
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


@named_fields
@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """Describes the architecture of one model: sizes, switches and one `LayerSpec` per layer.

    Attributes:
      vocab_size, d_model, num_heads, num_kv_heads, head_dim: V, D, N, K, H; the last two of layers
        that do not say otherwise.
      query_pre_attn_scalar: Attention scores are multiplied by its inverse square root. It is
        `head_dim` everywhere except Gemma 2 27B (144), Gemma 3 27B (168), and Gemma 3n and 4 (1),
        which leave the scale to their norms.
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
        scale itself (Gemma 3n and 4).
      v_norm: RMSNorm without a scale over each value head (Gemma 3n and 4).
      altup: Several residual streams (Gemma 3n).
      laurel_rank: R of the low-rank residual beside attention (Gemma 3n).
      per_layer: Per-layer embeddings (Gemma 3n and 4).
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
        self._check_heads(self.head_dim, self.num_kv_heads)
        if not self.layers:
            raise ValueError("layers must hold at least one LayerSpec")
        for spec in dict.fromkeys(self.layers):
            self._check_heads(*self.heads_of(spec))
            if "per_layer" in (spec.sub_blocks or ()) and self.per_layer is None:
                raise ValueError("sub_blocks name per_layer, but the model has no such config")
        if self.laurel_rank is not None:
            check_positive(self, "laurel_rank")
        self._check_sharing()
        if self.bidirectional:
            self._check_bidirectional()
        if isinstance(self.vision, MobileNetConfig):
            self._check_vocabulary("vision", self.vision.image_token, self.vision.d_tower)
        if self.audio is not None:
            self._check_vocabulary("audio", self.audio.audio_token, self.audio.d_tower)

    def _check_heads(self, head_dim: int, num_kv_heads: int) -> None:
        if self.num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={num_kv_heads}"
            )
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be even: RoPE rotates pairs")

    def _check_sharing(self) -> None:
        lent: dict[str, tuple[int, int]] = {}
        for i, spec in enumerate(self.layers):
            heads = self.heads_of(spec)
            if spec.makes_keys and spec.kind in lent:
                raise ValueError(
                    f"layer {i} has keys and values of its own after others are shared"
                )
            if spec.kv == "lent":
                lent[spec.kind] = heads
            elif not spec.makes_keys and (lender := lent.get(spec.kind)) != heads:
                reason = f"no {spec.kind} layer lends any"
                if lender is not None:
                    reason = f"head_dim and num_kv_heads are {heads}, of what is lent {lender}"
                raise ValueError(f"layer {i} shares keys and values, but {reason}")

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

    def heads_of(self, spec: LayerSpec) -> tuple[int, int]:
        """The width of a layer's heads, and its number of key/value heads."""
        return spec.head_dim or self.head_dim, spec.num_kv_heads or self.num_kv_heads

    def layer_sizes(self, spec: LayerSpec) -> Mapping[str, int]:
        """Dimension letter -> size in a layer."""
        width, count = self.heads_of(spec)
        own = {"F": spec.d_ff, "H": width, "K": count, "G": self.num_heads // count}
        return {**self.sizes, **own}

    def sub_blocks_of(self, spec: LayerSpec) -> tuple[SubBlock, ...]:
        """What a layer consists of, in order."""
        if spec.sub_blocks is not None:
            return spec.sub_blocks
        return ("attention", "ffn") if self.per_layer is None else ("attention", "ffn", "per_layer")

    @property
    def sizes(self) -> Mapping[str, int]:
        """Dimension letter -> size, where no layer says otherwise; `layer_sizes` for one layer."""
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
