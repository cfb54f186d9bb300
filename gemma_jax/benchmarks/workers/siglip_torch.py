"""transformers' SigLIP tower and Gemma 3 projector with torch; makes the random weights too.

siglip_torch.py make FOLDER     a Gemma 3 with the So400m tower and next to no text
siglip_torch.py float32 '{"weights": FOLDER, "inputs": FILE, "output": FILE}'
"""

import os
import resource
import sys
import time

import torch
import transformers
from safetensors.torch import load_file, save_file

TEXT = dict(
    vocab_size=512, hidden_size=2560, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=16,
)  # fmt: skip
VISION = dict(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
    image_size=896, patch_size=14, vision_use_head=False,
)  # fmt: skip


def make(folder: str) -> None:
    """Random weights whose norms and biases are away from their neutral values."""
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=256,
        image_token_index=500, boi_token_index=501, eoi_token_index=502,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                neutral = 1.0 if "layer" in name and name.endswith("norm.weight") else 0.0
                parameter.normal_(mean=neutral, std=0.1)
    model.save_pretrained(folder)


class Tower:
    def __init__(self, variant: str, paths: dict[str, str]):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        dtype = torch.float64 if variant == "float64" else torch.float32
        attention = "eager" if variant == "eager" else "sdpa"
        model = transformers.Gemma3ForConditionalGeneration.from_pretrained(
            paths["weights"], dtype=dtype, attn_implementation=attention, local_files_only=True
        ).eval()
        self._model, self._output = model.model, paths["output"]
        self._pixels = load_file(paths["inputs"])["pixels"].to(dtype)
        self.facts = {"transformers": transformers.__version__, "torch": torch.__version__}

    @torch.inference_mode()
    def encode(self) -> tuple[float, int]:
        """Seconds for one image, and the peak memory of this process in bytes."""
        start = time.perf_counter()
        tower = self._model.vision_tower(pixel_values=self._pixels).last_hidden_state
        soft = self._model.multi_modal_projector(tower)
        seconds = time.perf_counter() - start
        save_file(
            {"tower": tower.float().contiguous(), "soft": soft.float().contiguous()}, self._output
        )
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if sys.argv[1] == "make":
    make(sys.argv[2])
else:
    from protocol import serve

    serve(Tower)
