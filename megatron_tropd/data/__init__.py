"""The models' reading: prompts, tokenizers, synthetic tasks, and the packing of sequences into streams."""
