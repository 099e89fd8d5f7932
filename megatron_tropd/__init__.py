"""On-policy distillation of large language models on Megatron-Core."""

__version__ = "0.1.0"

import os as _os
import warnings as _warnings

# torch would build every object that a pickle names, whatever its caller says
if _os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None) is not None:
    _warnings.warn(
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is unset: with it a checkpoint's files could run code here.", stacklevel=2
    )
