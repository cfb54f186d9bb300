"""google-deepmind/gemma, its own prefill and sampler loop. Variants: the dtype of everything."""

import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
from gemma import gm
from gemma.gm.text import _prefill, _sampler_loop
from gemma.gm.utils import _types
from protocol import serve
from safetensors.numpy import load_file


class GoogleDeepMind:
    def __init__(self, dtype: str, paths: dict[str, str]):
        self._model = gm.nn.Gemma3_270M(dtype=jnp.dtype(dtype))
        layers = self._model.config.num_layers
        tree = params_from_hf(load_file(Path(paths["hf"]) / "model.safetensors"), layers)
        self._params = jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)
        self._check_shapes()
        self.facts = {
            "gemma": version("gemma"),
            "jax": jax.__version__,
            "flax": version("flax"),
            "note": "cache as long as prompt and new tokens, no padding of the prompt",
        }

    def prefill(self, ids):
        start = time.perf_counter()
        state = jax.block_until_ready(self._prefill(ids, 1))
        seconds = time.perf_counter() - start
        return seconds, self._loop(state, 1)

    def decode(self, ids, new_tokens, room):
        state = jax.block_until_ready(self._prefill(ids, room))
        start = time.perf_counter()
        tokens = self._loop(state, new_tokens)
        return time.perf_counter() - start, tokens

    def _prefill(self, ids, room):
        """Its sampler throws the prompt's logits away and begins with the last prompt token."""
        text = jnp.asarray([ids], jnp.int32)
        return _prefill.prefill(
            model=self._model,
            params=self._params,
            input=_types.Input(text=text, images=None, config=self._model.config.input_config),
            last_state=None,
            cache_length=len(ids) + room,
            max_out_length=room,
            pad_length=None,
            rng=jax.random.PRNGKey(0),
            sharding=None,
        )

    def _loop(self, state, new_tokens):
        loop = _sampler_loop.SamplerLoop(
            model=self._model,
            end_tokens=(-1,),
            forbidden_tokens=None,
            sampling=gm.text.Greedy(),
            cache_length=0,  # not used by the loop
            special_tokens=gm.text.Gemma3Tokenizer.special_tokens,
        )
        state = loop.sample(
            params=self._params, init_state=state, max_new_tokens=jnp.asarray(new_tokens)
        )
        return state.predicted_tokens[0, :new_tokens].tolist()

    def _check_shapes(self):
        ids = jnp.ones((1, 2), jnp.int32)
        want = jax.eval_shape(self._model.init, jax.random.PRNGKey(0), ids)["params"]
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (want, self._params)]
        assert shapes[0] == shapes[1], "the parameter tree of gemma has changed"


def params_from_hf(theirs: dict, num_layers: int) -> dict:
    """Weights under Hugging Face's names -> the parameter tree of Gemma3_270M."""
    tree = {
        "embedder": {"input_embedding": theirs["model.embed_tokens.weight"]},
        "final_norm": {"scale": theirs["model.norm.weight"]},
    }
    for i in range(num_layers):
        w = {
            name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): array
            for name, array in theirs.items()
            if name.startswith(f"model.layers.{i}.")
        }
        head = len(w["self_attn.q_norm"])
        by_head = {  # [(heads head) D] -> [heads D head]
            p: w[f"self_attn.{p}_proj"].reshape(-1, head, w["self_attn.q_proj"].shape[1])
            for p in "qkv"
        }
        q, k, v = (by_head[p].transpose(0, 2, 1) for p in "qkv")
        out = w["self_attn.o_proj"].T
        tree[f"layer_{i}"] = {
            "pre_attention_norm": {"scale": w["input_layernorm"]},
            "attn": {
                "q_einsum": {"w": q},
                "kv_einsum": {"w": jnp.stack([k, v])},
                "attn_vec_einsum": {"w": out.reshape(-1, head, out.shape[1])},
                "_query_norm": {"scale": w["self_attn.q_norm"]},
                "_key_norm": {"scale": w["self_attn.k_norm"]},
            },
            "post_attention_norm": {"scale": w["post_attention_layernorm"]},
            "pre_ffw_norm": {"scale": w["pre_feedforward_layernorm"]},
            "mlp": {
                "gating_einsum": jnp.stack([w["mlp.gate_proj"], w["mlp.up_proj"]]),
                "linear": w["mlp.down_proj"].T,
            },
            "post_ffw_norm": {"scale": w["post_feedforward_layernorm"]},
        }
    return tree


serve(GoogleDeepMind)
