"""Long texts that are made up: what is asked for is in them, at its depth, and fits."""

from collections import Counter

import pytest

from gemma_jax.evaluation.long_context import AT_A_DEPTH, FREQUENT, TASKS, long_question

LENGTH = 400


def made(task, length=LENGTH, depth=0.5, seed=0):
    return long_question(task, str.split, length, depth=depth, seed=seed)


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_in_the_text_alone(task):
    for seed in range(5):
        question = made(task, seed=seed)
        text, _, asked = question.prompt.partition("Question:")
        assert all(answer in text for answer in question.answers)
        assert question.without.endswith(asked)
        if task != "frequent-words":
            assert not any(answer in question.without for answer in question.answers)


@pytest.mark.parametrize("task", TASKS)
def test_lengths(task):
    for length in (150, 151, 400, 2000):
        question = made(task, length)
        used = len((question.prompt + question.answer).split())
        assert used <= length < used + 20  # one sentence, or eight words, more would not fit


@pytest.mark.parametrize("task", TASKS)
def test_seeds(task):
    assert made(task, seed=3) == made(task, seed=3) != made(task, seed=4)


@pytest.mark.parametrize("task", AT_A_DEPTH)
@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_depths(task, depth):
    question = made(task, 2000, depth)
    text = question.prompt.partition("Question:")[0]
    assert text.index(question.answers[0]) / len(text) == pytest.approx(depth, abs=0.06)


@pytest.mark.parametrize("length", [60, 150, 1000])
def test_the_words_asked_for_are_the_most_frequent(length):
    question = made("frequent-words", length)
    text = question.prompt.partition("Question:")[0].removeprefix("Words: ")
    ranked = Counter(text.replace(".", "").split()).most_common()
    assert set(question.answers) == {word for word, _ in ranked[:FREQUENT]}
    assert ranked[FREQUENT - 1][1] > ranked[FREQUENT][1]


def test_accuracy():
    question = made("many-values")
    assert question.accuracy("nothing") == 0
    assert question.accuracy(question.answer) == 1
    assert question.accuracy(question.answers[0] + " and so on") == 1 / len(question.answers)


@pytest.mark.parametrize(
    "task, length, depth, message",
    [
        ("needles", 400, 0.5, "must be one of needle, many-keys"),
        ("needle", 400, 1.5, "depth=1.5 must lie in"),
        ("needle", 5, 0.5, "needs 2. tokens at least, more than length=5"),
    ],
)
def test_what_is_refused(task, length, depth, message):
    with pytest.raises(ValueError, match=message):
        made(task, length, depth)
