"""Live servers on the loopback, for the openai client as it is."""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field

import openai
import pytest
import tiny
import tiny_vocabulary

from gemma_jax.inference.requests import Piece, Request
from gemma_jax.inference.sampling import Sampling
from gemma_jax.serving.app import make_app
from gemma_jax.serving.limits import Limits
from gemma_jax.serving.one_at_a_time import OneAtATime
from gemma_jax.serving.served import Served
from gemma_jax.serving.server import Server
from gemma_jax.text import Tokenizer

VOCABULARY = 320


@dataclass
class Ticket:
    """Of a scripted answer."""

    prompt_tokens: int
    cached_tokens: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self):
        self.cancelled.set()


class Scripted:
    """An engine that says what `script(request)` yields: pieces, or seconds to wait.

    What it raises, `submit` raises if it is an error, at once.
    """

    def __init__(self):
        self.script, self.requests, self.tickets = lambda request: [], [], []

    def start(self): ...

    def close(self): ...

    def stats(self):
        return {"running": 0, "waiting": 0}

    def submit(self, request: Request, on_piece) -> Ticket:
        answer = self.script(request)
        if isinstance(answer, Exception):
            raise answer
        ticket = Ticket(len(request.prompt.token_ids), cached_tokens=1)
        self.requests.append(request)
        self.tickets.append(ticket)
        threading.Thread(target=self._tell, args=(answer, ticket, on_piece), daemon=True).start()
        return ticket

    def _tell(self, answer, ticket, on_piece):
        for step in answer:
            if isinstance(step, Piece):
                on_piece(step)
            elif ticket.cancelled.wait(step):
                on_piece(Piece(finish_reason="cancelled"))
                return


@dataclass
class Live:
    """A server that runs, and what it is made of."""

    url: str
    app: object
    server: Server
    engine: object
    lines: list[str]

    def client(self, **options) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 30} | options
        return openai.OpenAI(base_url=self.url + "/v1", **options)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)


@contextlib.contextmanager
def live(served: Served, grace: float = 5, **options):
    """Runs a server in a thread until the block ends."""
    lines: list[str] = []
    app = make_app(served, log=lines.append, **options)
    server = Server(app, "127.0.0.1", 0, grace)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            yield Live(url, app, server, served.engine, lines)
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
            assert not thread.is_alive()


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
def talker(served_by):
    """A live server of a tiny random Gemma 3 that sees."""
    vision = tiny.vision(num_layers=1, image_token=VOCABULARY, start_token=6, end_token=7)
    cfg = tiny.gemma3(layers=1, window=512, vocab_size=VOCABULARY, vision=vision)
    engine = OneAtATime(tiny.model(cfg, "unrolled"))
    engine.start()
    with live(served_by(engine, cfg=cfg)) as running:
        yield running
    engine.close()
