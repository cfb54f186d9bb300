"""Prompts with images and sounds as Gemma 3n reads them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
from sounds import tone, written
from words import Words

from gemma_jax import Audio, Conversation, Image, Sampling, generate, transcribe
from gemma_jax.audio.mel import log_mel
from gemma_jax.inference.transcribe import instruction
from gemma_jax.multimodal.audio_prompt import MARKER
from gemma_jax.multimodal.image_prompt import PLACEHOLDER
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.prompts import Prompt, PromptReader, is_one_prompt

CFG = tiny.seeing_and_hearing(tiny.gemma3n(4, 1))
IMAGE, SOUND = CFG.vision, CFG.audio
NEWLINES = [4, 4]  # of `Words`
IMAGE_RUN = [IMAGE.start_token, *[IMAGE.image_token] * 4, IMAGE.end_token]
SOUND_RUN = [SOUND.start_token, *[SOUND.audio_token] * 6, SOUND.end_token]
VIEW, CLIP = [*NEWLINES, *IMAGE_RUN, *NEWLINES], [*NEWLINES, *SOUND_RUN, *NEWLINES]
SECOND = tone(1.0, 16_000)  # 97 frames, which are 7 soft tokens: more than fit into one run


@pytest.fixture(scope="module")
def model():
    return tiny.model(CFG)


@pytest.fixture
def clip() -> Audio:
    return Audio(tone(0.6, 16_000), sampling_rate=16_000)


@pytest.fixture
def picture() -> Image:
    return Image(np.random.default_rng(0).integers(0, 255, (50, 40, 3), np.uint8))


def reader(**options) -> PromptReader:
    return PromptReader(Words(98), modalities_of(CFG, **options))


def test_markers_become_runs(clip, picture):
    words = reader()
    made = words.text(f"a {MARKER} b {PLACEHOLDER} c", {"audio": [clip], "image": [picture]})
    a, b, c = words.tokenizer.encode("a b c")
    assert made.token_ids == [2, a, *CLIP, b, *VIEW, c]
    np.testing.assert_array_equal(made.media["audio"][0], log_mel(clip.samples, SOUND.sounds, 10))
    (pixels,) = made.media["image"]
    assert pixels.shape == (3, 64, 64) and 0 <= pixels.min() < pixels.max() <= 1


def test_several_of_each_come_first_without_markers(clip, picture):
    made = reader().text("a", {"audio": [clip, clip], "image": [picture]})
    assert made.token_ids[1:-1] == [*VIEW, *CLIP, *CLIP]


def test_what_one_message_says_is_one_prompt(clip, picture):
    words = reader()
    (made,) = words.all([[clip, "a", picture]])
    assert is_one_prompt([clip, "a", picture]) and not is_one_prompt(["a", "b"])
    start, user, a = words.tokenizer.encode("<start_of_turn> user a")
    at = made.token_ids.index(a)
    assert made.token_ids[at - len(CLIP) : at + 1] == [*CLIP, a]
    assert made.token_ids[at + 1 : at + 1 + len(VIEW)] == VIEW
    assert made.token_ids[:3] == [2, start, user]


@pytest.mark.parametrize("source", ["bytes", "path", "samples"])
def test_sounds_in_messages(tmp_path, clip, source):
    data = written(clip.samples, 16_000, "WAV")
    path = tmp_path / "Clip.WAV"
    path.write_bytes(data)
    items = {
        "bytes": {"type": "audio", "audio": data},
        "path": Path(path),
        "samples": (clip.samples, 16_000),
    }
    item = items[source]
    (made,) = reader().all([[{"role": "user", "content": [item, "a"]}]])
    assert made.token_ids.count(SOUND.audio_token) == 6 and len(made.media["audio"]) == 1


def test_a_long_clip_is_read_in_pieces(clip):
    sounds = dataclasses.replace(SOUND.sounds, max_samples=8_000)
    cfg = dataclasses.replace(CFG, audio=dataclasses.replace(SOUND, sounds=sounds))
    words = PromptReader(Words(98), modalities_of(cfg))
    with pytest.warns(UserWarning, match=r"longer than the 0.5 s .* read in 2 pieces"):
        made = words.text("a", {"audio": [clip]})
    assert made.token_ids[1:-1] == CLIP + CLIP
    assert sum(len(mel) for mel in made.media["audio"]) > 50


def test_without_padding_a_clip_takes_the_places_it_needs(clip):
    made = reader(pad_audio=False).text("a", {"audio": [clip]})
    assert made.token_ids.count(SOUND.audio_token) == 4  # 57 frames, 16 to a token


def test_a_clip_is_heard_without_padding(model, clip):
    """In a prompt and in a conversation."""
    words = Words(98)
    done = generate(model, words, [clip, "a"], pad_audio=False, max_new_tokens=2)
    assert done.prompt_token_ids.count(SOUND.audio_token) == 4
    options = dict(max_len=64, sampling=Sampling(), pad_audio=False)
    said = Conversation(model, words, **options).say([clip, "a"], max_new_tokens=2)
    assert said == done.text


@pytest.mark.parametrize("given", ["clip.wav", Audio(np.zeros(9), sampling_rate=16_000)])
def test_items_come_as_a_list(given):
    with pytest.raises(ValueError, match="expected the audio items of a prompt as a list, got"):
        reader().all(["a"], {"audio": [given]})


@pytest.mark.parametrize(
    ("text", "media", "match"),
    [
        (f"a {MARKER}", {}, "places for audio clips .*: 1, audio clips given: 0"),
        (f"{MARKER} {MARKER}", {"audio": 1}, "places for audio clips .*: 2, audio clips given: 1"),
        ("a <start_of_image>", {"image": 1}, "belongs to runs .*; mark images by <image_soft_t"),
        (f"a {PLACEHOLDER}", {}, "places for images .*: 1, images given: 0"),
    ],
)
def test_numbers_that_do_not_fit(clip, text, media, match):
    with pytest.raises(ValueError, match=match):
        reader().text(text, {name: [clip] * n for name, n in media.items()})


def test_crops_are_refused():
    with pytest.raises(ValueError, match="trained on whole images"):
        modalities_of(CFG, pan_and_scan=True)


def test_a_model_that_only_sees_refuses_sounds(clip):
    blind = PromptReader(Words(96), modalities_of(tiny.gemma3(vision=tiny.vision())))
    with pytest.raises(ValueError, match="reads text and image alone; audio needs one"):
        blind.all([[clip, "a"]])


@pytest.mark.nightly
def test_prompts_in_a_batch_are_as_alone(model, clip, picture):
    """Of any lengths, with and without items, read whole or in pieces."""
    words = Words(98)
    other = Audio(tone(0.4, 8_000, 300.0), sampling_rate=8_000)
    prompts = [[clip, "a", picture], "b c", [picture, other, "d"]]
    alone = [generate(model, words, one, max_new_tokens=4).token_ids for one in prompts]
    done = generate(model, words, prompts, max_new_tokens=4, chunk=16)
    assert [one.token_ids for one in done] == alone
    assert alone[0] != alone[2]


@pytest.mark.nightly
def test_a_conversation_hears_and_sees_turn_by_turn(model, clip, picture):
    words = Words(98)
    chat = Conversation(model, words, max_len=256, sampling=Sampling())
    chat.say([clip, "a"], max_new_tokens=3)
    said = chat.say([picture, "b"], max_new_tokens=3)
    assert said == generate(model, words, chat.messages[:-1], max_new_tokens=3).text


def test_a_transcript_has_the_times_of_its_stretches(model):
    seen = []
    clip = (np.concatenate([tone(0.8), np.zeros(3_200, np.float32), tone(0.5)]), 16_000)
    made = transcribe(model, Words(98), clip, max_new_tokens=3, on_segment=seen.append)
    first, second = made.segments  # six soft tokens last less than a second: cut where it is quiet
    assert seen == [first, second]
    assert (first.start, second.end) == (0, 1.5) and 0.8 < first.end == second.start < 1
    assert str(made) == f"{first.text} {second.text}".strip()


def test_the_published_prompts():
    assert instruction("Spanish") == "Transcribe the following speech segment in Spanish:"
    both = "Transcribe the following speech segment in Spanish, then translate it into English:"
    assert instruction("Spanish", "English") == both
    for wrong in ("<end_of_turn>", 3):
        with pytest.raises(ValueError, match="expected the name of a language"):
            instruction(wrong)


@pytest.mark.parametrize("shape", [(20, 9), (0, 10), (20,)])
def test_frames_that_the_tower_cannot_read(model, shape):
    prompt = Prompt([2, *SOUND_RUN], media={"audio": [np.zeros(shape, np.float32)]})
    with pytest.raises(ValueError, match=r"expected mel frames \[clips, frames, 10\], got"):
        generate(model, Words(98), prompt, max_new_tokens=1)


def test_a_model_that_does_not_hear_transcribes_nothing():
    deaf = tiny.model(tiny.gemma3(layers=3))
    with pytest.raises(ValueError, match="no audio tower; sounds need one that has"):
        transcribe(deaf, Words(96), (SECOND, 16_000))
    with pytest.raises(TypeError, match="expected a model and a tokenizer, got Words first"):
        transcribe(Words(96), deaf, (SECOND, 16_000))
