"""`gemma-jax evaluate`: tasks of lm-eval."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.errors import flags_for
from gemma_jax.cli.model_options import ModelOptions, model_options

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

QUIET = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "DISABLE_MULTIPROC": "1"}
SHOWN = 8  # names of tasks in an error


@model_options()
def command(
    model: common.Model = "gemma3-270m",
    tasks: Annotated[
        str, typer.Option(metavar="NAME,...", help="Tasks or groups of lm-eval, or YAML files.")
    ] = ...,
    include_path: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of task files (YAML); may be repeated."
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in front. Default: as the task says.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Tokens read at once; default: the context of the model."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts written at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Of examples and texts that are drawn.")] = 0,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="With --json: every document, too.")
    ] = False,
    *,
    options: ModelOptions,
    as_json: common.Json = False,
) -> None:
    """Measure a model by tasks of lm-eval: multiple choice, perplexity, written answers.

    Its own tasks fetch their data from the Hugging Face Hub; those of --include-path may be about
    files on this machine.
    """
    if system is not None and not chat:
        raise typer.BadParameter("--system needs --chat")
    if log_samples and not as_json:
        raise typer.BadParameter("--log-samples needs --json")
    names = common.names(tasks)
    if not names:
        raise typer.BadParameter("--tasks names none")
    _check_yaml([*(include_path or ()), *(Path(name) for name in names if _is_file(name))])
    common.set_up_jax()
    with _quiet():
        from gemma_jax.harness import GemmaJax  # says what is missing, if lm-eval is

        chosen = _find_tasks(names, include_path)
        from gemma_jax.loading import load_tokenizer

        tokenizer = load_tokenizer(model)
        gemma = options.load(model)
        with progress.asking() as bar, flags_for("max_length", "batch_size"):
            lm = GemmaJax(
                gemma, tokenizer, max_length=window, batch_size=batch_size, seed=seed, progress=bar
            )
            results = _run(lm, chosen, num_fewshot, limit, chat, system, seed, log_samples)
        table = _tables(results)
    if as_json:
        common.print_json(_plain(_kept(results, model)))
    else:
        print(table)


def _run(lm, chosen: list, num_fewshot, limit, chat, system, seed, log_samples) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    return simple_evaluate(
        lm,
        tasks=chosen,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat,
        system_instruction=system,
        log_samples=log_samples,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=None,
        fewshot_random_seed=seed,
        bootstrap_iters=1000,
        task_manager=_manager((), defaults=False),
    )


def _find_tasks(names: Sequence[str], folders: list[Path] | None) -> list:
    """Tasks and groups by their names, from the folders if they have them all.

    Raises:
      ValueError: A name that is none, or a task that lm-eval refuses.
    """
    manager = _manager(folders or (), defaults=False)
    if any(name not in manager.all_tasks and not _is_file(name) for name in names):
        manager = _manager(folders or (), defaults=True)  # reads 13,000 files
    found = []
    for name in names:
        if name not in manager.all_tasks and not _is_file(name):
            raise ValueError(f"--tasks {name}: {_unknown(name, manager, folders)}")
        try:
            loaded = manager.load([name])
        except Exception as error:  # of whatever a task file may say
            reason = str(error).strip() or type(error).__name__
            raise ValueError(
                f"--tasks {name}: lm-eval cannot make a task of it: {reason}"
            ) from error
        groups = loaded.get("groups", {})
        found += [groups[name]] if name in groups else list(loaded["tasks"].values())
    return found


def _manager(folders, *, defaults: bool) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(one) for one in folders], include_defaults=defaults)


def _unknown(name: str, manager: "TaskManager", folders: list[Path] | None) -> str:
    if near := get_close_matches(name, manager.all_tasks, n=3):
        return f"no such task; did you mean {' or '.join(near)}?"
    own = _manager(folders or (), defaults=False).all_tasks
    known = f"; the folders have {', '.join(own[:SHOWN])}" if own else ""
    return f"lm-eval has no such task, nor is it a YAML file{known}"


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _check_yaml(paths: list[Path]) -> None:
    """Refuses files that are no YAML, which lm-eval would pass over in silence."""
    if not paths:
        return
    try:
        import yaml
    except ImportError:
        return  # lm-eval brings it along, and is missing as well
    for path in paths:
        for file in sorted(path.rglob("*.yaml")) if path.is_dir() else [path]:
            try:
                with open(file, "rb") as stream:
                    root = yaml.compose(stream, Loader=yaml.SafeLoader)
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"{file} is no YAML: {error}") from None
            if not isinstance(root, yaml.MappingNode):
                raise ValueError(f"{file} is no task: expected YAML with `task:` in it")


def _tables(results: dict[str, Any]) -> str:
    from lm_eval.utils import make_table

    tables = [make_table(results)]
    if "groups" in results:
        tables.append(make_table(results, "groups"))
    return "\n".join(table.rstrip() for table in tables)


def _kept(results: dict[str, Any], model: str) -> dict[str, Any]:
    """What of lm-eval's report is about the model and the tasks."""
    names = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better", "samples")
    kept = {name.replace("-", "_"): results[name] for name in names if name in results}
    return {"model": model, **kept}


def _plain(value: Any) -> Any:
    """The same in what JSON has."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        return value.item()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of lm-eval and its libraries on stdout, and of what they say only errors."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("lm_eval", "datasets", "evaluate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):
        yield
