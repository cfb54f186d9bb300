"""Sounds over HTTP: the small model that hears digits, behind an engine."""

import base64
import contextlib
import json
import urllib.request
from pathlib import Path

import numpy as np
import openai
import pytest
from serving_live import live
from sounds import tone, written

from gemma_jax import Audio, transcribe
from gemma_jax.inference.engine import Engine
from gemma_jax.inference.generate import generate
from gemma_jax.inference.requests import Full
from gemma_jax.inference.transcribe import instruction
from gemma_jax.loading import load
from gemma_jax.serving.limits import Limits
from gemma_jax.serving.served import Served

SPOKEN = Path(__file__).resolve().parents[2] / "checkpoints" / "spoken"
CLIP = SPOKEN / "m7-2197.wav"  # says 2197


@pytest.fixture(scope="module")
def spoken():
    return load(SPOKEN)


@contextlib.contextmanager
def serving(spoken, **sizes):
    """A live server of the model that hears."""
    model, tokenizer = spoken
    engine = Engine(model, slots=2, context=256, queue=8, **sizes)
    engine.start()
    limits = Limits(body_bytes=1 << 20, audio_seconds=20, seconds=60)
    served = Served(
        name="spoken",
        cfg=model.cfg,
        tokenizer=tokenizer,
        engine=engine,
        context=256,
        limits=limits,
    )
    with live(served) as running:
        yield running
    engine.close()


@pytest.fixture(scope="module")
def hearing(spoken):
    with serving(spoken, chunk=128) as running:
        yield running


@pytest.fixture
def ask(hearing):
    def call(file=CLIP, **fields):
        return hearing.client().audio.transcriptions.create(
            model="spoken", file=file, **({"language": "en"} | fields)
        )

    return call


def test_it_writes_down_what_is_said(ask, hearing):
    done = ask()
    assert done.text == "2197"
    usage = done.usage
    heard = hearing.engine.model.cfg.audio.num_soft_tokens
    assert usage.input_token_details.audio_tokens == heard
    assert usage.input_token_details.text_tokens == usage.input_tokens - heard > 5
    assert usage.output_tokens >= 4
    assert ask(response_format="text") == "2197\n"
    line = json.loads(hearing.lines[-1])
    assert line["route"] == "/v1/audio/transcriptions" and line["completion_tokens"] >= 4


@pytest.fixture(scope="module")
def long_clip() -> np.ndarray:
    """Samples `[samples]` at 16 kHz: three clips with pauses between them."""
    names = ("m7-2197.wav", "f5-377.wav", "f2-162.wav")
    clips = [Audio(str(SPOKEN / name)).at(16_000).samples for name in names]
    pause = np.zeros(16_000, np.float32)
    return np.concatenate([part for clip in clips for part in (clip, pause)])


def test_long_clips_come_in_stretches(ask, long_clip):
    file = ("long.flac", written(long_clip, form="FLAC"))
    done = ask(file, response_format="verbose_json", timestamp_granularities=["segment"])
    others = done.segments[1:]
    assert len(others) > 1 and "2197" in done.text
    assert done.text == " ".join(one.text for one in done.segments if one.text)
    assert done.language == "English" and done.duration == pytest.approx(len(long_clip) / 16_000)
    assert [one.end for one in done.segments] == [*(o.start for o in others), done.duration]
    assert all((one.avg_logprob or 0) <= 0 and one.no_speech_prob is None for one in done.segments)
    events = list(ask(file, stream=True))
    assert "".join(e.delta for e in events[:-1]) == events[-1].text == done.text
    assert events[-1].type == "transcript.text.done" and events[-1].usage.output_tokens > 8


@pytest.mark.nightly
def test_the_text_is_that_of_transcribe(spoken, long_clip):
    """Read in short chunks, and from what is kept of earlier prompts, too."""
    offline = transcribe(*spoken, (long_clip, 16_000), language="English")
    with serving(spoken, chunk=32, prefix_bytes=1 << 24) as server:
        for _ in range(2):
            done = server.client().audio.transcriptions.create(
                model="spoken",
                file=("long.flac", written(long_clip, form="FLAC")),
                language="en",
                response_format="verbose_json",
            )
            assert done.text == offline.text
            assert [one.text for one in done.segments] == [one.text for one in offline.segments]
            np.testing.assert_allclose(
                [(one.start, one.end) for one in done.segments],
                [(one.start, one.end) for one in offline.segments],
            )
        assert_heard_in_a_chat(server, spoken)


