"""Tile work by Triton kernels, for GPUs."""
