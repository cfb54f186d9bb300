"""POST /v1/audio/transcriptions: what is said in a file, by a model that hears.

A clip that is longer than the model hears at once is cut at quiet places; each stretch is a request
of its own, one after the other, so that a long file leaves the other slots to others.
"""

import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from gemma_jax.audio.waves import Audio
from gemma_jax.inference.requests import Request
from gemma_jax.inference.sampling import Sampling
from gemma_jax.inference.transcribe import MAX_NEW_TOKENS, instruction
from gemma_jax.multimodal.audio_prompt import heard_at_once
from gemma_jax.serving.errors import ApiError, refused
from gemma_jax.serving.events import JSON, EventStream, event, unless_gone
from gemma_jax.serving.fields import Fields
from gemma_jax.serving.forms import read_form
from gemma_jax.serving.generation import Generation, Usage
from gemma_jax.serving.languages import language_name
from gemma_jax.serving.schema import Wanted
from gemma_jax.serving.state import State
from gemma_jax.text import chat_stop_ids

FORMATS = ("json", "text", "verbose_json")
PROMPT = 4096  # characters


@dataclass(frozen=True)
class TranscriptionCall:
    """Holds a request as it was read.

    Attributes:
      pieces: The clip, each as long as the model hears at once.
      question: What the model is asked in front of each.
      language: By its English name.
    """

    wanted: Wanted
    pieces: list[Audio]
    question: str
    language: str | None
    form: str


async def transcriptions(http: HttpRequest) -> Response:
    """The route."""
    state: State = http.app.state.server
    fields, data = await read_form(
        http, file="file", numbers=("temperature",), switches=("stream",)
    )
    call = await state.read(_read_call, fields, data, state)
    http.state.note.update(model=call.wanted.model)
    answer = TranscriptionAnswer(call, state, http)
    await answer.begin()
    if call.wanted.stream:
        seconds = state.served.limits.write_seconds
        return EventStream(answer.events(), seconds, lambda outcome: answer.close())
    try:
        body = await unless_gone(http, answer.whole())
    finally:
        answer.close()
    return PlainTextResponse(body) if isinstance(body, str) else JSON(body)


def _read_call(fields: Fields, data: bytes, state: State) -> TranscriptionCall:
    served = state.served
    name = fields.text("model")
    adapter = served.find(name)
    if served.cfg.audio is None:
        raise ApiError(
            f"{served.name} has no audio tower, and hears nothing; gemma3n-e2b-it does",
            param="model",
            code="unsupported_model",
        )
    form = fields.text("response_format", "json", choices=FORMATS)
    stream = fields.boolean("stream")
    if stream and form == "verbose_json":
        raise fields.error("verbose_json is not streamed; expected json or text", "response_format")
    if stream and served.checks:
        raise fields.error("texts are checked as a whole here; leave it out", "stream")
    question, language = _question(fields)
    temperature = fields.number("temperature", 0.0, low=0, high=2)
    _refuse_others(fields, form)
    fields.close()
    wanted = Wanted(
        model=name or served.name,
        adapter=adapter,
        sampling=Sampling(temperature=temperature),
        logit_bias={},
        log_probs=None,
        stream=stream,
    )
    clip = state.media().clip(data, "file")
    pieces = heard_at_once(clip, served.cfg.audio)
    return TranscriptionCall(wanted, pieces, question, language, form)


def _question(fields: Fields) -> tuple[str, str | None]:
    """What is asked, and the language; a text of the client's stands in front, as it is."""
    given = fields.text("language") or None
    language = None if given is None else language_name(given, "language")
    prompt = (fields.text("prompt", "", most=PROMPT) or "").strip()
    question = instruction(language)
    return (f"{prompt}\n\n{question}" if prompt else question), language


def _refuse_others(fields: Fields, form: str) -> None:
    name = "timestamp_granularities[]"
    fields.only(name, ["segment"], because="times are those of stretches, not of words")
    fields.only("timestamp_granularities", because=f"give {name}")
    fields.only("include[]", [], because="log-probabilities of tokens are not told")
    fields.only("chunking_strategy", "auto", because="clips are cut at quiet places")
    fields.only("known_speaker_names[]", [], because="speakers are not told apart")
    fields.only("known_speaker_references[]", [], because="speakers are not told apart")


