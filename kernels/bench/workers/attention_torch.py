"""PyTorch's attention for `hopper.py`: SDPA and FlexAttention, timed by events on the device.

Reads cases as JSON from stdin and answers on stdout, one object per case:
`{"sdpa": {"seconds": [...]}, "flex": {"missing": "why"}}`.
"""

import json
import sys
from contextlib import redirect_stdout

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def main() -> None:
    work = json.load(sys.stdin)
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU")
    with redirect_stdout(sys.stderr):
        answers = [run(case, work) for case in work["cases"]]
    json.dump(answers, sys.stdout)


def run(case: dict, work: dict) -> dict:
    B, T, N, K, H = (case[name] for name in "BTNKH")
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(B, T, heads, H, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (N, K, K)
    )
    gradient = torch.randn_like(q)
    for x in (q, k, v):
        x.requires_grad_(work["backward"])
    found = {}
    for name, make in {"sdpa": sdpa, "flex": flex}.items():
        try:
            call = make(case, work["image"])
            found[name] = {"seconds": seconds(call, (q, k, v), gradient, work)}
        except Exception as reason:  # whatever PyTorch does not serve
            found[name] = {
                "missing": f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"
            }
    return found


def seen(case: dict, image: int):
    """The mask as a function of row and column."""
    window = case["window"]

    def visible(batch, head, row, column):
        ahead = column <= row
        if case["images"]:
            same = (row // (4 * image) == column // (4 * image)) & (row % (4 * image) < image)
            ahead = ahead | (same & (column % (4 * image) < image))
        return ahead if window is None else ahead & (column > row - window)

    return visible


def sdpa(case: dict, image: int):
    options = dict(enable_gqa=True, scale=case["H"] ** -0.5)
    if case["window"] is None and not case["images"]:
        options["is_causal"] = True
    else:
        rows = torch.arange(case["T"], device="cuda")
        mask = seen(case, image)(None, None, rows[:, None], rows[None])
        options["attn_mask"] = mask
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def flex(case: dict, image: int):
    block_mask = create_block_mask(seen(case, image), None, None, case["T"], case["S"], "cuda")
    compiled = torch.compile(flex_attention, fullgraph=True)
    options = dict(block_mask=block_mask, enable_gqa=True, scale=case["H"] ** -0.5)
    return lambda q, k, v: compiled(q, k, v, **options)


def seconds(call, operands, gradient, work: dict) -> list[float]:
    """Per call, by events on the device; with `backward`, of the backward pass alone."""
    out = call(*operands)

    def once():
        if work["backward"]:
            torch.autograd.grad(out, operands, gradient, retain_graph=True)
        else:
            call(*operands)

    for _ in range(3):
        once()
    found = []
    for _ in range(work["repeats"]):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(work["calls"]):
            once()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / work["calls"])
    return found


if __name__ == "__main__":
    main()
