"""`gemma-jax serve`: answer clients of the OpenAI API over HTTP."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_jax.cli import common
from gemma_jax.cli.model_options import ModelOptions, flag, model_options

if TYPE_CHECKING:
    from gemma_jax.inference.lookup import Lookup
    from gemma_jax.serving.auth import Keys
    from gemma_jax.serving.limits import Limits
    from gemma_jax.serving.served import Served

CONTEXT = 8192  # tokens, where the model's own is longer
SLOTS, PREFIX_MB, THRESHOLD = 8, 512, 0.5  # where a command line does not say
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@model_options()
def command(
    model: common.Model = "gemma3-270m",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any.")] = 8000,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt and its answer; default 8192.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Requests answered at the same time; default 8.")
    ] = None,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64,
    served_name: Annotated[
        str | None, typer.Option(help="Name by which clients ask. Default: that of SRC.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keys, one a line. Default: those in GEMMA_JAX_API_KEYS, if any."
        ),
    ] = None,
    rate_limit: Annotated[
        float, typer.Option(min=0, help="Requests a minute for each key or address; 0: any.")
    ] = 0,
    allow_hosts: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Names that clients may ask under. Default: any; on this machine alone: its own.",
        ),
    ] = None,
    allow_media_domains: Annotated[
        str | None,
        typer.Option(metavar="HOST,...", help="Hosts that pictures may be fetched from, by HTTPS."),
    ] = None,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Megabytes of a request.")] = 32,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Bound on each answer; 0: what the context leaves.")
    ] = 0,
    max_seconds: Annotated[float, typer.Option(min=1, help="Bound on the time of each.")] = 600,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish in, on SIGTERM.")] = 30,
    metrics_prefix: Annotated[
        str, typer.Option(help="Of the names in /metrics; vllm: is what dashboards read.")
    ] = "gemma_jax_",
    prefix_cache_mb: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Memory for beginnings of prompts that come again; 0: none; default 512.",
        ),
    ] = None,
    speculate: Annotated[
        str | None,
        typer.Option(
            metavar="lookup[:N]",
            help="Draft N tokens (4) from the text so far, checked in one pass; same answers.",
        ),
    ] = None,
    shield: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC",
            help="ShieldGemma that judges prompts and answers, ShieldGemma 2 their pictures; "
            "may be repeated.",
        ),
    ] = None,
    shield_threshold: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Probability from which on they are withheld; default 0.5."
        ),
    ] = None,
    warmup: Annotated[bool, typer.Option(help="Compile all programs before listening.")] = False,
    quiet: Annotated[bool, typer.Option(help="No line on stderr for each request.")] = False,
    *,
    options: ModelOptions,
) -> None:
    """Answer clients of the OpenAI API over HTTP: chat, completions, embeddings, models, tokens.

    Listens to this machine alone unless --host says more, and then needs keys.
    """
    _require_extra()
    from gemma_jax.serving.auth import Keys
    from gemma_jax.serving.limits import Limits

    keys = Keys.read(api_key_file)
    _check_open(host, keys)
    limits = Limits(body_bytes=max_body_mb << 20, new_tokens=max_new_tokens, seconds=max_seconds)
    if shield_threshold is not None and not shield:
        raise ValueError("--shield-threshold: nothing is judged without --shield; leave it out")
    threshold = THRESHOLD if shield_threshold is None else shield_threshold
    checks = [_shield(source, threshold) for source in shield or ()]
    sizes = slots, context, waiting, prefix_cache_mb
    served = _load(model, options, sizes, served_name, limits, _speculation(speculate))
    if served.embedder is not None:
        _refuse_for_writing(
            served.name,
            slots=slots,
            context=context,
            prefix_cache_mb=prefix_cache_mb,
            max_new_tokens=max_new_tokens or None,
            speculate=speculate,
            shield=shield or None,
            allow_media_domains=allow_media_domains,
            cache_dtype=options.cache_dtype,
        )
    served = replace(served, checks=checks)
    from gemma_jax.multimodal.warm_up import warm_up_towers
    from gemma_jax.serving.app import make_app
    from gemma_jax.serving.server import Server

    local = ("localhost", "127.0.0.1", "[::1]") if host in LOOPBACK else ()
    app = make_app(
        served,
        keys=keys,
        requests_per_minute=rate_limit,
        metrics_prefix=metrics_prefix,
        media_domains=_names(allow_media_domains),
        hosts=_names(allow_hosts) or local,
        log=None if quiet else _say,
    )
    engine = served.engine
    if warmup:
        engine.warm_up(lambda name: _say(f"compiling: {name}"))
        warm_up_towers(engine.model, lambda name: _say(f"compiling: {name}"))
    engine.start()
    try:
        _run(Server(app, host, port, grace), host, port, served.name)
    finally:
        engine.close()


def _run(server, host: str, port: int, name: str) -> None:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise ValueError(f"--host {host} --port {port}: {error.strerror or error}") from None
        listening.listen(128)  # who comes before the loop runs waits
        address = f"[{host}]" if ":" in host else host
        _say(f"{name} at http://{address}:{listening.getsockname()[1]}/v1")
        server.run([listening])


def _load(
    source: str,
    options: ModelOptions,
    sizes: tuple[int | None, int | None, int, int | None],
    name: str | None,
    limits: "Limits",
    speculation: "Lookup | None",
) -> "Served":
    common.set_up_jax()
    from gemma_jax.inference.engine import Engine
    from gemma_jax.inference.sampling import Sampling
    from gemma_jax.loading import load_sampling, load_tokenizer
    from gemma_jax.resident_adapters import held_adapters
    from gemma_jax.serving.served import Served
    from gemma_jax.text_embedding.embed import max_tokens
    from gemma_jax.text_embedding.embedder import Embedder

    tokenizer = load_tokenizer(source)
    sampling = load_sampling(source) or Sampling(temperature=1.0)
    gemma = options.for_writing().load(source)
    most, (slots, context, waiting, kept) = gemma.cfg.max_positions, sizes
    if context is not None and context > most:
        raise ValueError(f"--context {context}: the model's own is {most}")
    length = min(context or CONTEXT, most)
    if gemma.cfg.text_embedding is not None:
        length, engine = max_tokens(gemma), Embedder(gemma, queue=waiting)
    else:
        engine = Engine(
            gemma,
            slots=SLOTS if slots is None else slots,
            context=length,
            queue=waiting,
            prefix_bytes=(PREFIX_MB if kept is None else kept) << 20,
            speculation=speculation,
        )
    return Served(
        name=name or Path(source).name,
        cfg=gemma.cfg,
        tokenizer=tokenizer,
        engine=engine,
        context=length,
        limits=limits,
        sampling=sampling,
        created=int(time.time()),
        adapters=tuple(held_adapters(gemma)),
        structured=_grammars(tokenizer, gemma.cfg.vocab_size, limits),
    )


def _refuse_for_writing(name: str, **given: object) -> None:
    """What a command line says of texts that are written, where none are."""
    if said := [flag(option) for option, value in given.items() if value is not None]:
        raise ValueError(
            f"{', '.join(said)}: {name} makes vectors of texts and writes none; leave out what is "
            "for models that write"
        )


def _shield(source: str, threshold: float):
    """What judges prompts and answers."""
    common.set_up_jax()
    from gemma_jax.evaluation.safety_check import SafetyCheck
    from gemma_jax.loading import load

    return SafetyCheck(*load(source), threshold=threshold)


def _grammars(tokenizer, vocab_size: int, limits: "Limits"):
    """What makes constraints; `None` where llguidance is missing."""
    from gemma_jax.inference.constraints import GrammarCompiler, GrammarLimits
    from gemma_jax.text import chat_stop_ids

    bounds, stop_ids = GrammarLimits(max_bytes=limits.schema_bytes), chat_stop_ids(tokenizer)
    try:
        return GrammarCompiler(tokenizer, vocab_size, stop_ids=stop_ids, limits=bounds).constraint
    except ImportError:
        return None


def _speculation(text: str | None) -> "Lookup | None":
    if text is None:
        return None
    from gemma_jax.inference.lookup import Lookup

    name, _, count = text.partition(":")
    if name != "lookup" or not (count.isdigit() or text == name):
        raise ValueError(f"--speculate {text}: expected lookup or lookup:N")
    return Lookup(draft_tokens=int(count)) if count else Lookup()


def _require_extra() -> None:
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f'serve needs {error.name}: pip install "gemma-jax[serve]"') from None


def _check_open(host: str, keys: "Keys") -> None:
    if host not in LOOPBACK and not keys:
        raise ValueError(
            f"--host {host}: other machines may ask there, so keys are needed; give --api-key-file"
        )


def _names(text: str | None) -> frozenset[str]:
    return frozenset(word.lower() for word in common.names(text or ""))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
