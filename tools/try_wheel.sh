#!/usr/bin/env bash
# Install a wheel into an empty environment and run what a new user runs: usage: tools/try_wheel.sh WHEEL
set -euo pipefail
wheel=$(realpath "$1")
constraints=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../constraints.txt")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"${PYTHON:-python3}" -m venv "$scratch/venv"
pip=("$scratch/venv/bin/python" -m pip --disable-pip-version-check install --quiet -c "$constraints")
"${pip[@]}" torch # first and alone, so that no other package's wish decides which build of it comes
"${pip[@]}" "$wheel"

cd "$scratch" # where nothing of the repository is to be imported from
export MEGATRON_TROPD_REQUIRE_COMPILED=1 OMP_NUM_THREADS=1
venv/bin/python -c 'import megatron_tropd; print(megatron_tropd.__file__, megatron_tropd.__version__)'
venv/bin/tropd --help > /dev/null
venv/bin/tropd demo train.steps=2 optimizer.warmup_steps=0 evaluate.max_problems=8 report.samples=1
test -s runs/demo/student/model.safetensors
echo "$(basename "$wheel") works in an empty environment"
