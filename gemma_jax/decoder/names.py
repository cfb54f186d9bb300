"""Names of parameters that do not depend on how layers are stacked: `blocks.3.attn.q.w`."""

from collections.abc import Iterator
from functools import reduce

from gemma_jax.decoder.model import Gemma
from gemma_jax.weights.tree import ParamPath

EMBEDDERS = "modality_embedders"


def layer_names(path: ParamPath, model: Gemma) -> Iterator[tuple[str, int | None]]:
    """Names of what lies at a path, one per layer that is stacked there, each with its row.

    What lies in no layer has one name, and no row. The embedders of vocabularies are called after
    their first ids: their places depend on which modalities were loaded.
    """
    if path[:1] == (EMBEDDERS,) and len(path) > 1:
        ids = model.cfg.modality_vocabularies[path[1]]
        path = (EMBEDDERS, ids.first_id, *path[2:])
    if "blocks" not in path or len(path) < path.index("blocks") + 3:
        yield ".".join(map(str, path)), None
        return
    at = path.index("blocks")
    owner, (_, group, position, *rest) = path[:at], path[at:]
    groups = reduce(getattr, owner, model).layer_groups
    for repeat in range(groups[group].repeats):
        layer = groups[group].layer_index(position, repeat)
        yield ".".join(map(str, (*owner, "blocks", layer, *rest))), repeat
