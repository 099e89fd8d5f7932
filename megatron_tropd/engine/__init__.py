"""The only room that knows Megatron-Core: models, forward, step, optimizer, checkpoints, publishing."""
