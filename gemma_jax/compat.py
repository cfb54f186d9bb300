"""What differs between the versions of JAX that are supported (0.10.2 to 0.12)."""

import jax


def fuses_matrix_vector() -> bool:
    """Whether `dot(vector, convert(matrix).T)` is fast, whatever it converts from.

    XLA's CPU backend up to jax 0.11 makes one parallel vector loop of it, which never writes the
    converted matrix and beats its own matrix product by half. The emitter of jax 0.12 sums such a
    loop serially. Other backends have no need of it.
    """
    return jax.__version_info__ < (0, 12) and jax.default_backend() == "cpu"
