"""The engines that score, one row each: its capabilities, what it needs here, and how it is built.

Only this table, the engines' own files and the configuration's list of names know an engine by its name. Everybody else
reads a capability off the row, so that a new engine is a file and a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from megatron_tropd.config.sections import TeacherConfig
from megatron_tropd.convert.source import source_fingerprint
from megatron_tropd.engine.model import Model
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.parallel.partition import CrossWorldLink
from megatron_tropd.teacher.engines.megatron import MegatronTeacher
from megatron_tropd.teacher.engines.recorded import RecordedTeacher
from megatron_tropd.teacher.engines.remote import RankSplit, RemoteTeacher
from megatron_tropd.teacher.engines.vllm import LocalScorer, Scorer, ServerScorer, VLLMTeacher
from megatron_tropd.teacher.protocol import Teacher
from megatron_tropd.teacher.wire import HiddenKind
from megatron_tropd.types import Architecture
from megatron_tropd.vllm_bridge.connect import open_pool
from megatron_tropd.vllm_bridge.local_engine import LocalEngine, Scoring, check_installed
from megatron_tropd.vllm_bridge.options import engine_options


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherContext:
    """Everything that a teacher is built from."""

    section: TeacherConfig
    architecture: Architecture
    student: Groups  # whom scores are delivered to
    dtype: torch.dtype
    device: torch.device
    vocab_size: int  # ids that all models know
    temperature: float
    max_tokens: int  # of the longest sequence that is scored
    top_k: int  # the most alternatives of a token that are requested
    groups: Groups | None  # the teacher's layout over the student's ranks; None where it has ranks of its own
    model: Model | None = None  # of an engine that ``loads_model``
    link: CrossWorldLink | None = None  # to the teacher's own ranks, and how the launch is divided
    split: RankSplit | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # what a recording must have been made under


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherEngineRow:
    """One engine. What a recording can do is checked when it is opened."""

    scores_new: bool  # scores sequences that it has not seen
    loads_model: bool  # runs a Megatron model that is loaded beforehand
    among_several: bool  # can be one of several teachers
    hidden_states: bool  # can give them
    exact_distribution: bool  # knows all ids: those the student names, exact entropies, temperatures, shared ids alone
    sleeps: bool  # holds its device's memory until it is put to sleep, which one engine of a process can be
    needs_vllm: bool  # in this environment
    build: Callable[[TeacherContext], Teacher]

    def check(self) -> None:
        """Raise ConfigError when the engine is not installed here."""
        if self.needs_vllm:
            check_installed()


def _build_megatron(context: TeacherContext) -> Teacher:
    shared: dict[str, Any] = {"vocab_size": context.vocab_size, "temperature": context.temperature}
    if context.link is None:
        assert context.model is not None  # nobody else's, so it was loaded here
        return MegatronTeacher(context.model, context.student, **shared)
    assert context.split is not None
    hidden = HiddenKind(context.architecture.hidden_size, context.dtype)
    return RemoteTeacher(context.split, context.student, context.link, context.device, hidden=hidden, **shared)


def _build_recorded(context: TeacherContext) -> RecordedTeacher:
    assert context.section.recorded_from is not None
    return RecordedTeacher(context.section.recorded_from, context.student, context.device, facts=context.facts)


def _build_vllm(context: TeacherContext) -> VLLMTeacher:
    """Build a teacher that is an engine in this process."""
    section, gpu = context.section, context.device.type == "cuda"
    assert context.groups is not None  # config/sections.py sees to it
    engine = LocalEngine(
        section.model,
        context.groups,
        dtype=context.dtype,
        device=context.device,
        max_tokens=context.max_tokens,
        scoring=Scoring(top_k=context.top_k, vocab_size=context.architecture.vocab_size),
        options=engine_options(section.vllm, gpu=gpu)
        | ({"enable_sleep_mode": True} if gpu and section.vllm.sleep else {}),
    )
    return _vllm_teacher(context, LocalScorer(engine))


def _build_servers(context: TeacherContext) -> VLLMTeacher:
    """Build a teacher of servers to which every rank sends the packs assigned to it."""
    section = context.section
    needs: dict[str, Any] = {
        "dtype": str(context.dtype).removeprefix("torch."),
        "vocab_size": context.architecture.vocab_size,
        "max_model_len": context.max_tokens + 1,
        "max_logprobs": context.top_k,
    }
    weights = source_fingerprint(section.source)
    if weights is not None:  # weights that are not on this machine cannot be compared
        needs["weights"] = weights
    pool = open_pool(section.vllm_server, section="teacher.vllm_server", needs=needs)
    return _vllm_teacher(context, ServerScorer(pool, timeout_s=section.vllm_server.timeout_s))


def _vllm_teacher(context: TeacherContext, scorer: Scorer) -> VLLMTeacher:
    assert context.groups is not None  # config/sections.py sees to it
    return VLLMTeacher(
        scorer,
        context.groups,
        context.student,
        context.device,
        vocab_size=context.vocab_size,
        temperature=context.temperature,
        whole=context.section.whole_vocabulary,
    )


_RECORDED = TeacherEngineRow(
    scores_new=False,
    loads_model=False,
    among_several=False,
    hidden_states=True,
    exact_distribution=True,
    sleeps=False,
    needs_vllm=False,
    build=_build_recorded,
)
TEACHER_ENGINES: Mapping[str, TeacherEngineRow] = MappingProxyType(
    {
        "megatron": TeacherEngineRow(
            scores_new=True,
            loads_model=True,
            among_several=True,
            hidden_states=True,
            exact_distribution=True,
            sleeps=False,
            needs_vllm=False,
            build=_build_megatron,
        ),
        "vllm": TeacherEngineRow(
            scores_new=True,
            loads_model=False,
            among_several=False,
            hidden_states=False,
            exact_distribution=False,
            sleeps=True,
            needs_vllm=True,
            build=_build_vllm,
        ),
        "vllm_server": TeacherEngineRow(
            scores_new=True,
            loads_model=False,
            among_several=False,
            hidden_states=False,
            exact_distribution=False,
            sleeps=False,
            needs_vllm=False,
            build=_build_servers,
        ),
    }
)


def scoring_engine(section: TeacherConfig) -> TeacherEngineRow:
    """Return the row of who scores: a recording where the section names one, else the engine."""
    return TEACHER_ENGINES[section.engine] if section.recorded_from is None else _RECORDED
