"""What most ranks of the tests import, imported once before they are forked: it takes seconds, a fork milliseconds."""

import gc
import importlib

for module in (
    "torch.distributed",
    "torch._inductor.compile_fx",  # experts: Megatron compiles some of their functions
    "transformers.models.qwen3.modeling_qwen3",
    "megatron_tropd.setup.build",
):
    importlib.import_module(module)
gc.freeze()  # what all ranks share need not be looked through, and so copied, by each
