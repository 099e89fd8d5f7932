"""Phases that take long: named where the work is done, told by a heartbeat to whoever watches."""
