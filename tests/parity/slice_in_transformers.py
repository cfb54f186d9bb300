"""Slices of a Gemma 3n, written by `gemma-jax slice`, loaded by transformers: equal logits?

    python tests/parity/slice_in_transformers.py --gemma-jax PATH > slice_in_transformers.json

The answer is stored beside this file. Runs in an environment with torch and transformers; PATH is
the command of one with gemma-jax. The folders are loaded as they are, in float32; what transformers
finds missing or surplus in them is listed, and both sides' logits are compared on the same ids.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

MODEL = Path(__file__).parent / "data" / "g3n_text"  # 20 layers, pattern of five, last 10 sharing
SLICES = {
    "half width": ["--ffn-widths", ",".join(["64"] * 20)],
    "one shared block less": ["--skip-layers", "10,11,12,13,14"],
    "half width, one shared block less": [
        *("--ffn-widths", ",".join(["64"] * 15)),
        *("--skip-layers", "10,11,12,13,14"),
    ],
    "first and last block less, mixed widths": [
        *("--ffn-widths", "128,64,32,100,7,1,128,64,32,16"),
        *("--skip-layers", "0,1,2,3,4,15,16,17,18,19"),
    ],
    "single layers less": ["--skip-layers", "2,11,17", "--allow-irregular"],
}


def compare(command: str, options: list[str], folder: Path) -> dict:
    ids = np.random.default_rng(0).integers(0, 300, (2, 40))
    save_file({"input_ids": ids}, folder / "in.safetensors")
    small, out = folder / "slice", folder / "out.safetensors"
    subprocess.run([command, "slice", MODEL, small, *options, "--dtype", "float32"], check=True,
                   stdout=sys.stderr)  # fmt: skip
    files = ["--inputs", folder / "in.safetensors", "--output", out]
    subprocess.run([command, "forward", "--model", small, *files], check=True)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        small, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(ids)).logits.numpy()
    ours = load_file(out)["logits"]
    return {
        "options": " ".join(options),
        "class": type(model).__name__,
        "layers": model.config.num_hidden_layers,
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "largest_logit": float(np.abs(theirs).max()),
        "largest_difference": float(np.abs(ours - theirs).max()),
        "same_argmax": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gemma-jax", required=True, metavar="PATH", help="the command")
    args = parser.parse_args()
    results = {}
    for name, options in SLICES.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = compare(args.gemma_jax, options, Path(folder))
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    command = "python tests/parity/slice_in_transformers.py --gemma-jax PATH"
    print(json.dumps({"command": command, **versions, "slices": results}, indent=1))


if __name__ == "__main__":
    main()
