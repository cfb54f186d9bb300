"""gemma-jax. Variants: the form that the weights are stored in, and `int8` after it if activations
are rounded to int8, too; all other arithmetic is float32.

`checkout` among the paths is the folder of another checkout to import it from.
"""

import json
import sys

import jax
from protocol import serve

if checkout := json.loads(sys.argv[2]).get("checkout"):
    sys.path[:0] = [checkout, f"{checkout}/kernels", f"{checkout}/checkpoints"]

import gemma_jax
from gemma_jax.benchmarks import speed as benchmark


class GemmaJax:
    def __init__(self, variant: str, paths: dict[str, str]):
        storage, _, activations = variant.partition(" ")
        weights = None if storage == "float32" else storage
        more = {"activations": activations} if activations else {}
        self._model = gemma_jax.load_model(paths["model"], dtype="float32", weights=weights, **more)
        self.facts = {"gemma_jax": gemma_jax.__version__, "jax": jax.__version__}

    def prefill(self, ids):
        seconds, (tokens,) = benchmark.prefill(self._model, [ids])
        return seconds, tokens

    def decode(self, ids, new_tokens, room):
        seconds, (tokens,) = benchmark.decode(self._model, [ids], new_tokens, room=room)
        return seconds, tokens


serve(GemmaJax)
