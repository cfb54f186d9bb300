"""Makes the goldens of `data/`: what transformers computes, and how far rounding can move it.

    pip install "torch==2.13.0" "transformers==5.23.0" safetensors     (CPU builds will do)
    python tests/parity/make_goldens.py check tests/parity/data/g3_text
    python tests/parity/make_goldens.py write NEW_FOLDER --config config.json --seed 0

`check` recomputes every stored case from its stored inputs and says how far the outputs are from
the stored ones. `write` makes a new folder: a random model in bfloat16, every norm moved away from
its neutral value so that a mistake shows, and the same kinds of cases.

Each case is `NAME.safetensors` (`in.*`, `out.*`) and `NAME.json` with the noise of every output:
`noise_fp64`, the largest distance to the same model in float64, and `noise_alt`, to the same
float32 model with another order of summation (fused attention). Tests allow ten times the larger.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

GRADIENTS = (
    "model.multi_modal_projector.mm_input_projection_weight",
    "model.multi_modal_projector.mm_soft_emb_norm.weight",
    "model.vision_tower.embeddings.patch_embedding.weight",
    "model.vision_tower.embeddings.position_embedding.weight",
    "model.vision_tower.post_layernorm.bias",
    "model.language_model.layers.0.self_attn.v_proj.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.2.self_attn.k_norm.weight",
    "model.layers.3.mlp.gate_proj.weight",
    "model.layers.5.self_attn.q_proj.weight",
    "model.layers.5.self_attn.v_proj.weight",
    "model.layers.5.post_attention_layernorm.weight",
    "model.layers.6.mlp.down_proj.weight",
    "model.layers.6.self_attn.o_proj.weight",
    "model.layers.6.pre_feedforward_layernorm.weight",
    "model.layers.6.post_feedforward_layernorm.weight",
)
GRADIENTS_OF = {  # by `model_type`: those of parts that no other has
    "gemma4_text": (
        "model.embed_tokens_per_layer.weight",
        "model.per_layer_model_projection.weight",
        "model.layers.4.self_attn.k_proj.weight",
        "model.layers.4.self_attn.v_proj.weight",
        "model.layers.5.per_layer_input_gate.weight",
        "model.layers.9.mlp.down_proj.weight",
        "model.layers.9.self_attn.q_proj.weight",
    ),
}
VARIANTS = {  # name -> dtype, attention; the first is the golden
    "value": (torch.float32, "eager"),
    "noise_fp64": (torch.float64, "eager"),
    "noise_alt": (torch.float32, "sdpa"),
}


def model_class(config):
    """The class for a text model, or for one that reads images as well."""
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def load(folder: Path, dtype: torch.dtype, attention: str):
    loader = model_class(AutoConfig.from_pretrained(folder))
    return loader.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


class Recorder:
    """Keeps what modules return while a model runs."""

    def __init__(self):
        self.outputs: dict[str, list[torch.Tensor]] = {}
        self._hooks = []

    def listen(self, name: str, *modules) -> None:
        for module in modules:
            self._hooks.append(module.register_forward_hook(self._keep(name)))

    def _keep(self, name: str):
        def hook(module, args, out):
            out = getattr(out, "last_hidden_state", out)
            self.outputs.setdefault(name, []).append(out[0] if isinstance(out, tuple) else out)

        return hook

    def stop(self) -> dict[str, list[torch.Tensor]]:
        for hook in self._hooks:
            hook.remove()
        return self.outputs


def padded(inputs: dict) -> bool:
    return bool((inputs.get("attention_mask", torch.ones(1)) == 0).any())


@torch.no_grad()
def run_forward(model, inputs: dict) -> dict:
    """Logits, scaled embeddings, the residual after every layer, and the final norm; with images
    also every layer of the tower, its end, and the projector."""
    text, recorder = getattr(model.model, "language_model", model.model), Recorder()
    recorder.listen("layer_outputs", *text.layers)
    recorder.listen("final_norm", text.norm)
    if "pixel_values" in inputs:
        tower = model.model.vision_tower
        recorder.listen("vision_layer_outputs", *tower.encoder.layers)
        recorder.listen("vision_last_hidden_state", tower)
        recorder.listen("projector_output", model.model.multi_modal_projector)
    logits = model(**inputs).logits
    found = recorder.stop()
    outputs = {name: v if "layer_outputs" in name else v[0] for name, v in found.items()}
    outputs = {k: torch.stack(v) if isinstance(v, list) else v for k, v in outputs.items()}
    outputs |= {"logits": logits, "embeddings": text.embed_tokens(inputs["input_ids"])}
    if padded(inputs):  # such cases keep what is compared at real tokens
        outputs = {name: outputs[name] for name in ("logits", "final_norm")}
    return outputs


@torch.no_grad()
def run_generate(model, inputs: dict, steps: int = 24) -> dict:
    """Greedy continuation: ids, logits of every step, and the lead of the best over the second."""
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=steps, min_new_tokens=steps,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    logits = torch.stack(out.logits, dim=1)
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    ids = out.sequences[:, inputs["input_ids"].shape[1] :]
    return {"gen_ids": ids, "gen_logits": logits, "gen_margins": best - second}


def run_gradients(model, inputs: dict) -> dict:
    """Mean loss over positions t with labels[t + 1] != -100, and its gradients."""
    model.zero_grad()
    given = {name: value for name, value in inputs.items() if name != "labels"}
    log_probs = model(**given).logits[:, :-1].log_softmax(-1)
    targets = inputs["labels"][:, 1:]
    real = targets != -100
    loss = -log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0][real].mean()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.sqrt(sum(g.square().sum() for g in grads.values()))
    names = GRADIENTS + GRADIENTS_OF.get(model.config.model_type, ())
    chosen = {f"grad.{name}": grads[name] for name in names if name in grads}
    return {"loss": loss.detach()[None], "grad_global_norm": norm[None]} | chosen


def runner(name: str):
    if name.startswith("generate"):
        return run_generate
    return run_gradients if name == "gradients" else run_forward


def compared(key: str, inputs: dict):
    """Index of what counts in an output: all of it, or what lies at real tokens."""
    at_real = padded(inputs) and key in ("logits", "final_norm")
    return inputs["attention_mask"] == 1 if at_real else ...


def compute(folder: Path, name: str, inputs: dict) -> tuple[dict, dict]:
    """`(outputs in float32, facts per output)` of one case."""
    results = {}
    for variant, settings in VARIANTS.items():
        if variant == "noise_fp64" and padded(inputs):
            continue  # a row of padding sees nothing, and transformers in float64 makes nan of it
        try:
            model = load(folder, *settings)
        except ValueError:
            if variant != "noise_alt":
                raise
            continue  # a class without fused attention, such as VaultGemma's
        results[variant] = runner(name)(model, inputs)
    outputs, facts = results["value"], {}
    for key, value in outputs.items():
        fact = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if value.is_floating_point():
            fact["abs_max"] = value.abs().max().item()
            for variant in results.keys() - {"value"}:
                error = (results[variant][key].double() - value.double()).abs()
                fact[variant] = error[compared(key, inputs)].max().item()
        facts[key] = fact
    return outputs, facts


def check(folder: Path) -> None:
    """Prints, per output, the distance to the stored one in units of its tolerance."""
    for path in sorted(folder.glob("*.safetensors")):
        name = path.stem
        if name in ("model", "forward_bf16"):
            continue
        stored = load_file(path)
        inputs = {k[3:]: v for k, v in stored.items() if k.startswith("in.")}
        outputs, facts = compute(folder, name, inputs)
        for key, fact in facts.items():
            error = (outputs[key].double() - stored[f"out.{key}"].double()).abs()
            error = error[compared(key, inputs)]
            if not fact.keys() & {"noise_alt", "noise_fp64"}:
                print(f"{name:18} {key:52} {'equal' if error.max() == 0 else 'DIFFERENT'}")
                continue
            tolerance = 10 * max(fact.get("noise_alt", 0), fact.get("noise_fp64", 0)) or 5e-6
            print(f"{name:18} {key:52} {error.max().item() / tolerance:.3f} of the tolerance")


def write(folder: Path, config: Path, seed: int) -> None:
    """A random model and its cases in a new folder."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    cfg = AutoConfig.from_pretrained(config)
    model = model_class(cfg).from_config(cfg, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            vector = parameter.ndim == 1
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if vector else parameter.shape[-1] ** -0.5)
            )
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # Gemma 4 stores it, and never trains it
                buffer.copy_(1 + 0.3 * torch.randn_like(buffer))
    model.to(torch.bfloat16).save_pretrained(folder)
    for name, inputs in (image_cases if hasattr(cfg, "vision_config") else text_cases)(cfg).items():
        outputs, facts = compute(folder, name, inputs)
        if not any("noise_fp64" in fact or "noise_alt" in fact for fact in facts.values()):
            continue  # nothing says how far rounding can move it
        arrays = {f"in.{k}": v for k, v in inputs.items()}
        arrays |= {f"out.{k}": v.contiguous() for k, v in outputs.items()}
        save_file({k: v.clone() for k, v in arrays.items()}, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps({"case": name, "outputs": facts}, indent=1))


