#!/usr/bin/env bash
# Expected: a saved config.json of Gemma 4 has global_head_dim, the key of the published files, and
# who changes it there changes the heads of the global layers; num_global_key_value_heads says how
# many key heads those have.
# Seen with transformers 5.24.0: save_pretrained writes neither key, but per_layer_config with what
# single layers have. Beside that a global_head_dim is dropped without a word: set from 128 to 256,
# layers stay at 128; without per_layer_config the same file gives 256. And
# num_global_key_value_heads is dropped, as silently, unless attention_k_eq_v is set too.
# Exits with 0 while all of this is so, and with 1 when not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "transformers==5.24.0"
"$work/venv/bin/python" - "$work" 2>/dev/null <<'PYTHON'
import json
import sys
from pathlib import Path

import transformers
from transformers import Gemma4TextConfig

folder = Path(sys.argv[1], "model")
file = folder / "config.json"
print("transformers", transformers.__version__)


def layers(config, name):
    return [getattr(one, name) for one in config.per_layer_config]


Gemma4TextConfig(num_hidden_layers=6, head_dim=64, global_head_dim=128).save_pretrained(folder)
written = json.loads(file.read_text())
print("written: global_head_dim", written.get("global_head_dim"), "and per_layer_config",
      written["per_layer_config"])

written["global_head_dim"] = 256
file.write_text(json.dumps(written))
beside = layers(Gemma4TextConfig.from_pretrained(folder), "head_dim")
del written["per_layer_config"]
file.write_text(json.dumps(written))
alone = layers(Gemma4TextConfig.from_pretrained(folder), "head_dim")
print("head_dim with global_head_dim=256 beside it:", beside)
print("head_dim with global_head_dim=256 alone:    ", alone)

asked = {"num_hidden_layers": 6, "num_key_value_heads": 4, "num_global_key_value_heads": 2}
without = layers(Gemma4TextConfig(**asked), "num_key_value_heads")
joined = layers(Gemma4TextConfig(**asked, attention_k_eq_v=True), "num_key_value_heads")
print("key heads, 2 asked for in global layers:    ", without)
print("key heads, with attention_k_eq_v as well:   ", joined)

local = [64] * 5
so = beside == [*local, 128] and alone == [*local, 256]
so = so and without == [4] * 6 and joined == [4] * 5 + [2]
sys.exit(0 if so else 1)
PYTHON
