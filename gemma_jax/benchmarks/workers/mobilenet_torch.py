"""timm's MobileNetV5-300M with torch; makes the random weights too.

mobilenet_torch.py make FILE
mobilenet_torch.py float32 '{"weights": FILE, "inputs": FILE, "output": FILE}'
"""

import os
import resource
import sys
import time

import timm
import torch
from safetensors.torch import load_file, save_file

NAME = "mobilenetv5_300m_enc"


def make(file: str) -> None:
    """Random weights whose norms and scales are away from their neutral values."""
    torch.manual_seed(0)
    model = timm.create_model(NAME)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    save_file(model.state_dict(), file)


class Tower:
    def __init__(self, variant: str, paths: dict[str, str]):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        layout = torch.channels_last if variant == "channels_last" else torch.contiguous_format
        dtype = torch.float64 if variant == "float64" else torch.float32
        model = timm.create_model(NAME).eval()
        model.load_state_dict(load_file(paths["weights"]), assign=True)
        self._model, self._output = model.to(dtype, memory_format=layout), paths["output"]
        pixels = load_file(paths["inputs"])["pixels"]
        self._pixels = pixels.to(dtype).contiguous(memory_format=layout)
        self.facts = {"timm": timm.__version__, "torch": torch.__version__}

    @torch.inference_mode()
    def encode(self) -> tuple[float, int]:
        """Seconds for one image, and the peak memory of this process in bytes."""
        start = time.perf_counter()
        features = self._model(self._pixels)
        seconds = time.perf_counter() - start
        save_file({"features": features.float().contiguous()}, self._output)
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if sys.argv[1] == "make":
    make(sys.argv[2])
else:
    from protocol import serve

    serve(Tower)
