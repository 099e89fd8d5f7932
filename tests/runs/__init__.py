"""Tests of the whole program: commands and training from end to end."""
