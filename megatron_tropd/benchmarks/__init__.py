"""Measurements that back the numbers in the documentation; each module runs with ``python -m``."""
