"""Compilers of TPUs and GPUs, asked without the hardware."""
