"""What a program is being compiled for."""

import jax


def target_platform() -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`.

    That of the mesh in context (`jax.sharding.use_abstract_mesh`) if its devices are known, as when
    a program is compiled for hardware that is not there; else that of this process.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


HOPPER = "9.0"  # compute capability


def require(platform: str) -> None:
    """Raises `NotImplementedError` if programs are not compiled for this platform now."""
    if (target := target_platform()) != platform:
        raise NotImplementedError(f"needs a {platform.upper()}; this program is for {target}")


def require_hopper() -> None:
    """Raises `NotImplementedError` if programs are not compiled for an H100 or its like now."""
    require("gpu")
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        name, fits = device.device_kind, any(x in device.device_kind for x in ("H100", "H200"))
    else:
        name = jax.local_devices()[0].device_kind
        fits = getattr(jax.local_devices()[0], "compute_capability", None) == HOPPER
    if not fits:
        raise NotImplementedError(f"needs a Hopper GPU (H100, H200); this program is for {name}")
