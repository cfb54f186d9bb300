"""What a program is being compiled for."""

import jax


def target_platform() -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`.

    That of the mesh in context (`jax.sharding.use_abstract_mesh`) if its devices are known, as when
    a program is compiled for hardware that is not there; else that of this process.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
