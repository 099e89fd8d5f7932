"""Write a configuration for the models and prompts named, with a comment on what there is to decide: ``tropd init``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_tropd.commands.fitting import fit
from megatron_tropd.config.run import RunConfig
from megatron_tropd.errors import ConfigError
from megatron_tropd.setup.validate import Inputs, guided_per_prompt, read_inputs
from megatron_tropd.storage.write_aside import why_not_written

_PLAIN = re.compile(r"[\w./~+-]*[a-zA-Z_/][\w./~+-]*")  # what YAML takes for text as it stands


def write_configuration(config: RunConfig, out: Path) -> None:
    """Check the models and the data of ``config``, and write it to ``out``, which must not be there.

    Raises:
        TropdError: what is wrong with models, data or ``out``.
    """
    if out.exists():
        raise ConfigError(f"{out.absolute()} is there already, and stays as it is. Name another file with --out.")
    text = configuration_text(config)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(
            f"cannot write {out.absolute()} ({why_not_written(error)}). Name another with --out."
        ) from error


def configuration_text(config: RunConfig) -> str:
    """Return a YAML: what a user decides as keys, and what is ``auto`` as comments with its value."""
    fitted = fit(config).config
    inputs, now = read_inputs(fitted, may_lack_responses=True), fitted.named
    student, teacher = (_layout(section.parallel.model_dump()) for section in (now.student, now.teacher))
    prompts = _text(str(now.data.prompts[0])) if len(now.data.prompts) == 1 else _list(now.data.prompts)
    guided = "of these, one more starts with a prefix of the teacher's response"
    longest = f"of a response; the models have {_positions(inputs)} positions"
    there, answers = len(inputs.prompts), int(inputs.prompts.answered().sum())
    return f"""\
# `tropd check THIS_FILE` shows what it comes to; `tropd launch --nproc-per-node N train THIS_FILE` trains on N ranks.
# Paths are relative to the directory the command is started in; docs/configuration.md has every key.
# A key that is commented out is auto: chosen when a run starts. Its value here is that for one rank of this machine.
run_dir: {_text(str(now.run_dir))}
seed: {now.seed}
dtype: {now.dtype}  # fp32, or bf16 with fp32 master weights
student:
  model: {_text(str(now.student.model))}
  # parallel: {student}
  recompute: none  # selective or full where activations do not fit
teacher:
  model: {_text(str(now.teacher.model))}
  # parallel: {teacher}
data:
  prompts: {prompts}  # {there} of them can be used, {answers} have a reference answer
  # max_prompt_tokens: {now.data.max_prompt_tokens}  # longer ones are left out and counted
  responses: {now.data.responses}  # {_responses(now, inputs)}
rollout:
  samples_per_prompt: {now.rollout.samples_per_prompt}  # written by the student alone
  guided_per_prompt: {now.rollout.guided_per_prompt}  # {guided}
  # max_new_tokens: {now.rollout.max_new_tokens}  # {longest}
method:
  name: {now.method.name}  # its options are further keys: docs/methods.md
train:
  steps: {now.train.steps}
  prompts_per_step: {now.train.prompts_per_step}
  # pack_tokens: {now.train.pack_tokens}  # lower it where memory is short
optimizer:
  lr: {now.optimizer.lr:.1e}  # of Adam
  warmup_steps: {now.optimizer.warmup_steps}
checkpoint:
  every: {now.checkpoint.every}
evaluate:
  prompts: null  # a file of held-out problems with reference answers; null: no evaluation
# export:
#   hf: {_text(str(now.export.hf))}
"""


def _responses(config: RunConfig, inputs: Inputs) -> str:
    if not guided_per_prompt(config, inputs.method):
        return "not needed: this method guides no sequence"
    bare = int((inputs.prompts.response_lengths() == 0).sum())
    return f"{bare} prompts have none: the teacher writes them when a run starts" if bare else "those in the data"


def _positions(inputs: Inputs) -> int:
    return int(min(inputs.student.max_positions, inputs.teacher.max_positions))


def _layout(axes: dict[str, Any]) -> str:
    shown = {name: size for name, size in axes.items() if name in ("tensor", "pipeline") or size not in (1, False)}
    return "{" + ", ".join(f"{name}: {str(size).lower()}" for name, size in shown.items()) + "}"


def _text(value: str) -> str:
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # no interpolation
    return value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else json.dumps(value)


_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "~", "auto")


def _list(paths: tuple[Path, ...]) -> str:
    return "[" + ", ".join(_text(str(path)) for path in paths) + "]"
