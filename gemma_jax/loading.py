"""The short way in: a model and its tokenizer from one name."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Block, Gemma, MakeBlock
from gemma_jax.field_types import check_keywords, checked_value, named_fields
from gemma_jax.inference.sampling import Sampling
from gemma_jax.nn.layer_groups import Layout
from gemma_jax.numerics import Numerics, resolve_numerics
from gemma_jax.runtime import Runtime
from gemma_jax.sharding import Partition, Rules, make_mesh
from gemma_jax.storages import (
    ACTIVATIONS,
    AUTO,
    CACHE_STORAGES,
    STORED,
    WEIGHT_STORAGES,
    Activations,
    StorageRules,
    WeightStorage,
    is_narrower,
    is_quantised,
    one_of,
)
from gemma_jax.text import Tokenizer
from gemma_jax.weights.off_device import Place
from gemma_kernels.attention import IMPLEMENTATIONS

if TYPE_CHECKING:
    from gemma_checkpoints import Source

ARITHMETIC = ("float32", "bfloat16", "float16")


class LoadKeywords(TypedDict, total=False):
    """The fields of `LoadOptions` as keyword arguments, for editors and type checkers."""

    modalities: Collection[str] | None
    mmproj: str | None
    dtype: jax.typing.DTypeLike | None
    vision_dtype: jax.typing.DTypeLike | None
    weights: WeightStorage | StorageRules | None
    activations: Activations
    cache_dtype: jax.typing.DTypeLike | None
    numerics: str | Numerics
    attention_impl: str
    layout: Layout | None
    per_layer_table: Place
    mesh: Mesh | Mapping[str, int] | None
    rules: Rules | None


@named_fields
@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Says how a model is loaded: parts, dtypes, whose numerics, and where its weights go.

    Attributes:
      modalities: Names out of `"text"`, `"image"` and `"audio"`: `("text",)` neither reads nor
        allocates the towers of a model that sees or hears. Gemma 3n's ids for images and sounds
        stay with their towers. Default: all that the checkpoint has.
      mmproj: GGUF file with the vision tower of a Gemma 3 in a GGUF file. None is looked for.
      dtype: Dtype of activations. Default: float32 on CPU, bfloat16 elsewhere. `"float16"`, for
        chips without bfloat16 such as the T4, is that of weights and of their products in layers
        alone: activations between them go beyond its range and are float32.
      vision_dtype: The same inside the vision tower, whose weights stay as those of the decoder.
        Default: `dtype`.
      weights: How matrices are stored: `"float32"`, `"bfloat16"`; `"int8"` with a float32 scale
        per output channel, or `"int8:32"`, `":64"`, `":128"` with one per so many inputs; 4 bits
        as `"int4"` (per 32), `"int4:64"`, `"int4:128"` or `"int4:channel"`; or by patterns of
        names, see `quantise`. `"stored"` keeps the quantised blocks of a file as they are, and
        `"auto"` does so on a CPU for a file that has some. Default: `dtype`; folders of ours are
        loaded as they were saved.
      activations: `"int8"` rounds activations to whole numbers as well, per 32 of them, in products
        with quantised weights.
      cache_dtype: Dtype of cached keys and values; int8 has a float32 scale per token and head.
        Default: `dtype`.
      numerics: `"hf"` or `"gdm"`; see `gemma_jax.numerics`.
      attention_impl: A name out of `gemma_kernels.attention.IMPLEMENTATIONS`, or `"auto"` for the
        best by platform and shape.
      layout: `"scan"` compiles fast, `"unrolled"` decodes fast on CPU. Default: by platform.
      per_layer_table: The per-layer embeddings of Gemma 3n and 4, half of their parameters: on the
        `"device"`, in the memory of the `"host"`, or left in its file on `"disk"`. Rows of the
        current tokens are gathered there and sent to the device. With int8 weights, a table off the
        device is bfloat16.
      mesh: Devices to spread the model over, or how many along each axis (`{"tensor": 8}`); see
        `gemma_jax.sharding`. Every tensor goes straight into its shards.
      rules: Which letters are split over which axes; default: what serves the mesh's axes.

    Raises:
      ValueError: Values that are unknown, or that do not go together.

    Examples:
      >>> import gemma_jax as gj
      >>> narrow = gj.LoadOptions(weights="int8", cache_dtype="int8")
      >>> model, tok = gj.load("checkpoints/digits", narrow)
      >>> model.runtime.kv_dtype
      dtype('int8')
    """

    modalities: Collection[str] | None = None
    mmproj: str | None = None
    dtype: jax.typing.DTypeLike | None = None
    vision_dtype: jax.typing.DTypeLike | None = None
    weights: WeightStorage | StorageRules | None = None
    activations: Activations = "float"
    cache_dtype: jax.typing.DTypeLike | None = None
    numerics: str | Numerics = "hf"
    attention_impl: str = "auto"
    layout: Layout | None = None
    per_layer_table: Place = "device"
    mesh: Mesh | Mapping[str, int] | None = None
    rules: Rules | None = None

    def __post_init__(self):
        resolve_numerics(self.numerics)
        _check_dtype("dtype", self.dtype, ARITHMETIC)
        _check_dtype("vision_dtype", self.vision_dtype, ARITHMETIC)
        _check_dtype("cache_dtype", self.cache_dtype, CACHE_STORAGES)
        if self.layout is not None:
            checked_value("layout", self.layout, Layout)
        checked_value("per_layer_table", self.per_layer_table, Place)
        implementations = ("auto", *IMPLEMENTATIONS)
        if self.attention_impl not in implementations:
            raise ValueError(
                f"attention_impl={self.attention_impl!r} must be {one_of(implementations)}"
            )
        if self.mesh is not None and self.per_layer_table != "device":
            raise ValueError(
                f"per_layer_table={self.per_layer_table!r} is for one device; on a mesh leave it "
                "at 'device'"
            )
        names = self._storages
        if wrong := [name for name in names if name not in WEIGHT_STORAGES]:
            raise ValueError(f"weights={wrong[0]!r} must be {one_of(WEIGHT_STORAGES)}")
        whole = [name for name in names if name in (STORED, AUTO)]
        if isinstance(self.weights, Mapping) and whole:
            raise ValueError(
                f"weights={whole[0]!r} is for all matrices; by patterns, give what to make of them"
            )
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"activations={self.activations!r} must be {one_of(ACTIVATIONS)}")
        quantised = any(name in (STORED, AUTO) or is_quantised(name) for name in names)
        if self.activations != "float" and not quantised:
            raise ValueError(
                f"activations={self.activations!r} is for quantised weights; give weights='int8', "
                "another storage of whole numbers, or 'stored'"
            )

    @property
    def _storages(self) -> tuple[str, ...]:
        weights = self.weights
        if isinstance(weights, Mapping):
            return tuple(weights.values())
        return () if weights is None else (weights,)


