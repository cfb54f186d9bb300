"""A task for lm-eval that needs no network: trivia out of the package chatterbot-corpus.

    python -m gemma_jax.evaluation.trivia tasks/
    gemma-jax evaluate --model gemma3-270m --include-path tasks/ --tasks trivia

The package (BSD 3-Clause) holds some 250 questions with an answer. Each becomes a choice among
four: its own answer and three of others, drawn by the question itself, so that every machine has
the same. It shows that all works, and how two models or storages compare; it is no published
benchmark.
"""

import json
import random
import sys
from importlib.resources import files
from pathlib import Path

MISSING = "trivia needs two packages: pip install 'gemma-jax[finetune]'"
CHOICES = 4
TASK = """\
# Questions and answers: chatterbot-corpus, data/english/trivia.yml (BSD 3-Clause).
task: trivia
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
"""


def documents() -> list[dict]:
    """Questions in the order of the file: `question`, `choices`, and the number of the `answer`.

    Raises:
      ImportError: The package is not there.
    """
    try:
        import yaml

        file = files("chatterbot_corpus").joinpath("data", "english", "trivia.yml")
    except ImportError:
        raise ImportError(MISSING) from None
    talks = yaml.safe_load(file.read_text("utf-8"))["conversations"]
    pairs = {str(talk[0]).strip(): str(talk[1]).strip() for talk in talks if len(talk) == 2}
    answers = sorted(set(pairs.values()))
    found = []
    for question, answer in pairs.items():
        draw = random.Random(question)  # a text seeds it alike everywhere
        others = [other for other in answers if other.lower() != answer.lower()]
        choices = [answer, *draw.sample(others, CHOICES - 1)]
        draw.shuffle(choices)
        found.append({"question": question, "choices": choices, "answer": choices.index(answer)})
    return found


def write(folder: Path) -> None:
    """Makes `trivia.yaml` and its data, `trivia.jsonl`, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / "trivia.jsonl").resolve()
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in documents()]
    data.write_text("".join(lines), "utf-8")
    (folder / "trivia.yaml").write_text(TASK.replace("DATA", json.dumps(str(data))), "utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m gemma_jax.evaluation.trivia FOLDER")
    write(Path(sys.argv[1]))
