"""transformers with random weights in bfloat16: SDPA and a static cache.

Variants: `eager`, or `compile` for what `generate` compiles by itself on a GPU.
"""

import json
import time
from pathlib import Path

import torch
import transformers
from protocol import serve
from transformers.generation.streamers import BaseStreamer


class Loop:
    def __init__(self, variant: str, paths: dict[str, str]):
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._compile = variant == "compile"
        fields = json.loads(Path(paths["config"]).read_text())
        config = transformers.AutoConfig.for_model(**fields)
        with torch.device(self._device):
            self._model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            ).eval()
        self.facts = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "attention": self._model.config._attn_implementation,
        }

    @torch.inference_mode()
    def prefill(self, ids):
        ids_BT = torch.tensor(ids, device=self._device)
        start = time.perf_counter()
        out = self._model(ids_BT, use_cache=True, logits_to_keep=1)
        tokens = out.logits[:, -1].argmax(-1).tolist()  # waits for the device
        return time.perf_counter() - start, tokens[:1]

    @torch.inference_mode()
    def decode(self, ids, new_tokens, room):
        clock = Clock()
        out = self._model.generate(
            torch.tensor(ids, device=self._device),
            attention_mask=torch.ones(len(ids), len(ids[0]), dtype=int, device=self._device),
            do_sample=False,
            max_new_tokens=new_tokens + 1,
            eos_token_id=None,
            cache_implementation="static",
            disable_compile=not self._compile,
            pad_token_id=0,
            streamer=clock,
        )
        tokens = out[0, len(ids[0]) :].tolist()
        assert len(tokens) == new_tokens + 1
        return clock.ticks[-1] - clock.ticks[1], tokens


class Clock(BaseStreamer):
    """Told of the prompt, then of each token, when it is there."""

    def __init__(self):
        self.ticks = []

    def put(self, value):
        self.ticks.append(time.perf_counter())

    def end(self):
        pass


serve(Loop)
