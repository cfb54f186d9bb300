"""gemma-jax, with one resident model and its submodels. Variants: the dtype of the weights."""

import jax
from protocol import serve

import gemma_jax
from gemma_jax import matformer
from gemma_jax.benchmarks import speed as benchmark


class Elastic:
    def __init__(self, storage: str, paths: dict[str, str]):
        weights = None if storage == "float32" else storage
        whole = gemma_jax.load_model(
            paths["hf"], dtype="float32", weights=weights, layout="unrolled"
        )
        submodel = matformer.Slice.read(paths["slice"])
        self._models = {
            "whole": whole,
            "slice": matformer.slice(whole, submodel),
            "view": matformer.at(whole, submodel),
        }
        self.facts = {"gemma_jax": gemma_jax.__version__, "jax": jax.__version__}

    def decode(self, ids, new_tokens, room, model="whole"):
        seconds, (tokens,) = benchmark.decode(self._models[model], [ids], new_tokens, room=room)
        return seconds, tokens


serve(Elastic)
