"""``python -m megatron_tropd``: the same commands as ``tropd``."""

from megatron_tropd.cli import main

# checkpoint saving starts a helper process that imports this module again: it must do nothing then
if __name__ == "__main__":
    main()
