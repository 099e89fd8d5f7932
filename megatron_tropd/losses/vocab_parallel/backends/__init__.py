"""Who computes a tile: plain torch, or Triton kernels on GPUs."""
