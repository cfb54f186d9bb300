"""Answers what lm-eval asks of a model. Needs no lm-eval: a request is whatever has `args`.

BOS comes first, and once: in front of every text, also of one that begins with it, as those of chat
templates do. What does not fit the model's context is refused; nothing is cut off in silence.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gemma_jax.decoder.model import Gemma
from gemma_jax.evaluation.continuations import TokenScores, score_continuations
from gemma_jax.evaluation.windows import rolling_windows
from gemma_jax.inference.generate import generate
from gemma_jax.inference.sampling import Sampling
from gemma_jax.text import Tokenizer, chat_stop_ids, render_chat
from gemma_jax.text.chat import END_OF_TURN

NEW_TOKENS = 256  # where a task does not say how many; lm-eval's number
NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING_NAMES = ("top_k", "top_p", "min_p", "repetition_penalty")
ONE_ANSWER = ("num_beams", "num_return_sequences")  # 1 is what happens

Ids = list[int]
Progress = Callable[[int, int], None]


class Request(Protocol):
    """What lm-eval calls an `Instance`."""

    @property
    def args(self) -> tuple: ...


@dataclass(frozen=True)
class GenerationSettings:
    """What a task says of the texts that it wants."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "GenerationSettings":
        """Reads the `generation_kwargs` of a task.

        Without `do_sample`, a temperature above 0 means sampling; `do_sample: true` alone means a
        temperature of 1, and `do_sample: false` none.

        Raises:
          ValueError: A setting that is not known, or an impossible value.
        """
        rest = {name: value for name, value in given.items() if value is not None}
        until = rest.pop("until", ())
        until = (until,) if isinstance(until, str) else tuple(until)
        counts = [rest.pop(name) for name in NEW_TOKENS_NAMES if name in rest]
        new = int(counts[0]) if counts else NEW_TOKENS
        sample = rest.pop("do_sample", None)
        temperature = float(rest.pop("temperature", 1.0 if sample else 0.0))
        sampling = Sampling(
            temperature=0.0 if sample is False else temperature,
            **{name: rest.pop(name) for name in SAMPLING_NAMES if name in rest},
        )
        for name in ONE_ANSWER:
            if rest.get(name) == 1:
                del rest[name]
        if rest:
            known = ("until", "do_sample", "temperature", *SAMPLING_NAMES, *NEW_TOKENS_NAMES)
            raise ValueError(
                f"generation_kwargs: {next(iter(rest))!r} is not known; choose from "
                f"{', '.join(known)}"
            )
        if new < 1:
            raise ValueError(f"generation_kwargs: {new} new tokens; ask for one at least")
        return cls(tuple(text for text in until if text), new, sampling)


