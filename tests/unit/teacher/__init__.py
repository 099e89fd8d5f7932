"""Tests of the room ``teacher``."""
