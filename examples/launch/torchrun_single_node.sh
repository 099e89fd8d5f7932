#!/usr/bin/env bash
# Trains on one machine, on all of its GPUs or on RANKS processes:
#
#   examples/launch/torchrun_single_node.sh CONFIG.yaml [key=value ...]
#
#   RANKS         processes to start                                  (default: one per GPU)
#   MAX_RESTARTS  restarts from the newest checkpoint after a failure (default: 3)
#   GRACE         seconds to write a checkpoint in once asked to stop (default: 600)
#
# SIGTERM and SIGUSR1 are handed on: the run writes a checkpoint and leaves. Start it again to go on.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "$0" >&2; exit 64; }

# shellcheck source=/dev/null
. "$(dirname "$0")/environment.sh"

# torch 2.13 would hand restarted ranks the addresses of the ranks before them (pytorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

torchrun=(python -m megatron_tropd.parallel.torchrun --standalone --nproc-per-node="${RANKS:-gpu}")
"${torchrun[@]}" -m megatron_tropd health
exec "${torchrun[@]}" \
  --max-restarts="${MAX_RESTARTS:-3}" \
  --shutdown-timeout="${GRACE:-600}" \
  --signals-to-handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" \
  -m megatron_tropd train "$@"
