"""Products of activations with matrices of int8 and 4-bit codes."""

from gemma_kernels.quantized_matmul.dispatch import AUTOMATIC, IMPLEMENTATIONS, quantized_matmul
from gemma_kernels.quantized_matmul.form import QuantizedMatrix, nbytes

__all__ = ["AUTOMATIC", "IMPLEMENTATIONS", "QuantizedMatrix", "nbytes", "quantized_matmul"]
