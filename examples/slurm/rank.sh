#!/usr/bin/env bash
# Turns a SLURM task into a rank: the variables that torchrun would set, then the command in this very process, so that
# signals reach it.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$@"
