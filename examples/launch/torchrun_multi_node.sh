#!/usr/bin/env bash
# Trains on several machines without a scheduler. Start it on every one of them, in any order, with the same arguments:
#
#   HEAD=10.0.0.1 NODES=4 examples/launch/torchrun_multi_node.sh CONFIG.yaml [key=value ...]
#
#   HEAD          address of the machine the others meet at, one of them
#   NODES         how many machines; MIN:MAX goes on with fewer while some are missing, if the layout still fits
#   RANKS         processes per machine                               (default: one per GPU)
#   PORT          port of the meeting                                 (default: 29400)
#   RUN           name of the run, where several meet at one port     (default: tropd)
#   INTERFACE     network interface between the machines, where NCCL and gloo choose another
#   ADDRESS       this machine's address, where its host name means nothing to the others
#   MAX_RESTARTS  restarts from the newest checkpoint after a failure (default: 100)
#   PATIENCE      seconds that the others wait for a machine to come back (default: 3600)
#   GRACE         seconds to write a checkpoint in once asked to stop (default: 600)
#   LOGS          logs of every rank go below LOGS/<host>             (default: logs)
#   HEALTH        no: start without checking this machine first       (default: yes)
#
# When a machine is lost the ranks of the others notice after collective_timeout_s. All meet again once it is back, or
# once this script has been started in its place, and go on from the newest checkpoint: run_dir must be shared.
# SIGTERM and SIGUSR1 are handed on: the run writes a checkpoint, the machines that were sent one leave, and the others
# wait for somebody in their place. To end the run, send one to every machine.
set -euo pipefail
[ $# -ge 1 ] && [ -n "${HEAD:-}" ] && [ -n "${NODES:-}" ] ||
  { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "$0" >&2; exit 64; }

# shellcheck source=/dev/null
. "$(dirname "$0")/environment.sh"

# this machine alone: one that takes another's place finds the others training
[ "${HEALTH:-yes}" = no ] ||
  python -m megatron_tropd.parallel.torchrun --standalone --nproc-per-node="${RANKS:-gpu}" -m megatron_tropd health

# torch 2.13 would hand restarted ranks the addresses of the ranks before them (pytorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

meeting="join_timeout=${PATIENCE:-3600}"
# torch finds out who HEAD is by resolving its own host name, unless it is told
[ -z "${ADDRESS:-}" ] || meeting+=",is_host=$([ "$ADDRESS" = "$HEAD" ] && echo true || echo false)"

exec python -m megatron_tropd.parallel.torchrun \
  --nnodes="$NODES" \
  --nproc-per-node="${RANKS:-gpu}" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$HEAD:${PORT:-29400}" \
  --rdzv-id="${RUN:-tropd}" \
  --rdzv-conf="$meeting" \
  ${ADDRESS:+--local-addr="$ADDRESS"} \
  --max-restarts="${MAX_RESTARTS:-100}" \
  --shutdown-timeout="${GRACE:-600}" \
  --signals-to-handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" \
  --log-dir="${LOGS:-logs}/${HOSTNAME:-$(uname -n)}" --tee=3 \
  -m megatron_tropd train "$@"
