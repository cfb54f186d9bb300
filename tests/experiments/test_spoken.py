"""The shipped Gemma 3n writes down what voices say that it has never heard, and reads pictures."""

import json
from pathlib import Path

import numpy as np
import pytest

import gemma_jax as gj

FOLDER = Path(__file__).parents[2] / "checkpoints" / "spoken"
CLIPS = sorted(FOLDER.glob("*.wav"))  # named by the voice, and by what it says
PICTURE = next(FOLDER.glob("picture-*.png"))


@pytest.fixture(scope="module")
def spoken():
    pytest.importorskip("soundfile", reason="pip install 'gemma-jax[audio]'")
    return gj.load(str(FOLDER))


@pytest.fixture(scope="module")
def train():
    for needed in ("espeakng_loader", "sklearn", "PIL", "soundfile", "soxr"):
        pytest.importorskip(needed, reason="pip install 'gemma-jax[audio,notebook,speech,vision]'")
    from gemma_jax.experiments.spoken import train

    return train


def said(path: Path) -> str:
    return path.stem.partition("-")[2]


@pytest.fixture(scope="module")
def answered(spoken):
    """Answers about the clips, about silence of the same lengths, and about the picture: one
    batch, which is one program."""
    question = "Transcribe the following speech segment in English:"
    clips = [gj.Audio(path) for path in CLIPS]
    silence = [gj.Audio(np.zeros_like(c.samples), sampling_rate=c.sampling_rate) for c in clips]
    contents = [[question, clip] for clip in clips + silence]
    contents.append([gj.Image(PICTURE), "Read the digits."])
    messages = [[{"role": "user", "content": content}] for content in contents]
    texts = [done.text for done in gj.generate(*spoken, messages, max_new_tokens=8)]
    return texts[: len(CLIPS)], texts[len(CLIPS) : -1], texts[-1]


def test_writes_down_what_voices_say_that_it_has_never_heard(answered):
    """All but one digit of the stored clips, which are the first that were drawn."""
    digits = [pair for path, text in zip(CLIPS, answered[0]) for pair in zip(said(path), text)]
    assert len(CLIPS) > 2 and len(digits) == len("".join(map(said, CLIPS)))
    assert sum(said != heard for said, heard in digits) <= 1


def test_without_the_sound_it_guesses(answered):
    assert not set(answered[1]) & set(map(said, CLIPS))


def test_reads_a_picture_too(answered):
    assert answered[2] == said(PICTURE)


@pytest.mark.nightly
def test_counts_digits(spoken):
    done = gj.generate(*spoken, "How many digits?", images=[PICTURE])
    assert done.text == str(len(said(PICTURE)))


@pytest.mark.nightly
def test_answers_a_second_question_about_a_picture(spoken):
    digits = said(PICTURE)
    messages = [
        {"role": "user", "content": [PICTURE, "Read the digits."]},
        {"role": "assistant", "content": digits},
        {"role": "user", "content": "Which digit is right?"},
    ]
    assert gj.generate(*spoken, messages).text == digits[-1]


def test_the_stored_report_says_so():
    report = json.loads((FOLDER / "report.json").read_text("utf-8"))
    assert report["held_out_voices"]["digits"] >= 0.95
    assert report["silence"]["digits"] < 0.2
    assert report["silence"]["clips"] < 0.15
    assert all(share >= 0.95 for share in report["pictures"].values())


def test_all_parts_of_gemma_3n_are_there(spoken):
    cfg = spoken[0].cfg
    assert (cfg.altup.num_streams, cfg.laurel_rank, cfg.per_layer.width) == (3, 8, 8)
    assert [spec.kv for spec in cfg.layers] == ["own", "own", "lent", "lent", "shared", "shared"]
    assert cfg.audio is not None and cfg.vision is not None


def test_no_held_out_voice_is_trained_on():
    from gemma_jax.experiments.spoken.clips import HELD_OUT, VOICES

    assert len(set(VOICES)) == len(VOICES) and not set(VOICES) & set(HELD_OUT)
    assert {path.stem.partition("-")[0] for path in CLIPS} <= set(HELD_OUT)


def test_the_script_makes_the_shipped_vocabulary():
    from gemma_jax.experiments.spoken import model
    from gemma_jax.text import Tokenizer

    tokenizer = Tokenizer.from_sentencepiece_bytes(model.train_tokenizer())
    shipped = gj.load_tokenizer(str(FOLDER))
    questions = [question for name in model.ASKED for question in model.ASKED[name]]
    assert all(tokenizer.encode(q) == shipped.encode(q) for q in questions)


@pytest.mark.nightly
def test_held_out_voices_are_understood_as_the_report_says(train, spoken):
    """On clips that are made anew."""
    from gemma_jax.experiments.spoken import espeak, measure

    clips = measure.held_out(espeak.Speaker(), 200)
    stored = json.loads((FOLDER / "report.json").read_text("utf-8"))["held_out_voices"]["digits"]
    found = measure.score(clips, measure.transcripts(*spoken, clips))["digits"]
    assert found == pytest.approx(stored, abs=0.03)


@pytest.mark.nightly
def test_training_lowers_the_loss(train, spoken):
    """A few steps by the script that made the checkpoint, on speech made anew."""
    from gemma_jax.experiments.spoken import batches

    tokenizer = spoken[1]
    cfg = train.config(tokenizer)
    clips = batches.clips_to_train_on(cfg, 40, seed=5)
    batch = batches.Rows(tokenizer, cfg, clips).draw(
        np.random.default_rng(9), 1, sounds=4, pictures=2
    )
    losses = []
    for steps in (1, 40):
        model = train.train(tokenizer, cfg, clips, steps=steps, seed=0)
        losses.append(float(train.answers(model, batch, None)[0]))
    assert losses[1] < 0.6 * losses[0]


def test_the_folder_stays_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 2_000_000
