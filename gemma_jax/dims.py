"""The letters of array dimensions.

Einsum strings use only such letters, and local arrays of rank two or more carry them as a suffix
(`q_BTNH`). Weights are declared by equation, so the letters of a weight also drive its initial
shape, its sharding, and the shape check of checkpoints.

These mean the same everywhere:

| letter | meaning                         | letter | meaning                              |
|--------|---------------------------------|--------|--------------------------------------|
| B      | batch                           | H      | head dimension                       |
| T      | new (query) tokens              | F      | feed-forward width (of one layer)    |
| S      | key slots                       | V      | vocabulary                           |
| D      | model width                     | L      | layers                               |
| N      | query heads                     | P      | per-layer-input width                |
| K      | key/value heads                 | A      | AltUp streams                        |
| G      | query heads per kv head, N / K  |        |                                      |

A file that needs others explains them at the end of its docstring, behind `Local letters:`.
Stacked parameters (see `layer_groups.py`) have one leading axis more, which carries no letter.
"""

from string import ascii_uppercase

CORE = frozenset("BTSDNKGHFVLPA")


def weight_dims(equation: str) -> str:
    """Letters of the weight in an equation of the form `activations,weight->result`.

    >>> weight_dims("BTD,NHD->BTNH")
    'NHD'
    """
    operands, arrow, _ = equation.partition("->")
    parts = operands.split(",")
    if not arrow or len(parts) != 2 or not set(equation) <= set(ascii_uppercase + ",->"):
        raise ValueError(f"{equation=} must read 'X,W->Y', each a row of capital letters")
    return parts[1]
