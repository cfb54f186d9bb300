"""Which type each tensor of a new GGUF file gets: what llama.cpp's converter and quantiser choose.

Sources: `prepare_tensors` of `convert_hf_to_gguf.py`, `llama_tensor_get_type` and
`llama_model_quantize_impl` of `src/llama-quant.cpp`.

The `gguf` package cannot make K types. Where llama.cpp chooses one, a file gets the type that
llama.cpp itself falls back to where rows are not made of blocks of 256: Q5_0 for Q4_K, Q8_0 for
Q6_K. So a `q4_k_m` of Gemma 3 270M has the types that llama.cpp gives it but for the 36 matrices
whose rows are multiples of 256, and others are about a fifth larger than llama.cpp's.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

BLOCK = 32  # entries of the types that can be made
FALLBACKS: Mapping[str, str] = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
# Small or sensitive matrices: parts of their names.
PLAIN = ("altup", "laurel", "per_layer_model_proj")
FLOAT32 = ("altup_correct_coef", "altup_predict_coef")
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Mix:
    """A kind of file.

    Attributes:
      file_type: Its number in `general.file_type` (`LlamaFileType` of gguf-py).
      matrices, embeddings, more: Types of matrices, of embeddings and the head, and of matrices
        that are given more bits.
    """

    file_type: int
    matrices: str
    embeddings: str
    more: str


MIXES: Mapping[str, Mix] = {
    "q4_0": Mix(2, "Q4_0", "Q6_K", "Q4_0"),
    "q8_0": Mix(7, "Q8_0", "Q8_0", "Q8_0"),
    "q4_k_m": Mix(15, "Q4_K", "Q6_K", "Q6_K"),
}


def tensor_types(shapes: Mapping[str, tuple[int, ...]], mix: Mix) -> dict[str, str]:
    """Name -> type, for all tensors of a file.

    Rows that are not made of blocks of 32, in very small models alone, stay F16.

    Args:
      shapes: Name -> shape, the last axis as it lies in memory.
    """
    sensitive = {**_order(shapes, "attn_v"), **_order(shapes, "ffn_down")}

    def kind(name: str, shape: tuple[int, ...]) -> str:
        if not name.endswith(".weight") or len(shape) < 2 or name.endswith("_norm.weight"):
            return "F32"
        if any(part in name for part in FLOAT32):
            return "F32"
        if any(part in name for part in PLAIN):
            return "F16"
        chosen = mix.embeddings if name in EMBEDDINGS else mix.matrices
        if name in sensitive and _wants_more(*sensitive[name]):
            chosen = mix.more
        return "F16" if shape[-1] % BLOCK else FALLBACKS.get(chosen, chosen)

    return {name: kind(name, shape) for name, shape in shapes.items()}


def _order(names: Iterable[str], kind: str) -> dict[str, tuple[int, int]]:
    """Name -> its place among the matrices of a kind, by layer, and how many there are."""
    found = [(int(m[1]), name) for name in names if (m := _LAYER.fullmatch(name)) and m[2] == kind]
    return {name: (i, len(found)) for i, (_, name) in enumerate(sorted(found))}


def _wants_more(i: int, count: int) -> bool:
    """The first and last eighth of the layers, and every third between (`use_more_bits`)."""
    return i < count // 8 or i >= 7 * count // 8 or (i - count // 8) % 3 == 2
