"""What a server serves: one model with its tokenizer behind an engine, under a name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gemma_jax.config import GemmaConfig
from gemma_jax.inference.requests import OnPiece, Request, Ticket
from gemma_jax.inference.sampling import Sampling
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.prompts import PromptReader
from gemma_jax.serving.errors import ApiError
from gemma_jax.serving.limits import Limits
from gemma_jax.text import Tokenizer
from gemma_jax.text_embedding.embedder import Embedder


class Writes(Protocol):
    """What this room asks of an engine; all of it from any thread."""

    def submit(self, request: Request, on_piece: OnPiece) -> Ticket:
        """Takes a request, or raises `Full` or `ValueError`. Pieces come from another thread."""
        ...

    def stats(self) -> Mapping[str, object]:
        """Numbers about what is going on: `running`, `waiting`, ..., see `metrics`."""
        ...

    def start(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Served:
    """Says what requests are answered with.

    Attributes:
      name: By which requests ask for the model; they may leave it out.
      context: Tokens that a prompt and its answer may take together.
      sampling: Where a request does not say.
      adapters: Names of those that the model holds; each can be asked for as a model.
      created: Unix time.
      structured: Makes a `Constraint` out of a kind of grammar and its text; `None` where that is
        not available.
      checks: From a question, an answer or `None`, and pictures, to the policy that is violated, or
        `None`; see `safety`.
    """

    name: str
    cfg: GemmaConfig
    tokenizer: Tokenizer
    engine: Writes | Embedder
    context: int
    limits: Limits = field(default_factory=Limits)
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    adapters: tuple[str, ...] = ()
    created: int = 0
    structured: Callable[[str, str], Any] | None = None
    checks: Sequence[Callable[[str, str | None, Sequence[object]], str | None]] = ()

    @property
    def embedder(self) -> Embedder | None:
        """What makes vectors of texts, in place of what writes."""
        return self.engine if isinstance(self.engine, Embedder) else None

    def require_writer(self) -> None:
        """Raises `ApiError`, a 400, if the model writes no text."""
        if self.embedder is not None:
            raise ApiError(
                f"{self.name} makes vectors of texts and writes none; ask /v1/embeddings",
                param="model",
                code="unsupported_model",
            )

    def reader(self, **preparation: object) -> PromptReader:
        """Makes prompts; for the options see `modality_of`."""
        return PromptReader(self.tokenizer, modalities_of(self.cfg, **preparation))

    @property
    def models(self) -> tuple[str, ...]:
        """All names that requests may ask for."""
        return (self.name, *self.adapters)

    def find(self, model: str | None) -> str | None:
        """The adapter that a name stands for, `None` for the model alone.

        Raises:
          ApiError: 404 for a name that is not served.
        """
        if model is None or model == self.name:
            return None
        if model in self.adapters:
            return model
        raise ApiError(
            f"the model {model!r:.120} is not served here; there is {', '.join(self.models)}",
            status=404,
            param="model",
            code="model_not_found",
        )
