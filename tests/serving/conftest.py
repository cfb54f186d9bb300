"""Live servers on the loopback, for the openai client as it is."""

import pytest
import tiny
import tiny_vocabulary
from serving_live import Scripted, live

from gemma_jax.inference.constraints import GrammarCompiler
from gemma_jax.inference.engine import Engine
from gemma_jax.inference.sampling import Sampling
from gemma_jax.serving.limits import Limits
from gemma_jax.serving.served import Served
from gemma_jax.text import Tokenizer

VOCABULARY = 320


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_sentencepiece_bytes(tiny_vocabulary.train(VOCABULARY))


@pytest.fixture(scope="session")
def served_by(tokenizer):
    """`served_by(engine, **changes)`: a tiny model's server without a model."""

    def make(engine, **changes) -> Served:
        fields = dict(
            name="tiny",
            cfg=tiny.gemma3(layers=1, vocab_size=VOCABULARY),
            tokenizer=tokenizer,
            engine=engine,
            context=256,
            limits=Limits(body_bytes=1 << 20, body_seconds=1, seconds=20, write_seconds=2),
            sampling=Sampling(temperature=1.0),
        )
        return Served(**(fields | changes))

    return make


@pytest.fixture(scope="module")
def scripted(served_by):
    """A live server over `Scripted`."""
    with live(served_by(Scripted())) as running:
        yield running


@pytest.fixture(scope="module")
def talker(served_by, tokenizer):
    """A live server of a tiny random Gemma 3 that sees."""
    vision = tiny.vision(num_layers=1, image_token=VOCABULARY, start_token=6, end_token=7)
    cfg = tiny.gemma3(layers=1, window=512, vocab_size=VOCABULARY, vision=vision)
    engine = Engine(
        tiny.model(cfg, "unrolled"), slots=2, context=256, chunk=32, queue=8, prefix_bytes=1 << 24
    )
    grammars = GrammarCompiler(tokenizer, VOCABULARY)
    engine.start()
    with live(served_by(engine, cfg=cfg, structured=grammars.constraint)) as running:
        yield running
    engine.close()
