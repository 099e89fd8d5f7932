"""The rows of the engines that score: what each is built with, against the signatures of what it builds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from megatron_tropd.config.sections import TeacherConfig
from megatron_tropd.teacher.engines import registry
from megatron_tropd.teacher.engines.registry import TEACHER_ENGINES, TeacherContext, scoring_engine
from megatron_tropd.types import ModelSource

CPU = torch.device("cpu")
NOTHING: Any = SimpleNamespace()


def built(
    monkeypatch: pytest.MonkeyPatch, section: dict[str, Any], *stands_in: str, **parts: Any
) -> tuple[Any, TeacherContext]:
    """Builds the engine, with autospecs (which refuse calls that the real ones would) in the place of what is named."""
    made = SimpleNamespace()
    for what in stands_in:
        setattr(made, what, create_autospec(getattr(registry, what)))
        monkeypatch.setattr(registry, what, getattr(made, what))
    whole = TeacherConfig.model_validate({"model": "teacher", **section})
    architecture: Any = SimpleNamespace(vocab_size=211, hidden_size=44)
    given: dict[str, Any] = {
        "section": whole,
        "architecture": architecture,
        "student": SimpleNamespace(),
        "dtype": torch.float32,
        "device": CPU,
        "vocab_size": 199,
        "temperature": 0.9,
        "max_tokens": 97,
        "top_k": 7,
        "groups": SimpleNamespace(),
        **parts,
    }
    context = TeacherContext(**given)
    scoring_engine(whole).build(context)
    return made, context


def test_a_teacher_over_the_student_s_ranks_is_the_model_that_was_loaded(monkeypatch: pytest.MonkeyPatch):
    made, context = built(monkeypatch, {}, "MegatronTeacher", model=NOTHING)
    call = made.MegatronTeacher.call_args
    assert call.args == (NOTHING, context.student)
    assert call.kwargs == {"vocab_size": 199, "temperature": 0.9}


def test_a_teacher_with_ranks_of_its_own_is_spoken_to_over_the_link(monkeypatch: pytest.MonkeyPatch):
    link, split = SimpleNamespace(), SimpleNamespace()
    made, context = built(monkeypatch, {"ranks": 1}, "RemoteTeacher", link=link, split=split, groups=None)
    call = made.RemoteTeacher.call_args
    assert call.args == (split, context.student, link, CPU)
    assert call.kwargs["hidden"].size == 44 and call.kwargs["vocab_size"] == 199


def test_an_engine_in_process_is_made_for_the_alternatives_that_the_method_needs(monkeypatch: pytest.MonkeyPatch):
    section = {"engine": "vllm", "whole_vocabulary": True, "vllm": {"max_sequences": 3, "cache_mib": 7}}
    made, context = built(monkeypatch, section, "LocalEngine", "LocalScorer", "VLLMTeacher")
    given = made.LocalEngine.call_args.kwargs
    assert (given["scoring"].top_k, given["scoring"].vocab_size, given["max_tokens"]) == (7, 211, 97)
    assert given["options"] == {"max_num_seqs": 3, "kv_cache_memory_bytes": 7 * 2**20}
    call = made.VLLMTeacher.call_args
    assert call.args == (made.LocalScorer.return_value, context.groups, context.student, CPU)
    assert call.kwargs == {"vocab_size": 199, "temperature": 0.9, "whole": True}


@pytest.mark.parametrize(("fingerprint", "more"), [("f00", {"weights": "f00"}), (None, {})])
def test_servers_must_have_the_teacher_s_weights_where_these_can_be_told(
    monkeypatch: pytest.MonkeyPatch, fingerprint: str | None, more: dict[str, str]
):
    teacher = ModelSource(Path("teacher"))
    monkeypatch.setattr(registry, "source_fingerprint", lambda source: fingerprint if source == teacher else "?")
    section = {"engine": "vllm_server", "vllm_server": {"urls": ["http://127.0.0.1:8100"], "timeout_s": 13.0}}
    made, _ = built(monkeypatch, section, "open_pool", "ServerScorer", "VLLMTeacher")
    needs = {"dtype": "float32", "vocab_size": 211, "max_model_len": 98, "max_logprobs": 7, **more}
    assert made.open_pool.call_args.kwargs["needs"] == needs
    assert made.ServerScorer.call_args.kwargs == {"timeout_s": 13.0}
    assert made.VLLMTeacher.call_args.kwargs["whole"] is False


@pytest.mark.parametrize("engine", TEACHER_ENGINES)
def test_a_recording_stands_in_for_any_engine_and_scores_nothing_new(monkeypatch: pytest.MonkeyPatch, engine: str):
    section = {"engine": engine, "recorded_from": "there", "vllm_server": {"urls": ["http://127.0.0.1:8100"]}}
    made, context = built(monkeypatch, section, "RecordedTeacher", facts={"vocab_size": 199})
    call = made.RecordedTeacher.call_args
    assert call.args == (Path("there"), context.student, CPU) and call.kwargs == {"facts": {"vocab_size": 199}}
    assert not scoring_engine(context.section).scores_new and TEACHER_ENGINES[engine].scores_new
