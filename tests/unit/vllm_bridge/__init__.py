"""Tests of the room ``vllm_bridge``."""
