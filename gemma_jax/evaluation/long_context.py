"""Questions about long texts that are made up, after RULER (Hsieh et al. 2024, arXiv 2404.06654).

A text of plain sentences has something in it that is asked for at its end: needles at a depth, a
chain of variables, the words that are most frequent. All is drawn from a seed, in English, and ends
in the middle of a sentence that the answer goes on with: so base models can be asked, too.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

FILLER = (
    "The river bends twice before it meets the old stone bridge.",
    "On Tuesdays the baker opens an hour later than usual.",
    "A tall fence keeps the goats away from the young trees.",
    "Most of the letters were kept in a tin box under the stairs.",
    "The train to the coast leaves from the second platform.",
    "Rain had washed the chalk marks off the school wall.",
    "Nobody remembers who planted the pear tree by the gate.",
    "The harbour lights go out one after another at dawn.",
    "Her brother repairs clocks and sells them in the market.",
    "They painted the boat green because the blue paint was gone.",
    "A map of the valley hangs beside the kitchen window.",
    "In winter the path over the hill is closed to carts.",
    "The choir sings on the first Sunday of every month.",
    "Every shelf in the library has a brass number.",
    "The wind turned and carried the smoke across the field.",
    "Two lamps were lit in the house at the end of the road.",
)
KEYS = (
    "amber", "birch", "cobalt", "dahlia", "ember", "falcon", "garnet", "heron", "indigo", "juniper",
    "kestrel", "lantern", "maple", "nectar", "orchid", "pebble", "quartz", "raven", "saffron",
    "thistle",
)  # fmt: skip
WORDS = (
    "anchor", "basket", "candle", "dragon", "engine", "forest", "guitar", "hammer", "island",
    "jacket", "kitten", "ladder", "magnet", "needle", "orange", "pencil", "rabbit", "saddle",
    "ticket", "violin", "walnut", "window", "yellow", "zipper",
)  # fmt: skip
SEVERAL = 4  # values of one key, other keys, variables of a chain
FREQUENT = 3  # words that are asked for
STEEPNESS = 2.0  # the n-th word comes as often as n to the power of this, inverted

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class LongQuestion:
    """One long text with a question at its end.

    Attributes:
      task: Name of its kind, one of `TASKS`.
      depth: Where in the text the needle lies, 0 (first) to 1; `None` where it lies in many places.
      prompt: The text and the beginning of the answer.
      answers: What has to be said, in any order.
      without: The same prompt without what it is asked about.
    """

    task: str
    depth: float | None
    prompt: str
    answers: tuple[str, ...]
    without: str

    @property
    def answer(self) -> str:
        """As a text that goes on with the prompt."""
        return " " + ", ".join(self.answers)

    def accuracy(self, said: str) -> float:
        """Share of the answers that a text has in it, as RULER counts."""
        return sum(answer in said for answer in self.answers) / len(self.answers)


def _number(random: np.random.Generator) -> str:
    return str(random.integers(10_000, 99_999))


def _filler(random: np.random.Generator, count: int) -> list[str]:
    return [FILLER[i] for i in random.integers(len(FILLER), size=count)]


def _laid_in(
    sentences: list[str], needles: Sequence[tuple[float, str]], question: str
) -> tuple[str, str]:
    """The prompt, and the one without needles; each lies behind its share of the sentences."""
    text = list(sentences)
    for depth, needle in sorted(needles, reverse=True):
        text.insert(round(depth * len(sentences)), needle)
    return " ".join([*text, question]), " ".join([*sentences, question])


def _needle(key: str, value: str) -> str:
    return f"The secret number of the {key} is {value}."


def _asked(key: str) -> str:
    return f"Question: what is the secret number of the {key}? Answer: the secret number is"


def single_needle(random: np.random.Generator, size: int, depth: float | None) -> LongQuestion:
    """One needle, at the depth."""
    key, value = str(random.choice(KEYS)), _number(random)
    needles = [(depth or 0.0, _needle(key, value))]
    prompts = _laid_in(_filler(random, size), needles, _asked(key))
    return LongQuestion("needle", depth, prompts[0], (value,), prompts[1])


def many_keys(random: np.random.Generator, size: int, depth: float | None) -> LongQuestion:
    """The needle at the depth, and others elsewhere that nobody asks for."""
    keys = [str(key) for key in random.permutation(KEYS)[: SEVERAL + 1]]
    values = [_number(random) for _ in keys]
    places = [depth or 0.0, *random.random(SEVERAL)]
    needles = [(at, _needle(*pair)) for at, pair in zip(places, zip(keys, values))]
    prompts = _laid_in(_filler(random, size), needles, _asked(keys[0]))
    return LongQuestion("many-keys", depth, prompts[0], (values[0],), prompts[1])


def many_values(random: np.random.Generator, size: int, depth: float | None) -> LongQuestion:
    """One key with several values, all over the text; all of them are asked for."""
    key, values = str(random.choice(KEYS)), tuple(_number(random) for _ in range(SEVERAL))
    needles = [
        ((i + 0.5) / SEVERAL, f"One secret number of the {key} is {value}.")
        for i, value in enumerate(values)
    ]
    question = f"Question: what are all secret numbers of the {key}? Answer: the numbers are"
    prompts = _laid_in(_filler(random, size), needles, question)
    return LongQuestion("many-values", None, prompts[0], values, prompts[1])


def variables(random: np.random.Generator, size: int, depth: float | None) -> LongQuestion:
    """A chain of variables, each with the value of the one before; their names are asked for."""
    letters = np.array(list("ABCDEFGHJKLMNPQRSTUVWXYZ"))
    names = tuple("".join(random.permutation(letters)[:4]) for _ in range(SEVERAL))
    value = _number(random)
    said = [f"The variable {names[0]} is {value}."]
    said += [f"The variable {b} is {a}." for a, b in pairwise(names)]
    needles = [((i + 0.5) / SEVERAL, text) for i, text in enumerate(said)]
    question = f"Question: which variables have the value {value}? Answer: the variables are"
    prompts = _laid_in(_filler(random, size), needles, question)
    return LongQuestion("variables", None, prompts[0], names, prompts[1])


def frequent_words(random: np.random.Generator, size: int, depth: float | None) -> LongQuestion:
    """Words in a row, of which the most frequent are asked for; `without` has all alike."""
    words = [str(word) for word in random.permutation(WORDS)]
    shares = 1.0 / np.arange(1, len(words) + 1) ** STEEPNESS
    size = size * 8 + len(words)  # a sentence is about as long
    counts = np.floor(size * shares / shares.sum()).astype(int)  # drawn, two might come as often
    counts[0] += size - counts.sum()
    drawn = random.permutation(np.repeat(words, counts)).tolist()
    alike = random.choice(words, size=size).tolist()
    best = tuple(words[:FREQUENT])
    question = "Question: which three words are the most frequent? Answer: they are"
    prompts = [" ".join(["Words:", *text]) + ". " + question for text in (drawn, alike)]
    return LongQuestion("frequent-words", None, prompts[0], best, prompts[1])


Make = Callable[[np.random.Generator, int, float | None], LongQuestion]
TASKS: dict[str, Make] = {
    "needle": single_needle,
    "many-keys": many_keys,
    "many-values": many_values,
    "variables": variables,
    "frequent-words": frequent_words,
}
AT_A_DEPTH = ("needle", "many-keys")  # the others are spread over the text


def long_question(
    task: str, encode: Encode, length: int, *, depth: float | None = None, seed: int = 0
) -> LongQuestion:
    """Draws a question whose prompt and answer together have up to `length` tokens.

    Args:
      task: One of `TASKS`.
      encode: Text to token ids.
      depth: For the tasks `AT_A_DEPTH`.

    Raises:
      ValueError: An unknown task, a depth outside [0, 1], or a length that holds no question.

    Examples:
      >>> question = long_question("needle", str.split, 60, depth=0.5, seed=3)
      >>> len(question.prompt.split()) <= 60 and question.answers[0] in question.prompt
      True
      >>> question.answers[0] in question.without
      False
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} must be one of {', '.join(TASKS)}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"{depth=} must lie in [0, 1]")

    def made(size: int) -> LongQuestion:
        return TASKS[task](np.random.default_rng(seed), size, depth)

    def tokens(size: int) -> int:
        question = made(size)
        return len(encode(question.prompt + question.answer))

    if (least := tokens(0)) > length:
        raise ValueError(f"{task} needs {least} tokens at least, more than length={length}")
    # Each sentence has a token at least, so `length` of them are too many.
    return made(bisect_right(range(length), length, lo=1, key=tokens) - 1)
