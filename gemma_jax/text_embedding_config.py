"""How one vector is made of a text, as frozen data: pooling, dense layers, prompts of tasks.

EmbeddingGemma is a Gemma 3 that reads both ways (`GemmaConfig.bidirectional`) with such a head. The
facts are those of a sentence-transformers folder; `gemma_checkpoints` reads and writes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from gemma_jax.field_types import check_positive, check_types


@dataclass(frozen=True, kw_only=True)
class TextEmbeddingConfig:
    """Describes the head that makes one vector of a text: mean, dense layers, length one.

    Attributes:
      dense: Outputs of each dense layer, first to last; none has a bias or an activation. Empty:
        the mean itself is the embedding.
      normalise: Divide the embedding by its L2 norm.
      max_tokens: Tokens of the longest text, those around it included; `None`: as many as the
        decoder's context has.
      prompts: `(name of a task, text in front)`, in the order of the file.
      default_prompt: Name of the task that is meant where none is given; `None`: no prompt then.

    Examples:
      >>> import gemma_jax as gj
      >>> head = gj.preset("embeddinggemma-300m").text_embedding
      >>> head.dense, head.prompt("query")
      ((3072, 768), 'task: search result | query: ')
    """

    dense: tuple[int, ...] = ()
    normalise: bool = True
    max_tokens: int | None = None
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str | None = None

    def __post_init__(self):
        check_types(self)
        if any(width < 1 for width in self.dense):
            raise ValueError(f"dense={self.dense} must hold positive widths")
        if self.max_tokens is not None:
            check_positive(self, "max_tokens")
        if any(len(pair) != 2 for pair in self.prompts):
            raise ValueError("prompts must hold pairs: the name of a task, the text in front")
        names = [name for name, _ in self.prompts]
        if len(set(names)) < len(names):
            raise ValueError("prompts must not name a task twice")
        if self.default_prompt is not None and self.default_prompt not in names:
            raise ValueError(f"default_prompt={self.default_prompt!r} is none of the prompts")

    @property
    def by_task(self) -> Mapping[str, str]:
        """Name of a task -> the text that is put in front."""
        return dict(self.prompts)

    def width(self, d_model: int) -> int:
        """Numbers of a whole vector, of a decoder that wide."""
        return (d_model, *self.dense)[-1]

    def longest(self, max_positions: int) -> int:
        """Tokens of the longest text, of a decoder with such a context."""
        return max_positions if self.max_tokens is None else min(self.max_tokens, max_positions)

    def prompt(self, task: str | None = None) -> str:
        """What is put in front of a text for a task; `None`: for the default one, if there is any.

        Raises:
          ValueError: No such task; says which there are.
        """
        task = self.default_prompt if task is None else task
        if task is None:
            return ""
        if task not in self.by_task:
            near = get_close_matches(str(task), self.by_task, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(self.by_task) or "none at all"
            raise ValueError(f"task {task!r} has no prompt; the model has: {known}{hint}")
        return self.by_task[task]
