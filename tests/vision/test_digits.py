"""The digits checkpoint sees: scans that training never saw, asked through the public calls."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import gemma_jax as gj
from gemma_jax.cli.app import run

FOLDER = Path(__file__).parents[2] / "checkpoints" / "digits"
LONGEST = 5  # tokens of an answer: four digits and <end_of_turn>


def module(name: str):
    """A file beside the checkpoint, which is no package."""
    spec = importlib.util.spec_from_file_location(f"digits_{name}", FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def scenes():
    pytest.importorskip("sklearn", reason="pip install 'gemma-jax[notebook]'")
    return module("scenes")


@pytest.fixture(scope="module")
def loaded():
    return gj.load(str(FOLDER))


@pytest.fixture(scope="module")
def asked(scenes):
    """Questions, right answers and pictures: 18 of one picture, 9 of two."""
    painter, rows = scenes.Painter(held_out=True, seed=7), []
    for count in [1] * 18 + [2] * 9:
        pictures = [painter.scene() for _ in range(count)]
        images = [scene.rgb for scene in pictures]
        rows += [(text, answer, images) for text, answer in scenes.questions(pictures)]
    return list(zip(*rows))


def accuracy(loaded, texts, answers, images) -> np.ndarray:
    """For each question, whether the answer is right."""
    done = gj.generate(*loaded, list(texts), images=list(images), max_new_tokens=LONGEST)
    return np.array([completion.text == answer for completion, answer in zip(done, answers)])


def test_answers_about_held_out_digits(loaded, asked):
    right = accuracy(loaded, *asked)
    of_two = np.array(["image" in text for text in asked[0]])
    assert len(right) >= 200
    assert right[~of_two].mean() >= 0.9
    assert right[of_two].mean() >= 0.9


def test_other_pictures_do_not_do(loaded, asked):
    """The answers are in the picture, and not in the question."""
    texts, answers, images = asked
    blank = [[np.zeros_like(picture) for picture in pictures] for pictures in images]
    assert accuracy(loaded, texts, answers, blank).mean() < 0.5
    half = len(texts) // 4  # all about one picture
    others = np.roll(np.arange(half), half // 2)
    swapped = [images[i] for i in others]
    assert accuracy(loaded, texts[:half], answers[:half], swapped).mean() < 0.5


def test_order_of_two_pictures(loaded, asked):
    """In the other order, what was asked of the first is true of the second."""
    texts, answers, images = zip(*[row for row in zip(*asked) if len(row[2]) == 2])
    places = {"first": "second", "second": "first"}
    texts = [" ".join(places.get(word, word) for word in text.split(" ")) for text in texts]
    turned = [pictures[::-1] for pictures in images]
    assert accuracy(loaded, texts, answers, turned).mean() >= 0.9


def test_in_a_chat(loaded):
    """The picture comes in the first turn, and the second is still about it."""
    picture = gj.Image(FOLDER / "three.png")
    chat = gj.Conversation(*loaded, sampling=gj.Sampling())
    assert chat.say([picture, "How many digits?"]) == "3"
    left, right = (chat.say(f"Which digit is on the {side}?") for side in ("left", "right"))
    assert chat.say("Which digits from left to right?") == f"{left}{right}".join(("", ""))


def test_from_the_command_line(capsys):
    command = ["generate", "How many digits?", "--model", FOLDER, "--image", FOLDER / "three.png"]
    assert run([str(word) for word in command]) == 0
    assert capsys.readouterr().out == "3\n"


def test_small_enough_to_ship():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.*")) < 3_000_000


def test_stored_results_are_of_this_model(scenes):
    results = json.loads((FOLDER / "results.json").read_text("utf-8"))
    assert results["accuracy"] >= 0.9
    assert abs(results["accuracy_images_withheld"] - results["chance"]) < 0.05
    assert len(results["questions"]) == 3 * len(scenes.QUESTIONS)


def test_vocabulary_is_what_the_code_makes(asked):
    stored = (FOLDER / "tokenizer.json").read_text("utf-8")
    assert stored == module("vocabulary").tokenizer_json()
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_str(stored)
    ours = gj.Tokenizer.from_hf_json(stored)
    for text in {*asked[0], "<start_of_turn>user\n\n\nNaïve  digital\tpictures?<end_of_turn>\n"}:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text
