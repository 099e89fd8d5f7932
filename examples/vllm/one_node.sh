#!/usr/bin/env bash
# Servers and trainer on one machine; the servers end with the training:
#
#   SERVERS="6 7" TRAINER=0,1,2,3,4,5 RANKS=6 examples/vllm/one_node.sh CONFIG.yaml [key=value ...] rollout.ahead=1
#
#   SERVERS   a word per server: its GPUs, as in "6 7" for two servers of one each or "4,5 6,7" for two of two each
#             (rollout.vllm_server.tensor=2); none is a server on the CPU      (default: none)
#   TRAINER   GPUs of the trainer                                              (default: all that are visible)
#   PORT      port of the first server, the others take the next ones          (default: 8100)
#   LOGS      directory for what the servers say                               (default: logs)
#   KEY_FILE  file with an API key, read where TROPD_API_KEY is not set        (default: a new one)
#
# RANKS, MAX_RESTARTS and GRACE: see examples/launch/torchrun_single_node.sh. SIGTERM and SIGUSR1 go to the trainer,
# which writes a checkpoint and leaves. Servers listen on 127.0.0.1 alone.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "$0" >&2; exit 64; }

here=$(dirname "$0")
if [ -z "${TROPD_API_KEY:-}" ]; then
  if [ -n "${KEY_FILE:-}" ]; then
    TROPD_API_KEY=$(tr -d '[:space:]' < "$KEY_FILE")
  else
    TROPD_API_KEY=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
  fi
fi
export TROPD_API_KEY

logs=${LOGS:-logs}
mkdir -p "$logs"
pids=() urls=() port=${PORT:-8100}
# each ends its own workers when it is asked to
trap 'kill "${pids[@]}" 2> /dev/null || true; wait' EXIT
read -ra servers <<< "${SERVERS:-none}"
for gpus in "${servers[@]}"; do
  [ "$gpus" != none ] || gpus=""
  CUDA_VISIBLE_DEVICES=$gpus HOST=127.0.0.1 PORT=$port bash "$here/server.sh" "$@" \
    > "$logs/server-$port.log" 2>&1 < /dev/null &
  pids+=("$!") urls+=("http://127.0.0.1:$port")
  port=$((port + 1))
done

[ -z "${TRAINER:-}" ] || export CUDA_VISIBLE_DEVICES=$TRAINER
# all are on this machine: weights travel as files, best in memory
SERVERS="${urls[*]}" ADDRESS="" bash "$here/trainer.sh" "$@" &
trainer=$!
trap 'kill -TERM "$trainer" || true' TERM
trap 'kill -USR1 "$trainer" || true' USR1
status=0
# a signal ends wait, not what is waited for
while wait "$trainer" && status=0 || status=$?; kill -0 "$trainer" 2> /dev/null; do :; done
exit "$status"
