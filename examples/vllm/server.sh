#!/usr/bin/env bash
# Starts one vLLM server that samples for a trainer, on this machine or another:
#
#   examples/vllm/server.sh CONFIG.yaml [key=value ...]
#
#   HOST      address to listen on                      (default: 127.0.0.1, for this machine alone)
#   PORT      port to listen on                         (default: 8100)
#   KEY_FILE  file with the API key, read where TROPD_API_KEY is not set; without a key only loopback is served
#
# Give it the CONFIG and the overrides of the trainer: model, lengths and dtype must agree.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "$0" >&2; exit 64; }

if [ -z "${TROPD_API_KEY:-}" ] && [ -n "${KEY_FILE:-}" ]; then
  TROPD_API_KEY=$(tr -d '[:space:]' < "$KEY_FILE")
  export TROPD_API_KEY
fi

# who samples is the trainer's affair: a server needs no addresses of servers
exec python -m megatron_tropd serve student "$@" rollout.engine=megatron \
  --host "${HOST:-127.0.0.1}" --port "${PORT:-8100}"
