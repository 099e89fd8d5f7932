"""Tests of the room ``weight_sync``."""
