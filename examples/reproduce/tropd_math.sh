#!/usr/bin/env bash
# Submits examples/reproduce/tropd_math.yaml to SLURM, from the root of the repository:
#
#   STUDENT=DIR TEACHER=DIR PROMPTS=FILE examples/reproduce/tropd_math.sh [key=value ...]
#
#   STUDENT, TEACHER  Hugging Face directories of DeepSeek-R1-Distill-Qwen-1.5B and Skywork-OR1-Math-7B
#   PROMPTS           JSON lines or Parquet, columns prompt and answer
#   RESPONSES         file of the same prompts with one response of the teacher each, which guides the student; written
#                     by a first job where it is not there yet                  (default: runs/tropd_math-responses.jsonl)
#   SEEDS             a run each, in runs/tropd_math-SEED                       (default: "0 1 2")
#
# All of them must be where the nodes see them. The suites (aime24.jsonl, ...) are read from the root of the repository;
# another place: evaluate.suites[...] of the YAML. Each job is examples/slurm/train.sbatch on one node of eight GPUs.
set -euo pipefail
: "${STUDENT:?a directory of DeepSeek-R1-Distill-Qwen-1.5B}"
: "${TEACHER:?a directory of Skywork-OR1-Math-7B}"
: "${PROMPTS:?a file of prompts with answers}"
responses=${RESPONSES:-runs/tropd_math-responses.jsonl}
config=examples/reproduce/tropd_math.yaml
models=examples/reproduce/models
python=${PYTHON:-.venv/bin/python}

# the plan was made from the files under models/, written without the hub: what matters of them must be as it is there
"$python" - "$models/DeepSeek-R1-Distill-Qwen-1.5B" "$STUDENT" "$models/Skywork-OR1-Math-7B" "$TEACHER" <<'END'
import json, sys
from pathlib import Path

for planned, real in zip(sys.argv[1::2], sys.argv[2::2]):
    ours, theirs = (json.loads((Path(d) / "config.json").read_text()) for d in (planned, real))
    off = {key: (value, theirs.get(key)) for key, value in ours.items() if key in theirs and theirs[key] != value}
    off.pop("torch_dtype", None)
    if off:
        sys.exit(f"{real}/config.json differs from {planned}, with which the run was planned: {off}. "
                 f"Copy it there and run tropd check again.")
END

after=()
if [ ! -e "$responses" ]; then
  job=$(sbatch --parsable --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=96 --time=24:00:00 \
    --job-name=tropd-responses --wrap "$python -m megatron_tropd launch --standalone --nproc-per-node=8 generate \
      $(printf '%q' "$config") $(printf '%q' "$responses") $(printf '%q ' "student.model=$STUDENT" \
      "teacher.model=$TEACHER" "data.prompts=$PROMPTS" teacher.engine=megatron)")
  echo "job $job writes $responses"
  after=(--dependency="afterok:$job")
fi
for seed in ${SEEDS:-0 1 2}; do
  sbatch "${after[@]}" --nodes=1 --job-name="tropd-math-$seed" examples/slurm/train.sbatch "$config" \
    "student.model=$STUDENT" "teacher.model=$TEACHER" "data.prompts=$responses" "seed=$seed" \
    "run_dir=runs/tropd_math-$seed" "export.hf=runs/tropd_math-$seed/student" "$@"
done
