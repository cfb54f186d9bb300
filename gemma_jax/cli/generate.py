"""`gemma-jax generate`: continue a prompt."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from gemma_jax.cli import common


def command(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; '-' reads stdin.")] = None,
    model: common.Model = "gemma3-270m",
    inputs: Annotated[
        Path | None, typer.Option(help="Safetensors file with input_ids, in place of a prompt.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Bound on the continuation.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens this likely, next to the top.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repeats.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the random choices.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Put the prompt into the chat template.")
    ] = False,
    dtype: common.DTypeOption = None,
    weights: common.WeightsOption = None,
    numerics: common.NumericsOption = common.NumericsName.hf,
    attention_impl: common.AttentionOption = None,
    as_json: common.Json = False,
) -> None:
    """Continue PROMPT and stream the text to stdout."""
    if (prompt is None) == (inputs is None):
        raise typer.BadParameter("give a PROMPT or --inputs FILE, one of the two")
    from gemma_jax.sampling import Sampling

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    if max_new_tokens < 1:
        raise typer.BadParameter(f"--max-new-tokens {max_new_tokens} must be at least 1")
    rows = _rows_of(inputs) if inputs else None

    start = time.perf_counter()
    common.set_up_jax()
    from gemma_jax.generation import generate
    from gemma_jax.loading import find_tokenizer, load_tokenizer

    tokenizer = None
    if rows is None or find_tokenizer(model):
        tokenizer = load_tokenizer(model)
    if rows is None:
        rows = [_prompt_ids(tokenizer, sys.stdin.read() if prompt == "-" else prompt, chat)]
    net = common.load_model(
        model, dtype=dtype, weights=weights, numerics=numerics, attention_impl=attention_impl
    )
    loaded = time.perf_counter()

    first: list[float] = []

    def on_text(row: int, text: str) -> None:
        first.append(time.perf_counter())
        if not as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    with common.token_progress("reading prompt") as progress:
        completions = generate(
            net,
            tokenizer,
            rows,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop or (),
            on_text=on_text if inputs is None else None,
            progress=progress,
        )
    end = time.perf_counter()
    if not as_json:
        if inputs is not None:
            for done in completions:
                print(done.text or " ".join(map(str, done.token_ids)))
        else:
            print()
        return
    timings = {"load_s": loaded - start, "generate_s": end - loaded}
    if first:
        timings["first_token_s"] = first[0] - loaded
    common.print_json(_result(completions, batch=inputs is not None) | {"timings": timings})


def _rows_of(path: Path) -> list[list[int]]:
    inputs = common.read_inputs(path)
    ids, mask = common.input_rows(inputs, path)
    return [row[keep].tolist() for row, keep in zip(ids, mask)]


def _prompt_ids(tokenizer, prompt: str, chat: bool) -> list[int]:
    from gemma_jax.text import encode_chat

    if not prompt:
        raise ValueError("the prompt is empty; give at least one character")
    if chat:
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt, bos=True)


def _result(completions, batch: bool) -> dict:
    def field(name: str):
        values = [getattr(done, name) for done in completions]
        return values if batch else values[0]

    names = ("text", "token_ids", "prompt_token_ids", "finish_reason", "log_probs")
    return {name: field(name) for name in names}
