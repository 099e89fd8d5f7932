"""The sources of rollouts: the embedded Megatron model, vLLM here or as servers, recordings."""
