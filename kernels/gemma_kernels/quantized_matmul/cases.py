"""Named quantised matrices, of every kind and with the groups of real files, small."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from gemma_kernels.quantized_matmul.form import QuantizedMatrix


@dataclass(frozen=True, kw_only=True)
class Case:
    """One matrix of `O` outputs and `I` inputs.

    Attributes:
      bits: Of a code: 8 or 4.
      group: Columns with one scale; `None`: a whole row.
      signed: Whether 4-bit codes go below 0.
      offset: Whether groups have one.
      table: Whether codes stand for 16 values of their own.
      dtype: Of scales and offsets.
    """

    name: str
    O: int
    I: int
    bits: int = 8
    group: int | None = 32
    signed: bool = True
    offset: bool = False
    table: bool = False
    dtype: str = "float16"

    def matrix(self, seed: int = 0) -> QuantizedMatrix:
        """The matrix, in rows."""
        rng = np.random.default_rng(seed)
        group = self.group or self.I
        low, high = {8: (-128, 128), 4: (-8, 8) if self.signed else (0, 16)}[self.bits]
        codes = jnp.asarray(rng.integers(low, high, (self.O, self.I)), jnp.int32)
        kind = jnp.int8 if self.bits == 8 else jnp.int4 if self.signed else jnp.uint4

        def factors(low, high):
            return jnp.asarray(rng.uniform(low, high, (self.O, self.I // group)), self.dtype)

        return QuantizedMatrix(
            codes.astype(kind),
            # Some float16 numbers below 6e-5 have fewer digits; Q6_K has scales below 0.
            factors(2e-5, 8e-3) * jnp.asarray(rng.choice([-1, 1]), self.dtype),
            factors(-0.1, 0.05) if self.offset else None,
            jnp.asarray(np.sort(rng.uniform(-1, 1, 16)), jnp.float32) if self.table else None,
        )

    def x(self, rows: int, dtype=jnp.float32):
        """Activations `[rows, I]`, one block of them zeros and one value far from the rest."""
        x = np.random.default_rng(rows).standard_normal((rows, self.I))
        x[0, :32] = 0
        x[-1, 40] = 30
        return jnp.asarray(x, dtype)


CASES = (
    Case(name="Q8_0", O=72, I=320),
    Case(name="Q8_0, one tile", O=8, I=64),
    Case(name="Q6_K", O=72, I=256, group=16),
    Case(name="Q5_1", O=40, I=96, offset=True),
    Case(name="8 bits per channel", O=264, I=640, group=None, dtype="float32"),
    Case(name="8 bits, groups of 128", O=48, I=384, group=128, dtype="bfloat16"),
    Case(name="Q4_0", O=72, I=320, bits=4),
    Case(name="Q4_1", O=72, I=96, bits=4, signed=False, offset=True),
    Case(name="Q4_K", O=264, I=256, bits=4, signed=False, offset=True),
    Case(name="4 bits, groups of 16", O=24, I=160, bits=4, group=16, dtype="float32"),
    Case(name="4 bits, groups of 128", O=48, I=640, bits=4, group=128, dtype="bfloat16"),
    Case(name="4 bits per channel", O=40, I=352, bits=4, group=None, dtype="float32"),
    Case(name="nf4", O=72, I=192, bits=4, signed=False, group=64, table=True, dtype="float32"),
)
