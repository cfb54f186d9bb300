"""`gemma-jax generate`: continue a prompt."""

import sys
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.errors import flags_for
from gemma_jax.cli.inputs import check_for_model, items_of, read_inputs, real_tokens, utf8
from gemma_jax.cli.model_options import ModelOptions, model_options

if TYPE_CHECKING:
    import numpy as np

    from gemma_jax.decoder.model import Gemma
    from gemma_jax.inference.completion import Completion
    from gemma_jax.multimodal.prompts import Prompt


@model_options()
def command(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; '-' reads it from stdin, as it is.")
    ] = None,
    model: common.Model = "gemma3-270m",
    inputs: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Safetensors file with input_ids [B, T], in place of a prompt.",
        ),
    ] = None,
    image: common.Images = None,
    audio: common.Clips = None,
    pan_and_scan: common.PanAndScanOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Bound on the continuation.")] = 128,
    temperature: common.Temperature = 0.0,
    top_k: common.TopK = 0,
    top_p: common.TopP = 1.0,
    min_p: common.MinP = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repeats.")] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Taken off the logits of tokens chosen so far.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="The same, as often as they were chosen.")
    ] = 0.0,
    seed: common.Seed = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Put the prompt into the chat template, or not.")
    ] = False,
    *,
    options: ModelOptions,
    speculative: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Let this slice of the model draft tokens for it."),
    ] = None,
    draft_tokens: Annotated[int, typer.Option(min=1, help="Drafts per pass.")] = 4,
    schema: Annotated[
        str | None,
        typer.Option(metavar="FILE|JSON", help="Write JSON that fits this JSON Schema."),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Write text that matches this regular expression.")
    ] = None,
    lark: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Write text of this Lark grammar."),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Continue PROMPT and stream the text to stdout."""
    if (prompt is None) == (inputs is None):
        raise typer.BadParameter("give a PROMPT or --inputs FILE, one of the two")
    if inputs and (image or audio or pan_and_scan):
        raise typer.BadParameter(
            "--image and --audio go with a PROMPT; --inputs FILE holds its own images and sounds"
        )
    if not all(stop or ()):
        raise typer.BadParameter("a --stop text needs at least one character")
    if prompt is not None:
        prompt = utf8(sys.stdin.buffer.read() if prompt == "-" else prompt, "the prompt")
    grammar = _grammar(schema, regex, lark)
    if grammar and speculative:
        raise typer.BadParameter(f"--{min(grammar)} and --speculative do not go together")
    arrays = read_inputs(inputs) if inputs else None
    from gemma_jax.inference.sampling import Sampling

    values = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    with flags_for(*values):
        sampling = Sampling(**values)
    start = time.perf_counter()
    common.set_up_jax()
    from gemma_jax.inference.generate import generate
    from gemma_jax.loading import has_tokenizer, load_tokenizer

    images = common.open_images(image, model, options.mmproj)
    clips = common.open_clips(audio, model)
    tokenizer = load_tokenizer(model) if prompt is not None or has_tokenizer(model) else None
    options = options.for_writing()
    submodel = common.find_slice(options.slice, model)
    draft = common.find_slice(speculative, model)
    whole = options.load_whole(model, layout="unrolled" if submodel or draft else None)
    gemma = common.view(whole, submodel)
    loaded = time.perf_counter()
    if arrays is None:
        content = [*images, *clips, prompt] if images or clips else prompt
        prompts = [[{"role": "user", "content": content}] if chat else prompt]
    else:
        prompts = _prompts_of(arrays, gemma, inputs)

    first: list[float] = []
    bar = progress.reading()

    def on_text(row: int, text: str) -> None:
        bar.stop()
        first.append(time.perf_counter())
        if not as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    with bar:
        completions = generate(
            gemma,
            tokenizer,
            prompts,
            images=[images] if images and not chat else None,
            audio=[clips] if clips and not chat else None,
            pan_and_scan=pan_and_scan,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop or (),
            on_text=None if inputs else on_text,
            # A slice of a slice would be drafting for other layers than its name says.
            draft=common.view(whole, draft) if submodel and draft else draft,
            draft_tokens=draft_tokens,
            progress=bar,
            **grammar,
        )
    end = time.perf_counter()
    if as_json:
        timings = {"load_s": loaded - start, "generate_s": end - loaded}
        if first:
            timings["first_token_s"] = first[0] - loaded
        result = _result(completions, batch=inputs is not None)
        if draft:
            proposed = sum(done.proposed_drafts for done in completions)
            accepted = sum(done.accepted_drafts for done in completions)
            result |= {"proposed_drafts": proposed, "accepted_drafts": accepted}
        common.print_json(result | {"timings": timings})
    elif inputs:
        for done in completions:
            print(done.text if tokenizer else " ".join(map(str, done.token_ids)))
    else:
        print()


def _grammar(schema: str | None, regex: str | None, lark: Path | None) -> dict[str, str]:
    """The one of these that is given, as an argument of `generate`."""
    from gemma_jax.inference.grammar import Grammar

    if schema is not None and not schema.lstrip().startswith("{"):
        schema = utf8(Path(schema).read_bytes(), schema)
    rules = None if lark is None else utf8(lark.read_bytes(), str(lark))
    with flags_for("schema", "regex", "lark"):
        grammar = Grammar.of(schema=schema, regex=regex, lark=rules)
    return {} if grammar is None else {grammar.kind: grammar.text}


def _prompts_of(arrays: dict[str, "np.ndarray"], model: "Gemma", path: Path) -> "list[Prompt]":
    """One prompt per row: its real tokens, and the items that its placeholders stand for."""
    import numpy as np

    from gemma_jax.multimodal.modality import modalities_of
    from gemma_jax.multimodal.prompts import Prompt

    check_for_model(arrays, model.cfg, path)
    rows = [row[keep] for row, keep in zip(arrays["input_ids"], real_tokens(arrays, path))]
    media: list[dict[str, list[np.ndarray]]] = [{} for _ in rows]
    for modality in modalities_of(model.cfg):
        if (items := items_of(arrays, modality.name)) is not None:
            left = iter(items)
            for row, own in zip(rows, media):
                count = int((row == modality.placeholder).sum()) // modality.tokens_per_item
                own[modality.name] = list(islice(left, count))
    return [Prompt(row.tolist(), media=own) for row, own in zip(rows, media)]


def _result(completions: "list[Completion]", batch: bool) -> dict[str, Any]:
    """Fields of the one completion, or of a batch as lists with one entry per row."""
    names = ("text", "token_ids", "prompt_token_ids", "finish_reason", "log_probs")
    rows = {name: [getattr(done, name) for done in completions] for name in names}
    return rows if batch else {name: values[0] for name, values in rows.items()}
