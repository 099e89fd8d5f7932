"""What the models read: prompts, tokenizers, synthetic tasks, and the packing of sequences into streams."""
