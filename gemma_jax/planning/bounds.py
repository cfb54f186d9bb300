"""What holds a step up: arithmetic, memory, or what passes between devices."""

from dataclasses import dataclass

from gemma_jax.planning.hardware import Device


@dataclass(frozen=True)
class Bounds:
    """Seconds of a step on one device, of each alone at its full speed.

    Attributes:
      compute, memory: Of operations, and of bytes read and written.
      links: Of what passes between devices; `None` where that is not known.

    Examples:
      >>> from gemma_jax.planning.bounds import Bounds
      >>> one = Bounds(compute=3.0, memory=1.0, links=1.0)
      >>> one.name, one.seconds
      ('compute', 4.0)
    """

    compute: float
    memory: float
    links: float | None = None

    @classmethod
    def of(
        cls, device: Device, operations: float, moved_bytes: float, links: float | None = None
    ) -> "Bounds":
        """At the speeds of a device."""
        return cls(operations / device.peak, moved_bytes / device.bandwidth, links)

    @property
    def name(self) -> str:
        """The longest of them: `compute`, `memory` or `links`."""
        return max(vars(self), key=lambda name: vars(self)[name] or 0.0)

    @property
    def seconds(self) -> float:
        """Arithmetic beside memory; links besides, as if nothing hid them."""
        return max(self.compute, self.memory) + (self.links or 0.0)
