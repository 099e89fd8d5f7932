"""The gradient norm of large tensors on CPU, against numpy's fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron.core.optimizer import clip_grads

from megatron_tropd.engine.patches import cuda_calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="the patch is for machines without CUDA")
def test_the_norm_of_large_gradients_has_the_digits_of_fp64():
    cuda_calls.install()
    large, small = torch.full((40_000_003,), 1e-3), torch.tensor([3.0, 4.0])
    truth = np.sqrt(40_000_003 * float(np.float32(1e-3)) ** 2 + 25.0)
    with cuda_calls.cuda_names_mean_cpu():
        found, _ = clip_grads.l2_norm_impl(2048, torch.zeros(1), [[large, small]], False)
    assert float(found) == pytest.approx(truth, rel=1e-6)
