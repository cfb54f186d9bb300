"""`gemma-jax transcribe`: write down what is said in sound files."""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.inputs import utf8
from gemma_jax.cli.model_options import ModelOptions, model_options

if TYPE_CHECKING:
    from gemma_jax.inference.transcribe import Segment


@model_options()
def command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Sound files.")],
    model: common.Model = "gemma3n-e2b-it",
    language: Annotated[
        str | None, typer.Option(help="Language that is spoken, as in --language Spanish.")
    ] = None,
    translate_to: Annotated[
        str | None, typer.Option(help="Language to translate into, after the transcript.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Bound on the text of each stretch of at most 30 s.")
    ] = 512,
    *,
    options: ModelOptions,
    as_json: common.Json = False,
) -> None:
    """Write down what is said in sound files, one line of text per file.

    A file that is longer than the model hears at once (30 s) is cut at quiet places. --json has
    the times of each stretch.
    """
    named = {"--language": language, "--translate-to": translate_to}
    named = {flag: utf8(text, flag) for flag, text in named.items() if text is not None}
    start = time.perf_counter()
    common.set_up_jax()
    from gemma_jax.inference.transcribe import transcribe
    from gemma_jax.loading import load_tokenizer

    clips = common.open_clips(files, model)
    tokenizer = load_tokenizer(model)
    gemma = options.load(model)
    loaded = time.perf_counter()
    results = []
    for file, clip in zip(files, clips):
        with progress.listening() as bar:

            def tell(segment: "Segment", clip=clip, bar=bar) -> None:
                bar(round(segment.end), round(clip.seconds))

            made = transcribe(
                gemma,
                tokenizer,
                clip,
                language=named.get("--language"),
                translate_to=named.get("--translate-to"),
                max_new_tokens=max_new_tokens,
                on_segment=tell,
            )
        segments = [asdict(segment) for segment in made.segments]
        results.append(
            {"file": str(file), "seconds": clip.seconds, "text": made.text, "segments": segments}
        )
        if not as_json:
            print(made.text)
        for segment in made.segments:
            if segment.finish_reason == "length":
                print(
                    f"warning: {file}: the text from {segment.start:.1f} s on was cut off after "
                    f"{max_new_tokens} tokens; give a larger --max-new-tokens",
                    file=sys.stderr,
                )
    if as_json:
        timings = {"load_s": loaded - start, "transcribe_s": time.perf_counter() - loaded}
        common.print_json({"files": results, "timings": timings})
