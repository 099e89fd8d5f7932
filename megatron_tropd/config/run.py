"""The frozen tree of a whole run, and the rules between its sections.

Rules inside one section are in ``config.sections``. Method options are collected here but checked by
``methods.build_method``, which knows them; this room is below it.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import PrivateAttr, ValidationInfo, model_validator

from megatron_tropd.config.sections import (
    AUTO,
    FITTED_LATER,
    BaseConfig,
    CheckpointConfig,
    DataConfig,
    Device,
    Dtype,
    EvaluateConfig,
    ExportConfig,
    Layout,
    MethodConfig,
    NamedTeacherConfig,
    OptimizerConfig,
    Real,
    ReportConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    UserPath,
    Whole,
    chosen,
    key,
)
from megatron_tropd.errors import ConfigError
from megatron_tropd.types import ModelSource

STUDENT = "student"  # in teacher.model: the student itself


class RunConfig(Section):
    """A whole run. Build it with :func:`load_config` or :func:`parse_config`, which raise readable errors."""

    run_dir: UserPath = chosen(
        None,
        "Directory of the run: metrics, config, checkpoints, report. `auto`: runs/STUDENT-from-TEACHER-METHOD, by the "
        "last part of their names.",
    )
    seed: Whole = key(0, "Seed of every random number of the run.", ge=0, lt=2**63)
    dtype: Dtype = key("bf16", "Compute type. `bf16` keeps fp32 master weights.")
    device: Device = key(
        "auto",
        "Where to compute: `cuda` refuses to run without a GPU; `auto` takes one, and says so where a machine has one "
        "that torch does not see.",
    )
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
    reward: RewardConfig = RewardConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    export: ExportConfig = ExportConfig()
    _named: RunConfig | None = PrivateAttr(default=None)
    _commits: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _run_has_a_directory(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("run_dir", AUTO) != AUTO:
            return data
        student, teacher = (_word(data, role, "model") for role in ("student", "teacher"))
        if student is None or teacher is None:  # which is an error of its own
            return {**data, "run_dir": Path("runs")}
        method = _word(data, "method", "name") or MethodConfig().name
        return {**data, "run_dir": Path("runs") / f"{_name(student)}-from-{_name(teacher)}-{method}"}

    @model_validator(mode="before")
    @classmethod
    def _teacher_may_be_the_student(cls, data: Any) -> Any:
        """Put the student's model in the place of the word ``student``."""
        if not isinstance(data, Mapping):
            return data
        student, teacher = data.get("student"), data.get("teacher")
        if not (isinstance(student, Mapping) and isinstance(teacher, Mapping) and teacher.get("model") == STUDENT):
            return data
        if teacher.get("like") is not None:
            raise ValueError(
                f"teacher.like = '{teacher['like']}' is not read with teacher.model = student. Take it out."
            )
        if "model" not in student:
            return data
        own = {"model": student["model"], "like": student.get("like")}
        return {**data, "teacher": {**teacher, **own}}

    @model_validator(mode="after")
    def _who_moves_is_the_student(self) -> Self:
        teacher = self.teacher
        if not teacher.moves:
            return self
        if teacher.source != self.student.source:
            raise ValueError(
                f"teacher.update = {teacher.update} is for a student that is its own teacher, and teacher.model = "
                f"'{teacher.model}' is another model. Set teacher.model to student, or teacher.update to frozen."
            )
        if self.student.lora is not None:
            raise ValueError(
                f"teacher.update = {teacher.update} is not available for a student with adapters (student.lora). Set "
                "teacher.update to frozen, which is the student's frozen base, or student.lora to null."
            )
        if teacher.parallel not in (Layout(), self.student.parallel):
            raise ValueError(
                f"teacher.parallel is not read with teacher.update = {teacher.update}: it is laid out as the student. "
                "Leave it out."
            )
        return self

    @model_validator(mode="after")
    def _none_of_the_sequences_is_guided_without_responses(self) -> Self:
        guided = self.rollout.guided_per_prompt
        if self.data.responses == "none" and guided:
            if "guided_per_prompt" in self.rollout.model_fields_set:
                raise ValueError(
                    f"rollout.guided_per_prompt = {guided} starts sequences with a teacher's response, and "
                    "data.responses = none has none. Set it to 0, or data.responses to auto."
                )
            rollout = self.rollout.model_copy(update={"guided_per_prompt": 0})
            object.__setattr__(self, "rollout", rollout)  # frozen, and not handed out yet
        return self

    @model_validator(mode="after")
    def _sections_fit_each_other(self, info: ValidationInfo) -> Self:
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if self.train.pack_tokens < longest and not (info.context == FITTED_LATER and self._has_an_open_length()):
            raise ValueError(
                f"train.pack_tokens = {self.train.pack_tokens} cannot hold the longest sequence: "
                f"data.max_prompt_tokens + rollout.max_new_tokens = "
                f"{self.data.max_prompt_tokens} + {self.rollout.max_new_tokens} = {longest}. "
                f"Raise train.pack_tokens to {longest} or more, or lower one of the two."
            )
        scored = self.data.longest_teacher_prompt + self.rollout.max_new_tokens
        fitted = info.context == FITTED_LATER and self._has_an_open_length()
        if self.data.own_teacher_prompts and self.train.pack_tokens < scored and not fitted:
            raise ValueError(
                f"train.pack_tokens = {self.train.pack_tokens} cannot hold the longest sequence that the teacher "
                f"reads: data.max_teacher_prompt_tokens + rollout.max_new_tokens = {scored}. "
                f"Raise train.pack_tokens to {scored} or more, or lower one of the two."
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
        if self.export.adapter is not None and self.student.lora is None:
            raise ValueError(
                f"export.adapter = '{self.export.adapter}' has nothing to write: the student has no adapters. Set "
                "student.lora.rank to train some, or export.adapter to null."
            )
        if self.export.megatron is not None and self.student.lora is not None:
            raise ValueError(
                f"export.megatron = '{self.export.megatron}' writes whole models, and the student has adapters. Set "
                "export.hf for the merged model, and convert that: tropd convert hf-to-megatron DIR TARGET --layout "
                f"{self.export.megatron_layout}."
            )
        return self

    @model_validator(mode="after")
    def _weights_are_compared_where_they_are_graded(self) -> Self:
        for name, wanted in (
            ("export.best = true", self.export.best),
            (f"train.stop_after_no_gain = {self.train.stop_after_no_gain}", self.train.stop_after_no_gain > 0),
        ):
            if wanted and not self.evaluate.every:
                raise ValueError(
                    f"{name} compares accuracies, and evaluate.every = 0 measures none. Set evaluate.every."
                )
        if self.train.stop_after_no_gain and self.teacher.ranks and self.rollout.ahead:
            raise ValueError(
                f"train.stop_after_no_gain = {self.train.stop_after_no_gain} would leave scores behind that a teacher "
                f"on ranks of its own (teacher.ranks = {self.teacher.ranks}) works on ahead of training "
                f"(rollout.ahead = {self.rollout.ahead}). Set one of the three to 0."
            )
        return self

    @model_validator(mode="after")
    def _every_teacher_has_something_to_grade(self) -> Self:
        names = [teacher.name for teacher in self.teachers]
        named = [source.teacher for source in self.data.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"teachers holds {names.count(name)} teachers named {name!r}. Give each its own name.")
            if name not in named:
                raise ValueError(
                    f"teachers holds {name!r}, which no source names and nothing would be scored by. "
                    "Give it to one of data.sources, as its teacher, or take it out."
                )
        for i, wanted in enumerate(named):
            if wanted is not None and wanted not in names:
                known = ", ".join(map(repr, names)) or "none"
                raise ValueError(f"data.sources[{i}].teacher = {wanted!r} is not one of teachers ({known}).")
        return self

    @model_validator(mode="after")
    def _several_teachers_share_the_ranks_and_are_live(self) -> Self:
        if not self.teachers:
            return self
        if all(source.teacher is not None for source in self.data.sources):
            raise ValueError(
                "every source names one of teachers, so that teacher.model would score nothing. "
                "Move one of them there, and leave out the name in its sources."
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

    def _has_an_open_length(self) -> bool:
        """Say whether a length, or the budget of packs, is still to be chosen."""
        keys = ((self.data, "max_prompt_tokens"), (self.rollout, "max_new_tokens"), (self.train, "pack_tokens"))
        return any(name not in section.model_fields_set for section, name in keys)

    @property
    def named(self) -> RunConfig:
        """Return the configuration as its user named models and data, on the hub with their commits."""
        return self._named or self

    @property
    def commits(self) -> Mapping[str, str]:
        """Return the commit of every name on the hub, by the name as it was given."""
        return self._commits

    def changed(self, change: Callable[[RunConfig], RunConfig]) -> RunConfig:
        """Return the configuration with keys changed, also as its user named models and data."""
        found = change(self)
        return found if self._named is None else found.noting(change(self._named), self._commits)

    def noting(self, named: RunConfig, commits: Mapping[str, str]) -> Self:
        """Return this configuration of local paths, with what they were named."""
        found = self.model_copy()
        found._named, found._commits = named, commits
        return found

    @property
    def base_model(self) -> Path:
        """Return the path of the base model's weights: the student's before training unless another is named."""
        return self.base.model or self.student.model

    @property
    def base_source(self) -> ModelSource:
        """Return where the base model's weights come from, and its config and tokenizer."""
        return ModelSource(self.base.model, self.base.like) if self.base.model else self.student.source

    @property
    def base_parallel(self) -> Layout:
        """Return the base model's layout."""
        return self.base.parallel or (self.teacher.parallel if self.base.model else self.student.parallel)

    def check_world(self, world_size: int) -> None:
        """Raise ConfigError when student, teacher or sampler cannot be laid out over ``world_size`` ranks."""
        own = self.teacher.ranks
        shared = world_size - own
        if shared < 1:
            raise ConfigError(
                f"teacher.ranks = {own} leaves no rank to the student: {world_size} "
                f"{'is' if world_size == 1 else 'are'} launched. "
                f"Launch {own + self.student.parallel.smallest_world}, as in `torchrun --nproc-per-node "
                f"{own + self.student.parallel.smallest_world} -m megatron_tropd ...`, or set teacher.ranks=0."
            )
        sampler = Layout(tensor=self.rollout.parallel.tensor)
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
        """Raise ConfigError when a path that the run reads does not exist."""
        resume = self.checkpoint.resume
        model = "Give a Hugging Face directory, a checkpoint, or a name on the hub, such as Qwen/Qwen3-8B."
        for name, path, fix in (
            ("student.model", self.student.model, model),
            ("teacher.model", self.teacher.model, model),
            *((f"teachers[{i}].model", teacher.model, model) for i, teacher in enumerate(self.teachers)),
            ("base.model", self.base.model, model),
            ("student.like", self.student.like, model),
            ("student.lora.path", self.student.lora_path, "Give the directory of an adapter of `peft`."),
            ("teacher.like", self.teacher.like, model),
            *((f"teachers[{i}].like", teacher.like, model) for i, teacher in enumerate(self.teachers)),
            ("base.like", self.base.like, model),
            *(("data.prompts", path, PROMPT_FILES) for path in self.data.prompts),
            *(
                (f"data.sources[{i}].prompts", path, PROMPT_FILES)
                for i, source in enumerate(self.data.sources)
                for path in source.prompts
            ),
            *(("evaluate.prompts", path, f"{PROMPT_FILES} Null is no evaluation.") for path in self.evaluate.prompts),
            *(
                (f"prompts of the suite {suite.name!r}", path, PROMPT_FILES)
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
            if path is not None and not path.exists() and not (fix.startswith(PROMPT_FILES) and matches(path)):
                raise ConfigError(
                    f"{name} = '{path}': there is nothing at {path.absolute()} "
                    f"(relative paths are relative to the current directory). {fix}{variable_in(path)}"
                )


def _word(data: Mapping[str, Any], section: str, name: str) -> str | None:
    """Return a value as it was written, where there is one."""
    found = data.get(section)
    value = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
    return None if value is None else str(value)


def _name(model: str) -> str:
    """Return the last part of the path or name of a model, which may be ``.`` or end in a slash."""
    name = Path(model).name.partition("@")[0]
    return Path(model).expanduser().resolve().name or "model" if name in ("", "..") else name


PROMPT_FILES = (
    "Give a JSONL, Parquet or Arrow file, a glob, a directory of them, or a data set on the hub, such as "
    "openai/gsm8k:main:train."
)


def variable_in(path: Path) -> str:
    """Say what to do about a shell variable that stands in a path as it was written; empty where there is none."""
    found = re.search(r"\$\{?(\w+)", str(path))
    if found is None:
        return ""
    name = found[1]
    return f" Variables of the shell are not filled in: write ${{oc.env:{name}}}, after `export {name}=...`."


def matches(pattern: Path) -> bool:
    """Say whether a pattern such as ``data/*.parquet`` finds anything."""
    return next(glob.iglob(str(pattern), recursive=True), None) is not None
