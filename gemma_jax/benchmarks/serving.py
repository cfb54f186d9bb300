"""Many clients at once: `gemma-jax serve` beside llama.cpp's server, on the CPU.

    python -m gemma_jax.benchmarks.serving --llama-server build/bin/llama-server \\
        --output gemma_jax/benchmarks/results/NAME.json

Both have the same GGUF file, as many slots and the same cores, which the clients share. They stay
loaded and take turns with the same requests. See README.md.
"""

import argparse
import asyncio
import itertools
import json
import os
import pydoc_data.topics
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import numpy as np

from gemma_jax.benchmarks.http_load import Ask, Mix, Told, ask, crowd
from gemma_jax.benchmarks.http_servers import Running, start
from gemma_jax.benchmarks.speed import machine_facts

OURS, LLAMA = "gemma-jax serve", "llama.cpp llama-server"
WARM_UP, FEW = -1, 8  # seed and requests of the round that does not count


def commands(args: argparse.Namespace, model_file: str) -> dict[str, list[str]]:
    """How each server is started; without llama.cpp's, ours alone."""
    ours = [sys.executable, "-m", "gemma_jax", "serve", "--model", args.model]
    ours += ["--port", "{port}", "--slots", str(args.slots), "--context", str(args.context)]
    ours += ["--waiting", str(2 * args.clients), "--warmup", "--quiet", *args.serve_options]
    found = {OURS: ours}
    if args.llama_server and not args.minutes:
        llama = [args.llama_server, "--model", model_file, "--port", "{port}", "--offline"]
        llama += ["--parallel", str(args.slots), "--ctx-size", str(args.slots * args.context)]
        found[LLAMA] = [*llama, "--threads", str(args.cores), *args.llama_options]
    return found


def mix_of(model: str, args: argparse.Namespace) -> Mix:
    """Prompts out of the English text on Python's language that comes with Python."""
    from gemma_jax.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer.encode(text, parse_special=False)
    return Mix(ids, tokenizer.bos_id, args.shared, tuple(args.own), tuple(args.new))


def take_turns(servers: Sequence[Running], mix: Mix, args: argparse.Namespace) -> None:
    """Rounds of the same requests, one server after the other; the first round does not count."""
    for number in range(-1, args.rounds):
        seed = WARM_UP if number < 0 else args.seed + number
        count = min(args.clients, FEW) if number < 0 else args.requests
        for server in servers:
            asks = itertools.islice(mix.asks(seed), count)
            told, seconds = timed_crowd(server, asks, args.clients, args.seconds)
            found = summary(told, seconds) | {"resident_bytes": server.resident_bytes()}
            turn = "warm-up" if number < 0 else f"round {number + 1}/{args.rounds}"
            print(f"{turn}, {server.name}: {brief(found)}", file=sys.stderr)
            if number >= 0:
                server.rounds.append(found)


def timed_crowd(server: Running, asks, clients: int, seconds: float) -> tuple[list[Told], float]:
    """What all clients got, and how long it took."""
    begin = time.perf_counter()
    told = asyncio.run(crowd(server.port, asks, clients, seconds))
    return told, time.perf_counter() - begin


def summary(told: Sequence[Told], seconds: float) -> dict:
    """Figures of one round; what failed counts as nothing written."""
    whole = [one for one in told if not one.error]
    errors = sorted({one.error for one in told if one.error})
    new, prompt = sum(one.new for one in whole), sum(one.prompt for one in whole)
    seen = [one for one in whole if one.arrivals]  # tokens may have no text
    return {
        "requests": len(told),
        "failed": len(told) - len(whole),
        "errors": errors[:5],
        "seconds": round(seconds, 2),
        "new_tokens": new,
        "prompt_tokens": prompt,
        "cached_tokens": sum(one.cached for one in whole),
        "tokens_per_s": round((new + prompt) / seconds, 2),
        "new_tokens_per_s": round(new / seconds, 2),
        "first_token_s": percentiles([one.first_token_s for one in seen]),
        "between_events_s": percentiles([gap for one in whole for gap in one.delays_s]),
        "per_token_s": percentiles([one.token_s for one in seen]),
        "tokens_per_event": round(new / max(sum(len(one.arrivals) for one in whole), 1), 2),
    }


