"""llama.cpp through llama-cpp-python, on the GGUF file as it is. Variant: its quantisation."""

import os
import time

import llama_cpp
from protocol import serve


class LlamaCpp:
    def __init__(self, variant: str, paths: dict[str, str]):
        threads = len(os.sched_getaffinity(0))
        self._model = llama_cpp.Llama(
            paths["gguf"], n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.facts = {
            "llama_cpp_python": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode(),
            "threads": threads,
        }

    def prefill(self, ids):
        self._model.reset()
        start = time.perf_counter()
        self._model.eval(ids)
        token = self._model.sample(temp=0)
        return time.perf_counter() - start, [token]

    def decode(self, ids, new_tokens, room):
        _, tokens = self.prefill(ids)
        start = time.perf_counter()
        for _ in range(new_tokens):
            self._model.eval(tokens[-1:])
            tokens.append(self._model.sample(temp=0))
        return time.perf_counter() - start, tokens


serve(LlamaCpp)
