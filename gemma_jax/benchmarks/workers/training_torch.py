"""transformers with torch's AdamW, and PEFT: steps of training on rows of one length.

Variants: `full`, all parameters; `lora`, adapters of rank 16 beside attention and feed-forward.
"""

import time

import torch
import transformers
from protocol import serve

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Training:
    def __init__(self, variant: str, paths: dict[str, str]):
        torch.set_num_threads(int(paths["cores"]))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            paths["hf"], dtype=torch.float32, attn_implementation="sdpa"
        )
        self.facts = {"torch": torch.__version__, "transformers": transformers.__version__}
        if variant == "lora":
            import peft

            settings = peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS)
            model = peft.get_peft_model(model, settings)
            self.facts["peft"] = peft.__version__
        self._model = model.train()
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-5, weight_decay=0.0)
        self.facts["trained"] = sum(p.numel() for p in self._trained)

    def step(self, ids):
        """Seconds of a step on these rows, and its loss."""
        ids_BT = torch.tensor(ids)
        start = time.perf_counter()
        loss = self._model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start, loss.item()


serve(Training)
