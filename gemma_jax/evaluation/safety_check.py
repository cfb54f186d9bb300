"""One question to whichever ShieldGemma there is: may this be asked, and may it be answered?"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from gemma_jax.decoder.model import Gemma
from gemma_jax.evaluation.shieldgemma import answer_ids, shield
from gemma_jax.evaluation.text_shield import judge_text
from gemma_jax.text import Tokenizer


@dataclass
class SafetyCheck:
    """Judges texts with a ShieldGemma, or pictures with a ShieldGemma 2, one at a time.

    Attributes:
      threshold: The probability of "Yes" from which on a policy counts as violated.
    """

    model: Gemma
    tokenizer: Tokenizer
    threshold: float = 0.5
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self):
        answer_ids(self.tokenizer)  # a model that cannot answer is refused at once
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} must lie between 0 and 1")

    @property
    def sees(self) -> bool:
        """Whether it judges pictures, and not texts."""
        return self.model.cfg.vision is not None

    def __call__(
        self, question: str, answer: str | None = None, pictures: Sequence[object] = ()
    ) -> str | None:
        """The first policy that is violated, `None` if none is; safe from any thread.

        Raises:
          ValueError: More text than can be judged.
        """
        with self._lock:
            if self.sees:
                judged = [shield(self.model, self.tokenizer, one) for one in pictures]
            else:
                judged = [judge_text(self.model, self.tokenizer, question, answer)]
        for verdicts in judged:
            for policy, verdict in verdicts.items():
                if not verdict.yes < self.threshold:  # a NaN counts as a violation
                    return policy
        return None
