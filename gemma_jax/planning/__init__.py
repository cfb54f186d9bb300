"""Plans: what a model needs on a machine, before there is one. `gemma-jax plan` prints them."""

from gemma_jax.planning.hardware import Topology, find_topology
from gemma_jax.planning.lowering import Work
from gemma_jax.planning.plan import Compiled, Plan, default_axes, fit, make_plan, meshes, search
from gemma_jax.planning.training import Made, Training

__all__ = [
    "Compiled",
    "Made",
    "Plan",
    "Topology",
    "Training",
    "Work",
    "default_axes",
    "find_topology",
    "fit",
    "make_plan",
    "meshes",
    "search",
]
