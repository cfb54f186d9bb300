"""What is said is written down while it is said, and in the end as `transcribe` writes it."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from sounds import tone
from words import Words

from gemma_jax import LiveTranscript, audio_stream, transcribe
from gemma_jax.audio.mel import log_mel
from gemma_jax.audio.waves import Audio, settled_after, split_at_quiet
from gemma_jax.multimodal.encode import encode_audio

CFG = tiny.seeing_and_hearing(tiny.gemma3n(layers=6))
RATE, LIMIT = 16_000, 12_000
NOISE = 2e-5  # by another order of summation


@pytest.fixture(scope="module")
def model():
    """Hears three quarters of a second at once."""
    sounds = dataclasses.replace(CFG.audio.sounds, max_samples=LIMIT)
    return tiny.model(dataclasses.replace(CFG, audio=dataclasses.replace(CFG.audio, sounds=sounds)))


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, count).astype(np.float32)


def live(model, samples: np.ndarray, cuts=(), **options):
    """What is written in the end, and what was written after each piece."""
    writer = LiveTranscript(model, Words(98), max_new_tokens=4, **options)
    seen = [writer.push(piece) for piece in np.split(samples, sorted(cuts))]
    return writer.finish(), seen


def said(transcript) -> list[tuple]:
    return [(one.start, one.end, one.text, one.finish_reason) for one in transcript.segments]


@settings(max_examples=6, deadline=None)
@given(
    count=st.integers(1, 30_000),
    cuts=st.lists(st.integers(0, 30_000), max_size=3),
    seed=st.integers(0, 9),
)
def test_in_the_end_it_is_the_transcript_of_the_whole(model, count, cuts, seed):
    samples = noise(count, seed)
    whole = transcribe(model, Words(98), (samples, RATE), max_new_tokens=4)
    assert said(live(model, samples, cuts)[0]) == said(whole)


def test_it_grows_with_what_is_heard(model):
    samples = noise(9_000)
    whole, seen = live(model, samples, [1_000, 2_000, 6_000])
    ends = [[one.end for one in transcript.segments] for transcript in seen]
    assert ends == [[], [0.125], [0.375], [0.5625]]
    # What was heard so far is all that counts.
    assert said(live(model, samples[:6_000])[1][0]) == said(seen[2])
    assert said(seen[2])[0][2] != said(whole)[0][2]


def test_it_writes_anew_where_there_are_new_tokens_only(model):
    writer = LiveTranscript(model, Words(98), max_new_tokens=4, tokens_per_step=2)
    seen = [writer.push(piece) for piece in np.split(noise(5_600), range(800, 5_600, 800))]
    assert [a is b for a, b in pairwise(seen)] == [True, True, True, True, False, True]


@pytest.mark.parametrize("text, options", [("in Spanish", {"language": "Spanish"}), ("", {})])
def test_the_question_is_that_of_transcripts(model, text, options):
    words = [Words(98), Words(98)]
    writer = LiveTranscript(model, words[0], max_new_tokens=4, **options)
    writer.push(noise(3_000))
    whole = transcribe(model, words[1], (noise(3_000), RATE), max_new_tokens=4, **options)
    assert said(writer.finish()) == said(whole)
    assert ("Spanish:" in words[0]._ids) == bool(text)


def test_nothing_said(model):
    writer = LiveTranscript(model, Words(98))
    assert writer.push(np.zeros(0, np.float32)).text == writer.finish().text == ""


def test_samples_come_as_clips_do(model):
    """Integers are scaled and channels averaged, as in `Audio`; what it refuses is refused."""
    samples = (noise(6_000) * 2**15).astype(np.int16)
    stereo = np.stack([samples, samples], axis=1)
    whole = transcribe(model, Words(98), (samples, RATE), max_new_tokens=4)
    assert said(live(model, samples, [2_500])[0]) == said(whole)
    assert said(live(model, stereo, [2_500])[0]) == said(whole)
    one, other = (audio_stream(model) for _ in range(2))
    np.testing.assert_array_equal(one.push(stereo), other.push(samples / np.float32(2**15)))
    for stream in (one, LiveTranscript(model, Words(98))):
        with pytest.raises(ValueError, match="no finite numbers"):
            stream.push(np.full(100, np.nan, np.float32))
        stream.finish()
        with pytest.raises(ValueError, match="has ended; begin another"):
            stream.push(noise(100))


def test_a_stream_of_a_model_gives_its_soft_tokens(model):
    samples = tone(0.6, RATE)
    stream = audio_stream(model)
    pieces = [*map(stream.push, np.split(samples, [500, 5_000])), stream.finish()]
    mel_TM = log_mel(samples, CFG.audio.sounds, CFG.audio.num_mels)
    expected, _ = encode_audio(model, mel_TM[None], pad=False)
    np.testing.assert_allclose(np.concatenate(pieces), expected[0], rtol=0, atol=NOISE)
    assert pieces[0].shape == (0, CFG.d_model)


@pytest.mark.parametrize("limit", [1, 100, LIMIT])
def test_a_cut_is_settled_before_all_is_heard(limit):
    samples, seconds = noise(3 * LIMIT), limit / RATE
    known = samples[: settled_after(seconds, RATE)]
    first, *_ = split_at_quiet(Audio(known, sampling_rate=RATE), seconds)
    expected, *_ = split_at_quiet(
        Audio(samples[: 4 * limit + len(known)], sampling_rate=RATE), seconds
    )
    assert len(first.samples) == len(expected.samples)
