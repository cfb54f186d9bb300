"""Drafts that the host gives: what followed the same tokens before, and tokens without a choice.

Prompt lookup needs no other model: whoever quotes, edits code or fills in a form says again what
stands in the text already. A pass that checks drafts costs more than one token's, so none is made
where there is nothing to check.

Local letters: X drafts; W words of a mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from gemma_jax.inference.decode import Proposal, State
from gemma_jax.inference.prefill import PrefillChunk
from gemma_jax.inference.requests import Constraint

LONGEST_REST = 64  # tokens without drafts, where they keep missing


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """Drafts what followed the last tokens of a text where they stood before in it.

    Attributes:
      draft_tokens: How many at once, at least 1.
      lengths: How many of the last tokens to look for; the first length that is found counts.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.Lookup(draft_tokens=2).drafts([7, 8, 9, 5, 7, 8])
      [9, 5]
    """

    draft_tokens: int = 4
    lengths: tuple[int, ...] = (4, 3, 2)

    def __post_init__(self):
        if self.draft_tokens < 1:
            raise ValueError(f"draft_tokens={self.draft_tokens} must be at least 1")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths={self.lengths} must be one or more numbers, at least 1")

    def drafts(self, text: Sequence[int] | np.ndarray) -> list[int]:
        """Up to `draft_tokens` ids; none where the last tokens stand nowhere before.

        Args:
          text: Ids; -1 for what is no token (a picture's places), which is neither looked for nor
            drafted.
        """
        ids = np.asarray(text, np.int64)
        for n in self.lengths:
            last, starts = ids[-n:], len(ids) - n
            if starts < 1 or last.min() < 0:
                continue
            same = np.ones(starts, bool)
            for i in range(n):
                same &= ids[i : i + starts] == last[i]
            found = np.flatnonzero(same)
            if len(found):
                # The last place that has as much behind it as is asked for, or else the first.
                whole = found[found + n + self.draft_tokens <= len(ids)]
                at = (whole[-1] if len(whole) else found[0]) + n
                out = ids[at : at + self.draft_tokens].tolist()
                return out[: out.index(-1)] if -1 in out else out
        return []


@dataclass
class Patience:
    """Says when to draft in a row, by how its drafts fared.

    A pass that checks drafts costs more than one without. From the second pass on whose drafts were
    all wrong, one after the other, the row writes on without any for 4, 8, ... up to 64 tokens; the
    first draft that is kept ends that. Which drafts there are changes no text.

    Examples:
      >>> patience = Patience()
      >>> for at in (10, 11):
      ...     patience.saw(drafted=4, kept=0, count=at)
      >>> patience.drafts_at(14), patience.drafts_at(15)
      (False, True)
    """

    misses: int = 0
    until: int = 0  # tokens of the answer

    def drafts_at(self, count: int) -> bool:
        """Whether to draft behind so many tokens of the answer."""
        return count >= self.until

    def saw(self, drafted: int, kept: int, count: int) -> None:
        """Takes in one pass, behind which the answer has `count` tokens."""
        if not drafted:
            return
        self.misses = 0 if kept else self.misses + 1
        self.until = count + min(2**self.misses, LONGEST_REST) if self.misses > 1 else 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GivenDrafts:
    """Drafts that the host made: a `Propose` of one pass, whose drafts must agree with the model.

    Attributes:
      drafts_BX: int32, padded on the right.
      count_B: int32, how many there are.
    """

    drafts_BX: jax.Array | np.ndarray
    count_B: jax.Array | np.ndarray

    @classmethod
    def of(cls, drafts: dict[int, Sequence[int]], batch: int, width: int) -> "GivenDrafts":
        """By row; rows that are not named have none."""
        drafts_BX, count_B = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
        for row, ids in drafts.items():
            drafts_BX[row, : len(ids)], count_B[row] = ids, len(ids)
        return cls(drafts_BX, count_B)

    @property
    def count(self) -> int:
        return self.drafts_BX.shape[1]

    def start(self, batch: int, max_len: int) -> Any:
        return None

    def prefill(self, drafts: Any, prompt: PrefillChunk) -> Any:
        return drafts

    def __call__(self, state: State, active_B: jax.Array) -> Proposal:
        return Proposal(self.drafts_BX, None, state.cache, state.drafts, self.count_B)

    def settle(self, proposal: Proposal, state: State, kept_B: jax.Array, new_B: jax.Array) -> Any:
        return proposal.drafts


@dataclass(frozen=True)
class NextTokens:
    """What may come next in a row that follows a constraint.

    Attributes:
      drafts: Tokens without a choice first, then some that were looked up.
      masks: uint32 `[T, W]`; which tokens are legal next, and behind each draft.
      forced: How many of the drafts are without a choice.
    """

    drafts: list[int] = field(default_factory=list)
    masks: np.ndarray | None = None
    forced: int = 0


def next_tokens(constraint: Constraint, width: int, text: Sequence[int], lookup: Lookup | None):
    """Looks ahead in a constraint, which is afterwards where it was.

    Args:
      width: Most drafts.
      text: All of the row, for `lookup`; `None` there: only tokens without a choice are drafted.
    """
    forced = constraint.forced()[:width] if width else []
    masks, drafts = [], []

    def take(token: int, mask_W: np.ndarray) -> None:
        constraint.accept([token])
        drafts.append(token)
        masks.append(mask_W)

    try:
        for token in forced:  # one spelling of what must come, and the others are not to be chosen
            take(token, None)
        mask_W = constraint.mask()
        guesses = [] if lookup is None or not width else lookup.drafts([*text, *forced])
        for token in guesses[: width - len(forced)]:
            if constraint.complete or not mask_W[token // 32] >> (token % 32) & 1:
                break
            take(token, mask_W)
            mask_W = constraint.mask()
    finally:
        if drafts:
            constraint.rewind(len(drafts))
    for i, token in enumerate(forced):
        masks[i] = np.zeros_like(mask_W)
        masks[i][token // 32] = 1 << token % 32
    return NextTokens(drafts, np.stack([*masks, mask_W]), len(forced))
