"""Makes `data/g3n_vision/sizes.*`: what timm's MobileNetV5 makes of other sizes, in and out.

    pip install "timm==1.0.31" safetensors     (CPU builds of torch will do)
    python tests/parity/make_vision_goldens.py

Weights and pixels are those of the case `forward`, of which the left upper corner is taken. Outputs
are `features_SIZE_SIDE`, for images of SIZE pixels and SIDE x SIDE results: `noise_fp64` is the
largest distance to the same model in float64, `rms_error_bf16` the root of the mean square of that
between it and the same in bfloat16.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv5 import MobileNetV5

FOLDER = Path(__file__).parent / "data" / "g3n_vision"
# Nothing to do; averages of 2 x 2, and of 2 x 2 of a larger map; fewer and more by interpolation.
CASES = ((32, 2), (64, 2), (96, 3), (64, 3), (32, 3))


def build(side: int) -> torch.nn.Module:
    described = json.loads((FOLDER / "config.json").read_text())
    model = MobileNetV5(
        decode_arch_def(described["arch_def"]),
        num_classes=0,
        stem_size=described["stem_size"],
        num_features=described["num_features"],
        pad_type=described["pad_type"],
        msfa_output_resolution=side,
        layer_scale_init_value=1e-5,
        global_pool="",
    )
    model.load_state_dict(load_file(FOLDER / "model.safetensors"))
    return model.eval()


@torch.inference_mode()
def main() -> None:
    pixels = load_file(FOLDER / "forward.safetensors")["in.pixel_values"]
    outputs, facts = {}, {}
    for size, side in CASES:
        model, corner = build(side), pixels[..., :size, :size]
        value = model.forward_features(corner)
        exact = model.double().forward_features(corner.double())
        narrow = model.bfloat16().forward_features(corner.bfloat16())
        name = f"features_{size}_{side}"
        outputs[f"out.{name}"] = value.contiguous()
        facts[name] = {
            "shape": list(value.shape),
            "dtype": "float32",
            "abs_max": value.abs().max().item(),
            "noise_fp64": (exact - value).abs().max().item(),
            "rms_error_bf16": (narrow.double() - exact).square().mean().sqrt().item(),
        }
    save_file(outputs, FOLDER / "sizes.safetensors")
    described = {"case": "sizes", "outputs": facts}
    (FOLDER / "sizes.json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
