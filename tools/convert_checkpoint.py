"""Converts checkpoints between Hugging Face and Megatron: ``python tools/convert_checkpoint.py hf-to-megatron --help``.

The same as ``tropd convert``, for those who look for it here.
"""

from __future__ import annotations

import sys

from megatron_tropd.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
