"""What most ranks of the tests import, imported once before they are forked: it takes seconds, a fork milliseconds."""

import gc
import importlib

import torch

from megatron_tropd.losses.vocab_parallel.backends.triton import kernels

# as in the process of the tests themselves: chosen before Megatron-Core imports Triton
if kernels.installed() and not torch.cuda.is_available():
    kernels.use_interpreter()

for module in (
    "torch.distributed",
    "torch._inductor.compile_fx",  # experts: Megatron compiles some of their functions
    "transformers.models.qwen3.modeling_qwen3",
    "megatron_tropd.setup.build",
):
    importlib.import_module(module)
gc.freeze()  # what all ranks share need not be looked through, and so copied, by each
