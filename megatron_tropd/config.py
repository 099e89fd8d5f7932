"""The configuration of a run: one frozen tree, read from YAML and ``key=value`` overrides.

Everything a user can get wrong in a config is refused here, by ``ConfigError``, before any model is built. Paths are
kept as written; a relative path is relative to the current directory, in the config and in overrides alike.
Interpolation (``${student.model}``, ``${oc.env:HOME}``) is OmegaConf's and sees the keys that are written down, not
the defaults.

Method options are collected here but checked by ``methods.build_method``, which knows them; this room is below it.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from omegaconf import OmegaConf
from pydantic import Field, ValidationError, model_validator

from megatron_tropd._config_errors import explain, read_tree
from megatron_tropd._config_reference import reference_rows
from megatron_tropd._config_sections import (
    DEFAULT_SUITES,
    BaseConfig,
    CheckpointConfig,
    ColumnsConfig,
    DataConfig,
    Dtype,
    EvaluateConfig,
    ExportConfig,
    Grader,
    MethodConfig,
    NamedTeacherConfig,
    OptimizerConfig,
    ParallelConfig,
    Real,
    ReportConfig,
    RolloutConfig,
    RolloutEngine,
    RolloutParallelConfig,
    Section,
    ServersConfig,
    SourceConfig,
    StudentConfig,
    StudentServersConfig,
    SuiteConfig,
    TeacherConfig,
    TeacherEngine,
    TrainConfig,
    UserPath,
    VLLMConfig,
    Whole,
    key,
)
from megatron_tropd.errors import ConfigError

__all__ = [
    "DEFAULT_SUITES",
    "BaseConfig",
    "CheckpointConfig",
    "ColumnsConfig",
    "DataConfig",
    "Dtype",
    "EvaluateConfig",
    "ExportConfig",
    "Grader",
    "MethodConfig",
    "NamedTeacherConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ReportConfig",
    "RolloutConfig",
    "RolloutEngine",
    "RolloutParallelConfig",
    "RunConfig",
    "ServersConfig",
    "SourceConfig",
    "StudentConfig",
    "StudentServersConfig",
    "SuiteConfig",
    "TeacherConfig",
    "TeacherEngine",
    "TrainConfig",
    "VLLMConfig",
    "config_reference",
    "dump_config",
    "load_config",
    "load_suite",
    "parse_config",
]


class RunConfig(Section):
    """A whole run. Build it with :func:`load_config` or :func:`parse_config`, which raise readable errors."""

    run_dir: UserPath = Field(description="Directory of the run: metrics, config, checkpoints, report.")
    seed: Whole = key(0, "Seed of every random number of the run.", ge=0, lt=2**63)
    dtype: Dtype = key("bf16", "Compute type. `bf16` keeps fp32 master weights.")
    collective_timeout_s: Real = key(
        1800.0,
        "Seconds that ranks wait for one another before they give up; a node that is cut off is noticed no sooner. "
        "Above the longest that one rank works alone: loading a model, writing a checkpoint or an export.",
        gt=0,
    )
    student: StudentConfig
    teacher: TeacherConfig
    teachers: tuple[NamedTeacherConfig, ...] = key(
        (), "More teachers, each for the sequences of the data sources that name it; a list."
    )
    base: BaseConfig = BaseConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    method: MethodConfig = MethodConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _sections_fit_each_other(self) -> Self:
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if self.train.pack_tokens < longest:
            raise ValueError(
                f"train.pack_tokens = {self.train.pack_tokens} cannot hold the longest sequence: "
                f"data.max_prompt_tokens + rollout.max_new_tokens = "
                f"{self.data.max_prompt_tokens} + {self.rollout.max_new_tokens} = {longest}. "
                f"Raise train.pack_tokens to {longest} or more, or lower one of the two."
            )
        sequences = self.train.prompts_per_step * (self.rollout.samples_per_prompt + self.rollout.guided_per_prompt)
        if self.train.minibatches > sequences:
            raise ValueError(
                f"train.minibatches = {self.train.minibatches} is more than the {sequences} sequences of a step. "
                "Lower it, or raise train.prompts_per_step."
            )
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} never ends: train.steps = {self.train.steps}. "
                "Lower it, or raise train.steps."
            )
        for name, model in (
            ("student.model", self.student.model),
            ("teacher.model", self.teacher.model),
            *((f"teachers[{i}].model", teacher.model) for i, teacher in enumerate(self.teachers)),
            ("base.model", self.base_model),
        ):
            if self.export.hf is not None and self.export.hf.absolute() == model.absolute():
                raise ValueError(
                    f"export.hf = '{self.export.hf}' is {name}, which would be overwritten. Name another directory."
                )
        return self

    @model_validator(mode="after")
    def _every_teacher_has_something_to_grade(self) -> Self:
        names = [teacher.name for teacher in self.teachers]
        asked = [source.teacher for source in self.data.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"teachers holds {names.count(name)} teachers named {name!r}. Give each its own name.")
            if name not in asked:
                raise ValueError(
                    f"teachers holds {name!r}, which no source names and nothing would be graded by. "
                    "Give it to one of data.sources, as its teacher, or take it out."
                )
        for i, wanted in enumerate(asked):
            if wanted is not None and wanted not in names:
                known = ", ".join(map(repr, names)) or "none"
                raise ValueError(f"data.sources[{i}].teacher = {wanted!r} is not one of teachers ({known}).")
        return self

    @model_validator(mode="after")
    def _several_teachers_are_megatrons_own_and_live(self) -> Self:
        if not self.teachers:
            return self
        if all(source.teacher is not None for source in self.data.sources):
            raise ValueError(
                "every source names one of teachers, so that teacher.model would grade nothing. "
                "Move one of them there, and leave out the name in its sources."
            )
        if self.teacher.engine != "megatron":
            raise ValueError(
                f"teacher.engine = {self.teacher.engine} is for runs with one teacher, and teachers holds "
                f"{len(self.teachers)} more. Set it to megatron."
            )
        if self.teacher.ranks:
            raise ValueError(
                f"teacher.ranks = {self.teacher.ranks} is for runs with one teacher, and teachers holds "
                f"{len(self.teachers)} more. Set it to 0."
            )
        for key_, value in (("record", self.teacher.record), ("recorded_from", self.teacher.recorded_from)):
            if value is not None:
                raise ValueError(
                    f"teacher.{key_} = '{value}' is for runs with one teacher, and teachers holds "
                    f"{len(self.teachers)} more. Set it to null, or record each source in a run of its own."
                )
        return self

    @property
    def base_model(self) -> Path:
        """Where the base model's weights are: the student's before training unless another is named."""
        return self.base.model or self.student.model

    @property
    def base_parallel(self) -> ParallelConfig:
        """How the base model is laid out."""
        return self.base.parallel or (self.teacher.parallel if self.base.model else self.student.parallel)

    def check_world(self, world_size: int) -> None:
        """Raises ConfigError when student, teacher or sampler cannot be laid out over ``world_size`` ranks."""
        own = self.teacher.ranks
        shared = world_size - own
        if shared < 1:
            raise ConfigError(
                f"teacher.ranks = {own} leaves no rank to the student: {world_size} "
                f"{'is' if world_size == 1 else 'are'} launched. "
                f"Launch {own + self.student.parallel.smallest_world}, as in `torchrun --nproc-per-node "
                f"{own + self.student.parallel.smallest_world} -m megatron_tropd ...`, or set teacher.ranks=0."
            )
        sampler = ParallelConfig(tensor=self.rollout.parallel.tensor)
        for role, parallel, ranks in (
            ("student", self.student.parallel, shared),
            ("teacher", self.teacher.parallel, own or world_size),
            *((f"teachers[{i}]", teacher.parallel, shared) for i, teacher in enumerate(self.teachers)),
            ("base", self.base_parallel, shared),
            ("rollout", sampler, shared),
        ):
            try:
                parallel.data_size(ranks)
            except ConfigError as error:
                divided = ""
                if own:
                    divided = (
                        f" Of the {world_size} launched, {own} are the teacher's (teacher.ranks), and {shared} the "
                        f"student's: the two parts are launched together, so add the other to what this one needs."
                    )
                raise ConfigError(f"{role}.parallel: {error}{divided}") from None

    def check_paths(self) -> None:
        """Raises ConfigError when a path that the run reads does not exist."""
        resume = self.checkpoint.resume
        model = "Give a Hugging Face checkpoint directory on this machine; hub names are not downloaded."
        for name, path, fix in (
            ("student.model", self.student.model, model),
            ("teacher.model", self.teacher.model, model),
            *((f"teachers[{i}].model", teacher.model, model) for i, teacher in enumerate(self.teachers)),
            ("base.model", self.base.model, model),
            *(("data.prompts", path, _PROMPTS) for path in self.data.prompts),
            *(
                (f"data.sources[{i}].prompts", path, _PROMPTS)
                for i, source in enumerate(self.data.sources)
                for path in source.prompts
            ),
            *(("evaluate.prompts", path, f"{_PROMPTS} Null is no evaluation.") for path in self.evaluate.prompts),
            *(
                (f"prompts of the suite {suite.name!r}", path, _PROMPTS)
                for suite in self.evaluate.suites
                for path in suite.prompts
            ),
            ("rollout.recorded_from", self.rollout.recorded_from, "Give the directory of a run with rollout.record."),
            ("teacher.recorded_from", self.teacher.recorded_from, "Give the directory of a run with teacher.record."),
            (
                "checkpoint.resume",
                None if resume in ("auto", "never") else Path(resume).expanduser(),
                "Give a checkpoint directory, auto or never.",
            ),
        ):
            if path is not None and not path.exists() and not (fix.startswith(_PROMPTS) and _matches(path)):
                raise ConfigError(
                    f"{name} = '{path}': there is nothing at {path.absolute()} "
                    f"(relative paths are relative to the current directory). {fix}"
                )


_PROMPTS = "Give a JSONL, Parquet or Arrow file, a glob, or a directory of them."


def _matches(pattern: Path) -> bool:
    """Whether a pattern such as ``data/*.parquet`` finds anything."""
    return next(glob.iglob(str(pattern), recursive=True), None) is not None


def parse_config(tree: Mapping[str, Any], *, source: str = "config") -> RunConfig:
    """Validates a plain tree of keys. Raises ConfigError naming every bad key; ``source`` heads the message."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig, source=source)) from None


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None, check_paths: bool = True
) -> RunConfig:
    """Reads a YAML file, applies ``key=value`` overrides, resolves interpolations and validates.

    Args:
        overrides: such as ``["train.steps=10", "evaluate.suites[0].samples=2"]``; values are YAML.
        world_size: number of ranks; when given, both layouts must fit it.
        check_paths: whether the models and data must exist; off for reading the config of a finished run.

    Raises:
        ConfigError: for everything that is wrong with the file, an override or a value.
    """
    tree, text = read_tree(Path(path), overrides)
    _include_suites(tree)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig, source=str(path), text=text, overrides=overrides)) from None
    if check_paths:
        config.check_paths()
    if world_size is not None:
        config.check_world(world_size)
    return config


def read_overrides(path: str | Path) -> list[str]:
    """The values of a YAML file as the overrides ``key=value`` that set them.

    Raises:
        ConfigError: the file cannot be read.
    """

    def leaves(tree: Mapping[str, Any], prefix: str) -> list[str]:
        found: list[str] = []
        for name, value in tree.items():
            if isinstance(value, dict):
                found += leaves(value, f"{prefix}{name}.")
            else:
                # JSON is YAML, and a text stays one whatever it looks like
                plain = isinstance(value, str) and value.isidentifier()
                found.append(f"{prefix}{name}={value if plain else json.dumps(value)}")
        return found

    return leaves(read_tree(Path(path), ())[0], "")


def _include_suites(tree: dict[str, Any]) -> None:
    """Puts the keys of ``file`` under those of every suite that names one."""
    evaluate = tree.get("evaluate")
    suites = evaluate.get("suites") if isinstance(evaluate, dict) else None
    for i, suite in enumerate(suites if isinstance(suites, list) else ()):
        if isinstance(suite, dict) and "file" in suite:
            own = {key: value for key, value in suite.items() if key != "file"}
            suites[i] = read_tree(Path(str(suite["file"])).expanduser(), ())[0] | own  # type: ignore[index]


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Reads a suite of its own file, with ``key=value`` overrides, and checks that its problems exist.

    Raises:
        ConfigError: for everything that is wrong with the file, an override or a value.
    """
    tree, text = read_tree(Path(path), overrides)
    try:
        suite = SuiteConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, SuiteConfig, source=str(path), text=text, overrides=overrides)) from None
    for prompts in suite.prompts:
        if not prompts.exists() and not _matches(prompts):
            raise ConfigError(f"{path}: prompts = '{prompts}': there is nothing at {prompts.absolute()}. {_PROMPTS}")
    return suite


def dump_config(config: RunConfig, path: str | Path) -> None:
    """Writes every key, resolved, as YAML that :func:`load_config` reads back to an equal config. Atomic."""
    # OmegaConf's dumper quotes what its own reader would take for a number, such as the text "1e-4"
    text = OmegaConf.to_yaml(OmegaConf.create(_plain(config.model_dump())))
    partial = Path(path).with_name(Path(path).name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    """As YAML can hold it, with literal ``${`` protected, which OmegaConf would read as an interpolation."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | Path):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
    return value


def config_reference() -> str:
    """Every key with type, default and meaning, as a Markdown table."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for row in reference_rows(RunConfig):
        cells = (f"`{row.key}`", row.type, f"`{row.default}`" if row.default else "required", row.meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"
