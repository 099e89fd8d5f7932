"""The engines that score: a Megatron teacher here or on ranks of its own, vLLM, a recording."""
