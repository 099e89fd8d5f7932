"""Tests with real vLLM engines and servers."""
