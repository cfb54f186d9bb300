"""Another config for the weights of a checkpoint: what keeps every tensor's place may change."""

from collections import Counter
from collections.abc import Callable, Iterator

from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.decoder.model import MakeBlock, abstract_model

from .errors import CheckpointError
from .params import named_slots
from .source import Source

ChangeConfig = Callable[[GemmaConfig], GemmaConfig]


def changed_config(
    source: Source, declared: GemmaConfig, change: ChangeConfig, block: MakeBlock
) -> GemmaConfig:
    """The config that `change` makes of the declared one.

    Layers at the end may be left out: their tensors are not read then. Layers are taken from the
    front, whichever specs were kept: of specs that are equal it cannot be seen which they were.

    Raises:
      CheckpointError: It asks for other tensors than the source has, or has no place for some.
    """
    cfg = change(declared)
    if not isinstance(cfg, GemmaConfig):
        raise ValueError(f"config must return a GemmaConfig, got {type(cfg).__name__}")
    if problems := list(_problems(declared, cfg, block)):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(source.path, f"the changed config {problems[0]}{more}; {WAY_OUT}")
    return cfg


WAY_OUT = (
    "change what leaves the weights alone, such as windows and rope, or leave out last layers only"
)


def _problems(declared: GemmaConfig, cfg: GemmaConfig, block: MakeBlock) -> Iterator[str]:
    stored, deep = len(declared.layers), len(cfg.layers)
    if deep > stored:
        yield f"has {deep} layers, the checkpoint has {stored}"
        return
    roles, declared_roles = ([_role(spec) for spec in one.layers] for one in (cfg, declared))
    # Layers of another kind may be meant, but not where some are gone, or all are there, elsewhere.
    if deep < stored or Counter(roles) == Counter(declared_roles):
        for i, (ours, theirs) in enumerate(zip(roles, declared_roles)):
            if ours != theirs:
                yield f"makes layer {i} {ours}, the checkpoint's is {theirs}"
    theirs, ours = (named_slots(abstract_model(one, block=block)) for one in (declared, cfg))
    for name, slot in ours.items():
        if name not in theirs:
            yield f"asks for {name}, which the checkpoint does not have"
        elif slot.shape != (shape := theirs[name].shape):
            yield f"makes {name} {list(slot.shape)}, the checkpoint has {list(shape)}"
    for name in theirs:
        first, *rest = name.split(".")
        left_out = first == "blocks" and int(rest[0]) >= deep
        if name not in ours and not left_out:
            yield f"has no place for {name} of the checkpoint"


def _role(spec: LayerSpec) -> str:
    """What a layer was trained to do, and no shape says; widths of its feed-forward are shapes."""
    return f"{spec.kind} with {'shared' if spec.kv == 'shared' else 'its own'} keys and values"