class Answerer:
    """Answers requests with a model; the three methods of lm-eval's models.

    Args:
      max_length: Tokens that the model reads at most; default: its context. Texts for rolling
        log-likelihoods are cut into windows as long.
      batch_size: Texts that are written at a time.
      seed: Of the texts that are drawn. What is drawn depends on it and on the prompt, and for a
        prompt that comes again on how often it did; not on other requests.
      progress: Told how much of a kind of request is done, and how much there is.

    Raises:
      ValueError: Lengths and sizes that cannot be.
    """

    def __init__(
        self,
        model: Gemma,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        progress: Progress | None = None,
    ):
        most = model.cfg.max_positions
        if max_length is not None and not 1 <= max_length <= most:
            raise ValueError(f"{max_length=} must lie between 1 and {most}, the model's context")
        if batch_size < 1:
            raise ValueError(f"{batch_size=} must be at least 1")
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size = max_length or most, batch_size
        self._seed, self._progress = seed, progress

    def encode(self, text: str) -> Ids:
        """Ids of a text, with one BOS in front."""
        return self.tokenizer.encode(text, bos=True)

    def encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Ids of a context, and of what its continuation adds to them.

        Spaces at the end of the context belong to the continuation. The ids are those of both texts
        together, without as many in front as the context has alone: a continuation whose text
        becomes part of the context's last token has none.
        """
        end = len(context.rstrip())
        context, continuation = context[:end], context[end:] + continuation
        ids = self.encode(context)
        return ids, self.encode(context + continuation)[len(ids) :]

    def loglikelihood(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation, and whether all tokens are likeliest.

        Args:
          requests: Their `args` are a context, which may be empty, and a continuation.

        Raises:
          ValueError: A context and a continuation that do not fit the model.
        """
        return self.loglikelihood_ids([self.encode_pair(*request.args) for request in requests])

    def loglikelihood_ids(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """The same of contexts and continuations as ids."""
        return [_total(scores) for scores in self._scores(pairs)]

    def loglikelihood_rolling(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[float]:
        """Sum of the log-probabilities of all tokens of each text after BOS, in windows if long.

        Args:
          requests: Their `args` are a text.
        """
        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self.encode(request.args[0])
            if len(ids) < 2:
                continue
            for start, first, stop in rolling_windows(len(ids), self.max_length, self.max_length):
                pairs.append((ids[start:first], ids[first : stop + 1]))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, scores in zip(owners, self._scores(pairs), strict=True):
            sums[number] += _total(scores)[0]
        return sums

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Texts that the model writes.

        Args:
          requests: Their `args` are a context and the `generation_kwargs` of the task, see
            `GenerationSettings.of`.

        Raises:
          ValueError: A context that leaves no room for as many new tokens, unknown settings.
        """
        asked: dict[tuple[GenerationSettings, tuple[int, ...]], list[int]] = {}
        seeds, again = [], Counter()
        for number, request in enumerate(requests):
            context, given = request.args
            ids, settings = tuple(self.encode(context)), GenerationSettings.of(given)
            self._check_room(len(ids), settings.max_new_tokens)
            stops = chat_stop_ids(self.tokenizer) if self._is_chat(ids) else self.tokenizer.stop_ids
            asked.setdefault((settings, tuple(stops)), []).append((-len(ids), ids, number))
            seeds.append(self._seed_of(ids, again[ids]))
            again[ids] += 1
        texts, done = [""] * len(requests), 0
        for (settings, stops), group in asked.items():
            group.sort()
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                for (_, _, number), text in zip(batch, self._write(batch, settings, stops, seeds)):
                    texts[number] = text
                self._report(done := done + len(batch), len(requests))
        return texts

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as a prompt, by the checkpoint's template or in Gemma 3's format.

        Args:
          add_generation_prompt: Whether the model has the next turn; else it goes on with the last
            one, whose end is left out.
        """
        text = render_chat(
            self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt
        )
        if add_generation_prompt:
            return text
        said = str(chat_history[-1]["content"]).strip()
        return text[: text.rindex(said) + len(said)] if said else text.removesuffix(END_OF_TURN)

    def _scores(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[TokenScores]:
        for context, continuation in pairs:
            if len(context) + len(continuation) - 1 > self.max_length:
                raise ValueError(
                    f"a context of {len(context)} tokens and a continuation of {len(continuation)} "
                    f"do not fit max_length={self.max_length}; take fewer examples or shorter texts"
                )
        return score_continuations(self.model, pairs, progress=self._progress)

    def _write(self, batch, settings: GenerationSettings, stops, seeds: list[int]) -> list[str]:
        done = generate(
            self.model,
            self.tokenizer,
            [list(ids) for _, ids, _ in batch],
            max_new_tokens=settings.max_new_tokens,
            sampling=settings.sampling,
            seed=[seeds[number] for _, _, number in batch],
            stop=settings.until,
            stop_ids=stops,
        )
        return [one.text for one in done]

    def _check_room(self, tokens: int, new: int) -> None:
        if tokens + new > self.max_length:
            raise ValueError(
                f"a context of {tokens} tokens and {new} new ones do not fit max_length="
                f"{self.max_length}; take fewer examples, or a smaller max_gen_toks"
            )

    def _is_chat(self, ids: Sequence[int]) -> bool:
        return self.tokenizer.special_ids.get("<start_of_turn>") in ids

    def _seed_of(self, ids: tuple[int, ...], times: int) -> int:
        return zlib.crc32(repr((self._seed, times, ids)).encode())

    def _report(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)


def _total(scores: TokenScores) -> tuple[float, bool]:
    return float(scores.log_probs.sum(dtype="float64")), bool(scores.greedy.all())
