"""Several adapters beside one model, each asked for as a model."""

import openai
import pytest
import tiny
from serving_live import ASK, live
from training.test_lora import filled

import gemma_jax as gj
from gemma_jax.inference.engine import Engine


@pytest.fixture(scope="module")
def model():
    base = tiny.model(tiny.gemma3(1, window=512, vocab_size=320))
    settings = gj.Lora(rank=2, targets=("blocks.*.attn.*",))
    return gj.with_adapters(base, {n: filled(base, settings, i) for i, n in enumerate("ab")})


def test_each_is_a_model(served_by, model, tokenizer):
    engine = Engine(model, slots=2, context=256, chunk=64, queue=8)
    engine.start()
    with live(served_by(engine, cfg=model.cfg, adapters=("a", "b"))) as server:
        client = server.client()
        assert [one.id for one in client.models.list()] == ["tiny", "a", "b"]
        texts = []
        for name in ("tiny", "a", "b"):
            done = client.chat.completions.create(
                **ASK | {"model": name, "max_tokens": 6}, temperature=0
            )
            chosen = gj.choose_adapters(model, None if name == "tiny" else name)
            alone = gj.generate(chosen, tokenizer, ASK["messages"], max_new_tokens=6)
            assert done.choices[0].message.content == alone.text and done.model == name
            texts.append(alone.text)
        assert len(set(texts)) == 3
        with pytest.raises(openai.NotFoundError, match="there is tiny, a, b"):
            client.chat.completions.create(**ASK | {"model": "c"})
    engine.close()
