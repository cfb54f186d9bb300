"""What differs between the versions of JAX that are supported (0.10.2 to 0.12)."""

import jax

# XLA's CPU backend up to jax 0.11 fuses `dot(vector, convert(matrix).T)` into one parallel, vector
# loop that never writes the converted matrix. The emitter of jax 0.12 sums such a loop serially.
FUSED_MATRIX_VECTOR = jax.__version_info__ < (0, 12)