@dataclass
class _Stretch:
    """What was heard in one piece."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: str | None = None


class TranscriptionAnswer:
    """Writes down one piece after the other, and tells of it, whole or in events."""

    def __init__(self, call: TranscriptionCall, state: State, http: HttpRequest):
        self._call, self._state, self._http = call, state, http
        self._deadline = state.deadline()
        self._generation: Generation | None = None
        self._usage, self._stretches = Usage(), [_Stretch() for _ in call.pieces]

    async def begin(self) -> None:
        """Hands the first piece to the engine, while a refusal still has a status of its own."""
        self._generation = await self._start(0)

    async def _start(self, index: int) -> Generation:
        request = await self._state.read(self._request, index)
        return await self._state.generation(self._http, [request], ())

    def _request(self, index: int) -> Request:
        call, served = self._call, self._state.served
        parts = [
            {"type": "text", "text": call.question},
            {"type": "audio", "audio": call.pieces[index]},
        ]
        (request,) = call.wanted.requests(
            served.reader().chat([{"role": "user", "content": parts}]),
            served,
            owner=self._http.state.owner,
            deadline=self._deadline,
            model_stops=chat_stop_ids(served.tokenizer),
        )
        return replace(request, max_new_tokens=min(request.max_new_tokens, MAX_NEW_TOKENS))

    async def _texts(self) -> AsyncIterator[str]:
        """The text as it comes, stretches joined by spaces."""
        begun = False
        for i, stretch in enumerate(self._stretches):
            generation = self._generation or await self._start(i)
            self._generation = generation
            space = ""  # is told once something follows it
            async for part in generation.parts():
                stretch.token_ids += [token.id for token in part.tokens]
                stretch.log_probs += [token.log_prob for token in part.tokens]
                stretch.finish_reason = part.finish_reason
                new = space + part.text if stretch.text else part.text.lstrip()
                told = new.rstrip()
                space = new[len(told) :]
                if told:
                    yield (" " if begun and not stretch.text else "") + told
                    stretch.text, begun = stretch.text + told, True
            self._add(generation.finish())
            self.close()

    def _add(self, usage: Usage) -> None:
        self._usage.prompt += usage.prompt
        self._usage.new += usage.new

    def close(self) -> None:
        """Tells metrics and log of the piece that runs, and frees its place."""
        if self._generation is not None:
            self._state.ended(self._http, self._generation)
            self._generation = None
            if self._usage.prompt:
                note = self._http.state.note
                note.update(prompt_tokens=self._usage.prompt, completion_tokens=self._usage.new)

    async def whole(self) -> dict | str:
        """The body of an answer that is not streamed."""
        text = "".join([part async for part in self._texts()])
        for check in self._state.served.checks:
            policy = await self._state.read(check, self._call.question, text, ())
            if policy is not None:
                words = f"what is said violates the policy {policy!r} of this server"
                raise refused(words, "file", "content_filter")
        if self._call.form == "text":
            return text + "\n"
        if self._call.form == "json":
            return {"text": text, "usage": self._usage_body()}
        return {
            "task": "transcribe",
            "language": self._call.language,
            "duration": sum(piece.seconds for piece in self._call.pieces),
            "text": text,
            "segments": self._segments(),
            "usage": self._usage_body(),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream."""
        text = ""
        async for part in self._texts():
            text += part
            yield event({"type": "transcript.text.delta", "delta": part})
        yield event({"type": "transcript.text.done", "text": text, "usage": self._usage_body()})

    def _usage_body(self) -> dict:
        heard = len(self._call.pieces) * self._state.served.cfg.audio.num_soft_tokens
        prompt, new = self._usage.prompt, self._usage.new
        return {
            "type": "tokens",
            "input_tokens": prompt,
            "input_token_details": {"audio_tokens": heard, "text_tokens": prompt - heard},
            "output_tokens": new,
            "total_tokens": prompt + new,
        }

    def _segments(self) -> list[dict]:
        segments, start = [], 0.0
        for i, (piece, stretch) in enumerate(zip(self._call.pieces, self._stretches)):
            segments.append(self._segment(i, start, start + piece.seconds, stretch))
            start += piece.seconds
        return segments

    def _segment(self, index: int, start: float, end: float, stretch: _Stretch) -> dict:
        data, log_probs = stretch.text.encode(), stretch.log_probs
        return {
            "id": index,
            "seek": round(start * 100),  # in hundredths of a second
            "start": start,
            "end": end,
            "text": stretch.text,
            "tokens": stretch.token_ids,
            "temperature": self._call.wanted.sampling.temperature,
            "avg_logprob": sum(log_probs) / len(log_probs) if log_probs else None,
            "compression_ratio": len(data) / len(zlib.compress(data)) if data else None,
            "no_speech_prob": None,  # the model has no such judgement
            "finish_reason": stretch.finish_reason,
        }
