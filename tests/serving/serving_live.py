"""A live server on the loopback, and an engine that says what it is told to say."""

import contextlib
import math
import socket
import threading
import time
from dataclasses import dataclass, field

import openai

from gemma_jax.inference.requests import Piece, Request
from gemma_jax.serving.app import make_app
from gemma_jax.serving.served import Served
from gemma_jax.serving.server import Server


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
        options = {"api_key": "none", "max_retries": 0, "timeout": 120} | options
        return openai.OpenAI(base_url=self.url + "/v1", **options)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)


@contextlib.contextmanager
def live(served: Served, grace: float = 5, head_seconds: float = 15, **options):
    """Runs a server in a thread until the block ends."""
    lines: list[str] = []
    app = make_app(served, log=lines.append, **options)
    server = Server(app, "127.0.0.1", 0, grace, head_seconds=head_seconds)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # for slow readers
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


ASK = dict(model="tiny", messages=[{"role": "user", "content": "Hi"}])


def saying(tokenizer, text: str, reason: str = "stop", size: int = 1, wait: float = 0):
    """A script: a text in pieces of `size` tokens."""
    ids = tokenizer.encode(text)

    def script(request):
        for i in range(0, len(ids), size):
            new = ids[i : i + size]
            yield Piece(
                token_ids=new,
                log_probs=[-0.5] * len(new),
                top_log_probs=[[(j, -0.5), (5, -math.inf)] for j in new],
            )
            if wait:
                yield wait
        end = request.stop_ids[:1] or (1,)
        yield Piece(token_ids=list(end), log_probs=[-0.1], finish_reason=reason)

    return script
