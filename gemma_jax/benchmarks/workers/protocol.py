"""How a worker talks to `rivals.py`: one JSON object per line, on pipes of its own.

A worker is a script that ends in `serve(make)`. `make(variant, paths)` loads a model and returns a
`Rival`; from then on the process waits for work, does it, and answers with seconds and a result.

Standard library only: each worker runs in the environment of its rival.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol


class Rival(Protocol):
    """One language model, loaded and ready. Both methods return after the results are there."""

    facts: dict[str, Any]  # versions, and how the model was set up

    def prefill(self, ids: list[int]) -> tuple[float, list[int]]:
        """Seconds from a prompt to the logits of its last token, and the likeliest next token."""

    def decode(self, ids: list[int], new_tokens: int, room: int) -> tuple[float, list[int]]:
        """Seconds of `new_tokens` steps of one token each, greedy, after a prompt that was read
        before the clock started; and the tokens chosen. Where shapes are compiled they have space
        for `room` tokens, so that a short warm-up compiles what counts later."""


def serve(make: Callable[[str, dict[str, str]], Rival]) -> None:
    """Answers requests on stdin until it is closed; `argv` is a variant and the paths as JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not get between the answers
    start = time.perf_counter()
    rival = make(sys.argv[1], json.loads(sys.argv[2]))
    facts = rival.facts | {"python": sys.version.split()[0], "load_s": time.perf_counter() - start}
    print(json.dumps(facts), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        seconds, result = getattr(rival, request.pop("work"))(**request)
        print(json.dumps({"seconds": seconds, "result": result}), file=answers)
