"""Attention kernels for Hopper GPUs, in Pallas's Mosaic GPU."""