def _check_dtype(name: str, value: jax.typing.DTypeLike | None, known: tuple[str, ...]) -> None:
    try:
        found = None if value is None else jnp.dtype(value).name
    except TypeError:
        found = ""
    if found is not None and found not in known:
        raise ValueError(f"{name}={value!r} must be {one_of(known)}")


def load(
    source: str,
    options: LoadOptions = LoadOptions(),
    *,
    config: Callable[[GemmaConfig], GemmaConfig] | None = None,
    block: MakeBlock = Block,
    progress: Callable[[int, int], None] | None = None,
    **changes: Unpack[LoadKeywords],
) -> tuple[Gemma, Tokenizer]:
    """Loads a model and its tokenizer from a name, a Hugging Face folder, a GGUF file or our Orbax.

    Args:
      source: Name or path. Paths never touch the network; `gemma_checkpoints.catalog` lists names.
      options: How to load it.
      config: Makes another config of the checkpoint's, for the same weights: with other windows or
        rope, or without some of the last layers, whose weights are not read then. Weights are
        taken from the front, whichever of several equal layers the config keeps.
      block: Makes the layers, as in `Gemma`; what was saved with blocks of its own needs the same.
      progress: Called with bytes read so far and in total.
      **changes: Fields of `LoadOptions` by name, in place of those of `options`.

    Raises:
      ValueError: Unknown name, or a checkpoint that cannot be read; says all that is wrong. Or a
        config with other weights than the checkpoint's.

    Examples:
      >>> import dataclasses
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")  # shipped with the repository
      >>> len(model.cfg.layers), tok.vocab_size
      (3, 359)
      >>> shallow, tok = gj.load(
      ...     "checkpoints/digits",
      ...     config=lambda cfg: dataclasses.replace(cfg, layers=cfg.layers[:2]),
      ... )
      >>> len(shallow.cfg.layers)
      2
    """
    options = _changed(options, changes)
    tokenizer = load_tokenizer(source)
    model = load_model(source, options, config=config, block=block, progress=progress)
    return model, tokenizer


def _changed(options: LoadOptions, changes: LoadKeywords) -> LoadOptions:
    """The options with other values; refuses a name that is none of them."""
    if not isinstance(options, LoadOptions):
        raise TypeError(f"options must be LoadOptions, got {options!r}; single ones go by name")
    known = [field.name for field in fields(LoadOptions)]
    check_keywords("load", changes, [*known, "config", "block", "progress"])
    return replace(options, **changes)


