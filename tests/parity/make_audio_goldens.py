"""Makes `data/g3n_audio/alone.*`: what transformers' audio tower makes of clips one by one.

    pip install "torch==2.13.0" "transformers==5.24.0" safetensors     (CPU builds will do)
    python tests/parity/make_audio_goldens.py

The clips are the first frames of one array, of every length modulo 16: so many frames make one
soft token, and where a clip ends in them decides how much of its last windows is padding. Each is
given alone, without a mask: in a batch transformers lets its last token see what lies behind it.
The noise is the largest distance to the same model in float64, as in `make_goldens.py`.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Gemma3nAudioEncoder

FOLDER = Path(__file__).parent / "data" / "g3n_audio"
LENGTHS = (*range(1, 17), *range(81, 97))


@torch.no_grad()
def alone(features: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tower's result for each length, `[soft tokens, width]`."""
    tower = Gemma3nAudioEncoder.from_pretrained(FOLDER, dtype=dtype).eval()
    results = {}
    for length in LENGTHS:
        clip = features[None, :length].to(dtype)
        padded = torch.zeros(1, length, dtype=torch.bool)
        results[f"tokens_{length}"] = tower(clip, padded).last_hidden_state[0]
    return results


def main() -> None:
    torch.manual_seed(0)
    features = torch.randn(max(LENGTHS), 24) * 1.5
    value, exact = alone(features, torch.float32), alone(features, torch.float64)
    arrays = {"in.input_features": features} | {f"out.{k}": v for k, v in value.items()}
    save_file({k: v.contiguous() for k, v in arrays.items()}, FOLDER / "alone.safetensors")
    noise = {k: (exact[k] - v.double()).abs().max().item() for k, v in value.items()}
    facts = {"case": "alone", "outputs": {k: {"noise_fp64": n} for k, n in noise.items()}}
    (FOLDER / "alone.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
