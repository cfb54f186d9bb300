"""transformers with torch. Variants: the dtype of weights and arithmetic."""

import os
import time

import torch
import transformers
from protocol import serve
from transformers.generation.streamers import BaseStreamer


class Transformers:
    def __init__(self, dtype: str, paths: dict[str, str]):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            paths["hf"], dtype=getattr(torch, dtype), local_files_only=True
        ).eval()
        self.facts = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "attention": self._model.config._attn_implementation,
        }

    @torch.inference_mode()
    def prefill(self, ids):
        ids_BT = torch.tensor([ids])
        start = time.perf_counter()
        out = self._model(ids_BT, use_cache=True, logits_to_keep=1)
        token = int(out.logits[0, -1].argmax())
        return time.perf_counter() - start, [token]

    @torch.inference_mode()
    def decode(self, ids, new_tokens, room):
        ids_BT, clock = torch.tensor([ids]), Clock()
        out = self._model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            max_new_tokens=new_tokens + 1,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock,
        )
        tokens = out[0, len(ids) :].tolist()
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


serve(Transformers)
