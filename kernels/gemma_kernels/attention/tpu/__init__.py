"""Attention kernels for TPUs, in Pallas."""
