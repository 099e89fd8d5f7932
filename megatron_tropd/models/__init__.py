"""The model families: reading ``config.json``, name tables, the rules that cut tensors, rotary embeddings."""
