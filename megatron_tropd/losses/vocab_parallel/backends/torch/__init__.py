"""Tile work by plain torch, on any device; the reference of every kernel."""