def test_what_is_asked(ask, spoken, hearing, monkeypatch):
    """Language and prompt are in the question; a temperature draws."""
    tokenizer, seen = spoken[1], []

    def submit(request, on_piece):
        seen.append(request)
        raise Full("enough is known", 3)

    monkeypatch.setattr(hearing.engine, "submit", submit)
    with pytest.raises(openai.RateLimitError, match="enough is known"):
        ask(language="es", prompt="Four digits.", temperature=0.5)
    text = tokenizer.decode([i for i in seen[0].prompt.token_ids if i < tokenizer.vocab_size])
    assert "Four digits." in text and instruction("Spanish") in text
    assert seen[0].sampling.temperature == 0.5


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(response_format="srt"), "response_format: expected 'json' or 'text'"),
        (dict(timestamp_granularities=["word"]), "not of words"),
        (dict(language="xx"), "language: expected a code"),
        (dict(temperature=3), "temperature: expected 0 to 2"),
        (dict(include=["logprobs"]), "include"),
        (dict(stream=True, response_format="verbose_json"), "not streamed"),
        (dict(extra_body={"speaker": "ann"}), "speaker: unknown field"),
        (dict(extra_body={"temperature": "hot"}), "temperature: expected a number"),
        (dict(prompt="<start_of_turn>" * 400), "prompt: 6000 characters"),
        (dict(file=("a.wav", b"RIFF nothing")), "file: "),
        (dict(file=("a.wav", b"")), "file: "),
        (dict(file=("a.wav", written(np.zeros(16_000 * 21, np.int16)))), "longer than 20 s"),
    ],
    ids=range(12),
)
def test_what_is_refused(ask, fields, words):
    with pytest.raises(openai.BadRequestError, match=words):
        ask(**fields)


def test_forms_that_are_none(hearing):
    def status(body: bytes, kind: str) -> tuple[int, str]:
        url = hearing.url + "/v1/audio/transcriptions"
        asked = urllib.request.Request(url, body, {"Content-Type": kind})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(asked, timeout=20)
        return caught.value.code, json.loads(caught.value.read())["error"]["message"]

    assert status(b"{}", "application/json")[0] == 415
    form = "multipart/form-data"
    assert status(b"", form)[0] == 400
    assert status(b"--x\r\nnothing", form + "; boundary=x")[0] == 400
    field = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\nspoken\r\n'
    code, words = status(field % b"model" + b"--x--\r\n", form + "; boundary=x")
    assert code == 400 and "file: is missing" in words
    assert status(field % b"model" * 2 + b"--x--\r\n", form + "; boundary=x")[0] == 400
    assert status((field % b"model") * 40 + b"--x--\r\n", form + "; boundary=x")[0] == 400


def said(server, file, **fields):
    """What a chat answers to a sound."""
    data = base64.b64encode(file.read_bytes()).decode()
    sound = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    text = {"type": "text", "text": instruction("English")}
    messages = [{"role": "user", "content": [text, sound]}]
    return server.client().chat.completions.create(
        model="spoken", messages=messages, temperature=0, max_tokens=12, **fields
    )


def test_a_chat_with_sounds(hearing):
    assert said(hearing, CLIP).choices[0].message.content.strip() == "2197"
    assert said(hearing, SPOKEN / "f2-162.wav").choices[0].message.content.strip() == "162"


def assert_heard_in_a_chat(server, spoken):
    """With one sound and another, the second time from what is kept."""
    model, tokenizer = spoken
    for file in (CLIP, SPOKEN / "f5-377.wav", CLIP):
        done = said(server, file)
        parts = [instruction("English"), Audio(str(file))]
        alone = generate(model, tokenizer, parts, max_new_tokens=12)
        assert done.choices[0].message.content.strip() == alone.text.strip()
        assert done.usage.prompt_tokens == len(alone.prompt_token_ids)
    assert done.usage.prompt_tokens_details.cached_tokens >= 32


def test_a_model_without_ears(scripted):
    with pytest.raises(openai.BadRequestError, match="tiny has no audio tower") as caught:
        scripted.client().audio.transcriptions.create(
            model="tiny", file=("a.wav", written(tone(0.2)))
        )
    assert caught.value.code == "unsupported_model"