def text_cases(cfg) -> dict[str, dict]:
    """Inputs of every kind of case: alone, padded on either side, continued, differentiated."""
    ids = torch.randint(4, cfg.vocab_size, (4, 40))
    mask = (torch.arange(40) >= torch.tensor([0, 5, 20, 33])[:, None]).long()
    labels = ids[:1].clone()
    labels[:, :7] = -100
    cases = {
        "forward": {"input_ids": ids[:1]},
        "generate": {"input_ids": ids[:1, :17]},
        "gradients": {"input_ids": ids[:1], "labels": labels},
        "generate_left_pad": {"input_ids": ids * mask, "attention_mask": mask},
    }
    for side, real in (("left", mask), ("right", mask.flip(1))):
        positions = (real.cumsum(1) - 1).clamp(min=0)
        cases[f"batch_{side}_pad"] = {
            "input_ids": ids * real, "attention_mask": real, "position_ids": positions,
        }  # fmt: skip
    return cases


def image_cases(cfg) -> dict[str, dict]:
    """A prompt with two images: text, image, text, image, text."""
    size, count = cfg.vision_config.image_size, cfg.mm_tokens_per_image
    text = [torch.randint(4, cfg.boi_token_index, (n,)).tolist() for n in (5, 3, 6)]
    span = [cfg.boi_token_index, *[cfg.image_token_index] * count, cfg.eoi_token_index]
    ids = torch.tensor([text[0] + span + text[1] + span + text[2]])
    types = (ids == cfg.image_token_index).long()
    images = {"token_type_ids": types, "pixel_values": torch.rand(2, 3, size, size) * 2 - 1}
    labels = torch.where(types == 1, -100, ids)
    return {
        "forward": {"input_ids": ids, **images},
        "forward_text_only": {"input_ids": torch.randint(4, cfg.boi_token_index, (1, 18))},
        "generate": {"input_ids": ids, **images},
        "gradients": {"input_ids": ids, **images, "labels": labels},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check").add_argument("folder", type=Path)
    maker = commands.add_parser("write")
    maker.add_argument("folder", type=Path)
    maker.add_argument("--config", type=Path, required=True)
    maker.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_grad_enabled(True)
    if options.command == "check":
        check(options.folder)
    else:
        write(options.folder, options.config, options.seed)


if __name__ == "__main__":
    main()