def load_model(
    source: str,
    options: LoadOptions = LoadOptions(),
    *,
    config: Callable[[GemmaConfig], GemmaConfig] | None = None,
    block: MakeBlock = Block,
    progress: Callable[[int, int], None] | None = None,
    **changes: Unpack[LoadKeywords],
) -> Gemma:
    """Loads a model without its tokenizer; the arguments are those of `load`.

    Examples:
      >>> import gemma_jax as gj
      >>> model = gj.load_model("checkpoints/digits", modalities=("text",), weights="int8")
      >>> model.vision is None
      True
    """
    from gemma_checkpoints import load_source, open_source, resolve
    from gemma_jax.quantisation import keep_matrix, store_weights

    options = _changed(options, changes)
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(options.dtype or ("float32" if on_cpu else "bfloat16"))
    numerics, activations = _arithmetic(options, dtype)
    weights, opened = options.weights, open_source(resolve(source), mmproj=options.mmproj)
    saved = _quantised_folder(opened)
    has_blocks = saved or any(info.form for info in opened.tensors.values())
    if weights == AUTO:
        widens = not (has_blocks and on_cpu and options.mesh is None)
        weights = None if widens and options.activations == "float" else STORED
    if weights == STORED and not has_blocks:
        raise ValueError(
            f"weights='stored': {source} has no quantised blocks that can be kept; leave it out, "
            "or say what to make of the weights, as in weights='int8'"
        )
    keeps = weights == STORED or (weights is None and saved)
    plain = None if keeps or isinstance(weights, Mapping) else weights
    narrower = None if keeps or (plain and not is_narrower(plain, dtype.name)) else weights
    partition = (
        None
        if options.mesh is None
        else partition_for(
            source, options.mesh, options.rules, options.modalities, mmproj=options.mmproj
        )
    )
    return load_source(
        opened,
        modalities=options.modalities,
        dtype=dtype if plain is None or narrower else jnp.dtype(plain),
        runtime=Runtime(
            dtype=activations,
            numerics=numerics,
            attention_impl=options.attention_impl,
            vision_dtype=None if options.vision_dtype is None else jnp.dtype(options.vision_dtype),
            cache_dtype=None if options.cache_dtype is None else jnp.dtype(options.cache_dtype),
            partition=partition,
        ),
        layout=options.layout or ("unrolled" if on_cpu else "scan"),
        transform=store_weights(narrower, options.activations) if narrower else None,
        keep=keep_matrix(options.activations, partition) if keeps else None,
        placement=partition and partition.placement,
        per_layer_table=options.per_layer_table,
        per_layer_dtype=jnp.bfloat16 if narrower or keeps else None,
        config=config,
        block=block,
        progress=progress,
    )


def _arithmetic(options: LoadOptions, dtype: jnp.dtype) -> tuple[Numerics, jnp.dtype]:
    """Numerics, and the dtype of activations."""
    if options.vision_dtype is not None and jnp.dtype(options.vision_dtype) == jnp.float16:
        raise ValueError("vision_dtype='float16' overflows: give float32, or leave it out")
    numerics = resolve_numerics(options.numerics)
    if dtype != jnp.float16:
        return numerics, dtype
    return replace(numerics, float16_matrices=True), jnp.dtype("float32")


def _quantised_folder(opened: "Source") -> bool:
    """Whether a folder of ours was saved with quantised weights: it is loaded as it was."""
    return opened.format == "Orbax" and bool(opened.quantised)


def partition_for(
    source: str,
    mesh: Mesh | Mapping[str, int],
    rules: Rules | None = None,
    modalities: Collection[str] | None = None,
    *,
    mmproj: str | None = None,
) -> Partition:
    """For the model of a checkpoint; see `LoadOptions`."""
    from gemma_checkpoints import open_source, resolve
    from gemma_checkpoints.select_parts import config_for

    if not isinstance(mesh, Mesh):
        opened = open_source(resolve(source), mmproj=mmproj)
        mesh = make_mesh(config_for(opened, modalities), None, **mesh)
    return Partition.of(mesh, rules)


def load_tokenizer(source: str) -> Tokenizer:
    """Loads a tokenizer without its model; that of a GGUF file is inside the file.

    Examples:
      >>> import gemma_jax as gj
      >>> tok = gj.load_tokenizer("checkpoints/digits")
      >>> tok.decode(tok.encode("Which digit is left?"))
      'Which digit is left?'
    """
    from gemma_checkpoints import resolve, stated_in_json, tokenizer_path

    path = tokenizer_path(source)
    beside = path.name in ("tokenizer.json", "tokenizer.model") and path.parent == resolve(source)
    tokenizer = Tokenizer.from_folder(path.parent) if beside else Tokenizer.from_file(path)
    defaults = stated_in_json(resolve(source))
    if defaults.stop_ids is None:
        return tokenizer
    if defaults.stop_ids_from == "generation_config.json":
        return tokenizer.with_stop_ids(defaults.stop_ids, defaults.stop_ids_from)
    both = {*defaults.stop_ids, *tokenizer.stop_ids}
    return tokenizer.with_stop_ids(both, f"{defaults.stop_ids_from}, {tokenizer.stop_ids_from}")


def load_sampling(source: str) -> Sampling | None:
    """Reads how a checkpoint wants its tokens chosen: `generation_config.json`, a GGUF header.

    Returns:
      Sampling for `generate` or `Conversation`; `None` if the checkpoint does not say.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.load_sampling("checkpoints/digits") is None
      True
    """
    from gemma_checkpoints import generation_defaults, resolve

    return generation_defaults(resolve(source)).sampling


def has_tokenizer(source: str) -> bool:
    """Whether `load_tokenizer` would find one."""
    from gemma_checkpoints import resolve
    from gemma_checkpoints.tokenizers import find_tokenizer

    return find_tokenizer(resolve(source)) is not None
