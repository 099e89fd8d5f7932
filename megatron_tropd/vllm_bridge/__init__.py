"""The bridge to vLLM: an engine in this process, servers over HTTP, and what runs inside vLLM's own processes.

Nothing here imports Megatron-Core: ``worker`` and ``app`` are loaded by vLLM, which may live in another environment.
"""
