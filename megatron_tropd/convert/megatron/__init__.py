"""Megatron's distributed checkpoints read as if they were Hugging Face directories, slice by slice."""
