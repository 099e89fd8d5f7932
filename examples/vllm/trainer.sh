#!/usr/bin/env bash
# Trains on one machine, on rollouts of vLLM servers that server.sh has started or will start:
#
#   SERVERS="http://10.0.0.2:8100 http://10.0.0.3:8100" ADDRESS=10.0.0.1 examples/vllm/trainer.sh CONFIG.yaml [key=value ...]
#
#   SERVERS   their addresses, words                    (default: http://127.0.0.1:8100)
#   ADDRESS   this machine's address, as they reach it: weights are broadcast; without it they travel as files, which
#             only servers on this machine can read
#   KEY_FILE  file with the servers' API key, read where TROPD_API_KEY is not set
#
# RANKS, MAX_RESTARTS and GRACE, and what signals do: see examples/launch/torchrun_single_node.sh, which this becomes.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "$0" >&2; exit 64; }

if [ -z "${TROPD_API_KEY:-}" ] && [ -n "${KEY_FILE:-}" ]; then
  TROPD_API_KEY=$(tr -d '[:space:]' < "$KEY_FILE")
  export TROPD_API_KEY
fi

read -ra servers <<< "${SERVERS:-http://127.0.0.1:8100}"
urls=$(IFS=,; echo "${servers[*]}")
publish=(rollout.vllm_server.publish=files)
[ -z "${ADDRESS:-}" ] ||
  publish=(rollout.vllm_server.publish=broadcast "rollout.vllm_server.publish_address=$ADDRESS")

exec bash "$(dirname "$0")/../launch/torchrun_single_node.sh" "$@" \
  rollout.engine=vllm_server "rollout.vllm_server.urls=[$urls]" "${publish[@]}"