def percentiles(values: Sequence[float]) -> dict:
    if not values:
        return {}
    found = {f"p{share}": round(float(np.percentile(values, share)), 4) for share in (50, 90, 99)}
    return found | {"max": round(max(values), 4)}


def brief(found: dict) -> str:
    first, gaps = found["first_token_s"], found["between_events_s"]
    said = f"{found['new_tokens_per_s']} new tokens/s of {found['requests']} requests"
    if found["failed"]:
        said += f", {found['failed']} failed ({found['errors'][0]:.200})"
    if first and gaps:
        said += (
            f"; first {first['p50']} s, p99 {first['p99']}; between {gaps['p50']}, {gaps['p99']}"
        )
    return said


def first_tokens(server: Running, pairs: Sequence[tuple[Ask, Ask]]) -> dict:
    """Time to the first token of a prompt whose beginning is new, and of one that has it again."""
    new, known = [], []
    for pair in pairs:
        for found, one in zip((new, known), pair):
            told = asyncio.run(ask(server.port, one))
            if told.error or not told.arrivals:
                raise RuntimeError(f"{server.name}: {told.error or 'the answer has no text'}")
            found.append(told)
    return {
        "new_beginning_s": [round(one.first_token_s, 4) for one in new],
        "known_beginning_s": [round(one.first_token_s, 4) for one in known],
        "cached_tokens": [one.cached for one in known],
        "times_as_fast": round(
            statistics.median(one.first_token_s for one in new)
            / statistics.median(one.first_token_s for one in known),
            2,
        ),
    }


def last_long(server: Running, mix: Mix, args: argparse.Namespace) -> dict:
    """Load for some minutes, and the resident size meanwhile."""
    samples, begin = [], time.perf_counter()

    async def watch() -> None:
        while True:
            seconds = round(time.perf_counter() - begin, 1)
            samples.append((seconds, server.resident_bytes()))
            await asyncio.sleep(args.sample_seconds)

    async def load() -> list[Told]:
        watcher = asyncio.ensure_future(watch())
        try:
            asks = mix.asks(args.seed)
            return await crowd(server.port, asks, args.clients, 60 * args.minutes)
        finally:
            watcher.cancel()

    told = asyncio.run(load())
    samples.append((round(time.perf_counter() - begin, 1), server.resident_bytes()))
    return summary(told, time.perf_counter() - begin) | {
        "resident_bytes": samples,
        "growth_bytes": growth(samples),
    }


