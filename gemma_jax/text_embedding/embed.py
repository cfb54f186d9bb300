"""Texts to vectors."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.model import Gemma
from gemma_jax.text import Tokenizer
from gemma_jax.text_embedding.batches import batches
from gemma_jax.text_embedding_config import TextEmbeddingConfig


def embed(
    model: Gemma,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    task: str | None = None,
    dimensions: int | None = None,
    truncate: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Makes one vector of each text: near each other where texts mean the same (EmbeddingGemma).

    Vectors have length one, so that a product is a cosine: `embed(...) @ embed(...).T`. Texts go
    through the model in batches of about one length; what a text becomes does not depend on those
    beside it, but for rounding.

    Args:
      model: One with a head for it (`cfg.text_embedding`), as a sentence-transformers folder has.
      texts: One text, or several.
      task: Name of a prompt that is put in front of every text: `"query"`, `"document"`, `"STS"`,
        ...; the model has a list of its own. Default: the folder's default, as a rule none.
      dimensions: How many numbers of each vector to keep; it gets length one again. EmbeddingGemma
        was trained for 768, 512, 256 and 128 (Matryoshka). Default: all.
      truncate: Cut longer texts off, as sentence-transformers does. Default: refuse them.
      progress: Told how many texts are done, and how many there are.

    Returns:
      float32 `[number of texts, dimensions]`, in the order of the texts.

    Raises:
      ValueError: A model without a head, an unknown task, a width that the vectors do not have, a
        text that is too long, or something that is no text.

    Examples:
      >>> import gemma_jax as gj
      >>> from flax import nnx
      >>> tok = gj.load_tokenizer("checkpoints/digits")
      >>> cfg = gj.preset("tiny-embeddinggemma")  # with random weights
      >>> model = gj.Gemma(cfg, rngs=nnx.Rngs(0))
      >>> vectors = gj.embed(model, tok, ["Which digit is left?", "left"], task="query")
      >>> vectors.shape, gj.embed(model, tok, "left", dimensions=16).shape
      ((2, 64), (1, 16))
      >>> (vectors**2).sum(axis=1).round(4)
      array([1., 1.], dtype=float32)
    """
    head = require_head(model)
    texts = [texts] if isinstance(texts, str) else list(texts)
    rows = [text_ids(model, tokenizer, text, head.prompt(task), truncate) for text in texts]
    return embed_tokens(model, rows, dimensions=dimensions, progress=progress)


def require_head(model: Gemma) -> TextEmbeddingConfig:
    """What the model's head consists of.

    Raises:
      ValueError: It has none.
    """
    if model.cfg.text_embedding is None:
        raise ValueError(
            "this model makes no embeddings of texts: it has no pooling and no dense layers; load "
            "a sentence-transformers folder, such as EmbeddingGemma's, with its modules.json"
        )
    return model.cfg.text_embedding


def text_ids(
    model: Gemma, tokenizer: Tokenizer, text: str, prompt: str = "", truncate: bool = False
) -> list[int]:
    """Token ids of a text with its prompt, and with BOS and EOS as the tokenizer adds them.

    Args:
      truncate: Leave out the last tokens of the text that do not fit, those around it excepted.

    Raises:
      ValueError: No text, or one that does not fit.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected texts, got {type(text).__name__}: {text!r:.80}")
    first = [tokenizer.bos_id] if tokenizer.add_bos else []
    last = [tokenizer.eos_id] if tokenizer.add_eos else []
    inner, room = tokenizer.encode(prompt + text), max_tokens(model) - len(first) - len(last)
    if len(inner) > room and not truncate:
        raise ValueError(
            f"a text has {len(inner)} tokens, its prompt included, and the model reads at most "
            f"{room}: {text[:40]!r}...; truncate=True cuts such texts off"
        )
    return [*first, *inner[:room], *last]


def max_tokens(model: Gemma) -> int:
    """How many tokens the longest text may have, those around it included."""
    return require_head(model).longest(model.cfg.max_positions)


def embed_tokens(
    model: Gemma,
    rows: Sequence[Sequence[int]],
    *,
    dimensions: int | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The same for texts that are token ids already, BOS and EOS among them.

    Args:
      batch_tokens: Of one pass, about; default: by platform.

    Returns:
      float32 `[number of rows, dimensions]`.

    Raises:
      ValueError: An empty row or one that is too long, ids outside the vocabulary, or a width that
        the vectors do not have.
    """
    width, longest = embedding_width(model), max_tokens(model)
    if dimensions is not None and (type(dimensions) is not int or not 1 <= dimensions <= width):
        raise ValueError(
            f"{dimensions=} must be a whole number in [1, {width}], the vectors' width"
        )
    for i, row in enumerate(rows):
        if not 1 <= len(row) <= longest:
            raise ValueError(f"row {i} has {len(row)} tokens; the model reads 1 to {longest}")
        if min(row) < 0 or max(row) >= model.cfg.vocab_size:
            raise ValueError(
                f"row {i}: ids must lie in [0, {model.cfg.vocab_size}), got {min(row)} to "
                f"{max(row)}"
            )
    vectors, done = np.zeros((len(rows), dimensions or width), np.float32), 0
    for indices, count, length in batches([len(row) for row in rows], batch_tokens):
        batch = Batch.padded([rows[i] for i in indices], length, count=count)
        made = _embed_batch(model, batch, dimensions=dimensions)
        vectors[indices], done = np.asarray(made)[: len(indices)], done + len(indices)
        if progress is not None:
            progress(done, len(rows))
    return vectors


def embedding_width(model: Gemma) -> int:
    """Numbers of a whole vector."""
    return require_head(model).width(model.cfg.d_model)


@partial(jax.jit, static_argnames=("dimensions",))
def _embed_batch(model: Gemma, batch: Batch, *, dimensions: int | None) -> jax.Array:
    x_BTD = forward(model, batch, logits="none", capture=("final_norm",)).captured["final_norm"]
    return model.text_embedding(x_BTD, jnp.asarray(batch.positions_BT) >= 0, dimensions)
