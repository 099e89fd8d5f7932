"""Process groups and collectives. ``group=None`` means one rank, and the same code runs."""
