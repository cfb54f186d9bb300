"""transformers' audio tower of Gemma 3n with torch; makes the random weights too.

conformer_torch.py make FOLDER
conformer_torch.py float32 '{"weights": FOLDER, "inputs": FILE, "output": FILE}'
"""

import os
import resource
import sys
import time

import torch
import transformers
from safetensors.torch import load_file, save_file


def make(folder: str) -> None:
    """Random weights whose norms and scales are away from their neutral values."""
    torch.manual_seed(0)
    model = transformers.Gemma3nAudioEncoder(transformers.Gemma3nAudioConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(mean=1.0, std=0.1)
    model.save_pretrained(folder)


class Tower:
    def __init__(self, variant: str, paths: dict[str, str]):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        dtype = torch.float64 if variant == "float64" else torch.float32
        self._model = transformers.Gemma3nAudioEncoder.from_pretrained(
            paths["weights"], dtype=dtype, local_files_only=True
        ).eval()
        self._output = paths["output"]
        self._mel = load_file(paths["inputs"])["mel"].to(dtype)
        self._padding = torch.zeros(self._mel.shape[:2], dtype=torch.bool)
        self.facts = {"transformers": transformers.__version__, "torch": torch.__version__}

    @torch.inference_mode()
    def encode(self) -> tuple[float, int]:
        """Seconds for the clip, and the peak memory of this process in bytes."""
        start = time.perf_counter()
        features = self._model(self._mel, self._padding).last_hidden_state
        seconds = time.perf_counter() - start
        save_file({"features": features.float().contiguous()}, self._output)
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if sys.argv[1] == "make":
    make(sys.argv[2])
else:
    from protocol import serve

    serve(Tower)
