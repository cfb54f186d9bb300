"""Operations that a step of training cannot do without, from what is trained and what is read.

Of every matrix: two operations per entry and token forward; two more for the gradient of what goes
in; two more for that of the matrix itself, if it is trained. Of attention: scores and sums over the
pairs of tokens that see each other, three times in all. What is computed again to save memory is
not counted, nor is padding, nor are towers.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.model import Gemma
from gemma_jax.planning.costs import pairs_seen
from gemma_jax.training.trainable import Trainable
from gemma_jax.weights.tree import ParamPath, flat_params

TOWERS = ("vision", "audio", "modality_embedders")


@dataclass(frozen=True)
class TrainingCosts:
    """Says what one token, and one pair of tokens, cost in a model that is trained.

    Attributes:
      cfg: Of the model.
      per_token: Operations of all matrices, forward and backward.
    """

    cfg: GemmaConfig
    per_token: float

    @classmethod
    def of(cls, parts: Trainable) -> "TrainingCosts":
        """Of what `trainable`, or adapters, return."""
        model = parts.join(parts.trained, parts.frozen)
        model = getattr(model, "model", model)  # of a pair, the one that is trained
        matrices = _matrices(model)
        total = sum(matrices.values())
        trained = 0
        for path, value in parts.trained.items():
            if path in matrices:
                trained += matrices[path]
            elif path[:-1] in matrices and path[0] not in TOWERS:  # factors beside a matrix
                size = math.prod(value.shape)
                total, trained = total + size, trained + size
        return cls(model.cfg, 4 * total + 2 * trained)

    def operations(self, lengths: Iterable[int], spans: Iterable[int] = ()) -> float:
        """Of one step.

        Args:
          lengths: Tokens of each text; texts that share a row do not see each other.
          spans: Tokens of each run that sees itself both ways.
        """
        lengths = list(lengths)
        return self.per_token * sum(lengths) + self.score_operations(lengths, spans)

    def score_operations(self, lengths: Iterable[int], spans: Iterable[int] = ()) -> float:
        """Of these, those of attention."""
        lengths, cfg = list(lengths), self.cfg
        both_ways = sum(n * (n - 1) / 2 for n in spans)
        return 12 * _products(cfg, lengths, both_ways)  # forward, twice back


def forward_operations(model: Gemma, lengths: Iterable[int]) -> float:
    """Of a pass without gradients, as of a reference or a teacher."""
    lengths, cfg = list(lengths), model.cfg
    matrices = 2 * sum(_matrices(model).values()) * sum(lengths)
    return matrices + 4 * _products(cfg, lengths)


def _products(cfg: GemmaConfig, lengths: list[int], more: float = 0) -> float:
    """Multiplications of all queries with the keys that they see.

    Args:
      more: Pairs of them that every layer has besides.
    """
    return cfg.num_heads * sum(
        cfg.heads_of(spec)[0] * (more + sum(pairs_seen(spec.window, n, n) for n in lengths))
        for spec in cfg.layers
    )


def _matrices(model: Gemma) -> dict[ParamPath, int]:
    """Entries of the decoder's matrices; of tables those of the head alone."""
    head = ("embed", "table" if model.embed.head is None else "head")
    sizes = {}
    for path, param in flat_params(model).items():
        is_table = "V" in param.get_metadata().get("dims", "")
        if path[0] in TOWERS or not param.get_metadata().get("inputs"):
            continue
        if not is_table or path == head:
            sizes[path] = math.prod(param.get_value().shape)
    return sizes


def texts_in(batch: Batch) -> list[int]:
    """Tokens of each text of a batch: of each row, or of each document of packed rows.

    There may be axes in front, `[..., B, T]`.
    """
    length = np.shape(batch.tokens_BT)[-1]
    positions = np.zeros(1) if batch.positions_BT is None else np.asarray(batch.positions_BT)
    real_BT = np.broadcast_to(positions >= 0, np.shape(batch.tokens_BT)).reshape(-1, length)
    if batch.documents_BT is None:
        return [n for n in real_BT.sum(axis=1).tolist() if n]
    rows = zip(np.asarray(batch.documents_BT).reshape(-1, length), real_BT)
    counts = (np.unique(row_T[real_T], return_counts=True)[1] for row_T, real_T in rows)
    return [n for of_row in counts for n in of_row.tolist()]


def spans_in(block_BT: np.ndarray | None) -> list[int]:
    """Tokens of each run that sees itself both ways."""
    if block_BT is None:
        return []
    blocks = np.asarray(block_BT)
    rows = (row_T[row_T > 0] for row_T in blocks.reshape(-1, blocks.shape[-1]))
    return [n for row_T in rows for n in np.unique(row_T, return_counts=True)[1].tolist()]
