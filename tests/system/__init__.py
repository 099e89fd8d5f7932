"""Tests of what the machine gives: SLURM, nodes, the sandbox."""
