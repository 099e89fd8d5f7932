"""Hugging Face checkpoints <-> Megatron models: one name table per model family, sliced reading, streamed writing."""
