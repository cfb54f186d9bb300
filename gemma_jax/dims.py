"""The one alphabet of array dimensions.

Einsum strings use only these letters, and local arrays of rank two or more carry them as a
suffix (`q_BTNH`). Weights are declared by equation, so the letters of a weight also drive its
initial shape, its sharding, and the shape check of checkpoints.

| letter | meaning                         | letter | meaning                              |
|--------|---------------------------------|--------|--------------------------------------|
| B      | batch                           | F      | feed-forward width (of one layer)    |
| T      | new (query) tokens              | V      | vocabulary                           |
| S      | key slots                       | L      | layers                               |
| D      | model width                     | A      | AltUp streams                        |
| N      | query heads                     | P      | per-layer-input width                |
| K      | key/value heads                 | R      | low rank                             |
| G      | query heads per kv head, N / K  | Q      | image patches                        |
| H      | head dimension                  | C      | vision-tower width                   |
| I      | images                          | U      | colour channels                      |
| Y      | pixel rows (of a patch)         | X      | pixel columns (of a patch)           |
| E      | outputs of a square map         | Z      | pairs of AltUp streams, A * A        |

In a tower an image is what a batch row is in the text: N, H, F and L are the tower's own there.
Stacked parameters (see `layer_groups.py`) have one leading axis more, which carries no letter.
"""

ALPHABET = frozenset("BTSDNKGHFVLAPRQCIUYXEZ")


def weight_dims(equation: str) -> str:
    """Letters of the weight in an equation of the form `activations,weight->result`.

    >>> weight_dims("BTD,NHD->BTNH")
    'NHD'
    """
    operands, arrow, _ = equation.partition("->")
    parts = operands.split(",")
    if not arrow or len(parts) != 2 or not set(equation) <= ALPHABET | set(",->"):
        raise ValueError(
            f"{equation=} must read 'X,W->Y' in the letters {''.join(sorted(ALPHABET))}"
        )
    return parts[1]