def growth(samples: Sequence[tuple[float, int]]) -> int:
    """From the second quarter of the samples to the last one, by their means."""
    sizes, quarter = [size for _, size in samples], max(len(samples) // 4, 1)
    second = sizes[quarter : 2 * quarter] or sizes
    return round(statistics.mean(sizes[-quarter:]) - statistics.mean(second))


def told_of(server: Running) -> dict:
    """The medians of its rounds, and all of them."""
    facts = {"command": server.command(_paths(server)), "version": server.version}
    facts |= {"ready_s": round(server.ready_s, 1)}
    for name in ("tokens_per_s", "new_tokens_per_s"):
        if server.rounds:
            facts[name] = statistics.median(found[name] for found in server.rounds)
    return facts | {"rounds": server.rounds}


def _paths(server: Running) -> list[str]:
    return [word for word in server.words if os.sep in word]


def versions(args: argparse.Namespace) -> dict[str, str]:
    import gemma_jax

    found = {OURS: gemma_jax.__version__}
    if args.llama_server:
        said = subprocess.run([args.llama_server, "--version"], capture_output=True, text=True)
        found[LLAMA] = (said.stdout + said.stderr).strip()
    return found


def main(words: Sequence[str] | None = None) -> dict:
    args = _arguments(words)
    from gemma_checkpoints import resolve

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    mix = mix_of(args.model, args)
    result = {
        "command": _command(args),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_facts(),
        "work": f"{args.clients} clients, {args.slots} slots, greedy; a beginning of {args.shared} "
        f"tokens, {args.own[0]} to {args.own[1]} of their own, {args.new[0]} to {args.new[1]} new",
    }
    with ExitStack() as stack:
        named, servers = versions(args), []
        for name, command in commands(args, str(resolve(args.model))).items():
            server = stack.enter_context(start(name, command))
            server.version = named[name]
            servers.append(server)
            print(f"{name}: ready after {server.ready_s:.1f} s", file=sys.stderr)
        if args.minutes:
            result["long"] = last_long(servers[0], mix, args)
        else:
            take_turns(servers, mix, args)
            pairs = mix.pairs(args.pairs + 1, args.seed)
            for server in servers if args.pairs else ():
                first_tokens(server, pairs[:1])  # a program that only now is needed
                found = first_tokens(server, pairs[1:])
                result.setdefault("first_token_alone", {})[server.name] = found
        result["servers"] = {server.name: told_of(server) for server in servers}
    _compare(result)
    result["machine"]["load_average_1min_at_the_end"] = round(os.getloadavg()[0], 2)
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if args.output:
        args.output.write_text(text)
    return result


def _compare(result: dict) -> None:
    ours, llama = (result["servers"].get(name, {}) for name in (OURS, LLAMA))
    if "tokens_per_s" in ours and "tokens_per_s" in llama:
        ratio = ours["tokens_per_s"] / llama["tokens_per_s"]
        result["times_as_many_tokens_per_s"] = round(ratio, 3)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--llama-server", help="llama.cpp's `llama-server`")
    add("--llama-options", type=shlex.split, default=[], help="further ones, in one word")
    add("--serve-options", type=shlex.split, default=[], help="the same for `gemma-jax serve`")
    add("--model", default="gemma3-270m", help="a GGUF file, for llama.cpp to read as well")
    add("--slots", type=int, default=32)
    add("--clients", type=int, default=32)
    add("--context", type=int, default=1024, help="tokens of a slot")
    add("--shared", type=int, default=512)
    add("--own", type=int, nargs=2, default=[16, 256])
    add("--new", type=int, nargs=2, default=[32, 128])
    add("--requests", type=int, default=64, help="of a round")
    add("--rounds", type=int, default=2)
    add("--seconds", type=float, default=120, help="of a round, then nobody asks any more")
    add("--pairs", type=int, default=8, help="for the time to the first token alone")
    add("--minutes", type=float, default=0, help="ours alone, for so long, watching its memory")
    add("--sample-seconds", type=float, default=5)
    add("--seed", type=int, default=0)
    add("--cores", type=int, default=2)
    add("--short", action="store_true", help="one round, of as many requests as clients")
    add("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(words)
    if args.short:
        args.requests, args.rounds, args.seconds = args.clients, 1, 30
        args.pairs = min(args.pairs, 2)
    if args.shared + args.own[1] + args.new[1] > args.context:
        parser.error("--shared, --own and --new take more tokens than --context")
    return args


def _command(args: argparse.Namespace) -> str:
    """The command line, with PATH in place of the paths of this machine."""
    words = ["python", "-m", "gemma_jax.benchmarks.serving"]
    for name, value in vars(args).items():
        if value is None or value is False or value == []:
            continue
        words.append("--" + name.replace("_", "-"))
        if name in ("llama_server", "output"):
            words.append("PATH")
        elif name in ("llama_options", "serve_options"):
            words.append(shlex.join(value))
        elif value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


if __name__ == "__main__":
    main()
