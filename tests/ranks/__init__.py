"""Tests on real gloo processes."""
