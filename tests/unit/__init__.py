"""Tests of one room each, without other processes (some start a child of their own)."""
