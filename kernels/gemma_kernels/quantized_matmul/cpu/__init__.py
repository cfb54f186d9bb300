"""Products with tiles on CPUs: a C library of our own, on XLA's threads."""

from gemma_kernels.quantized_matmul.cpu.library import TARGETS, instructions, register
from gemma_kernels.quantized_matmul.cpu.matmul import quantized_matmul_cpu

__all__ = ["TARGETS", "instructions", "quantized_matmul_cpu", "register"]
