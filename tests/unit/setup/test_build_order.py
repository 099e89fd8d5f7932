"""What is offloaded has left the device before engines in these processes take their share of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import torch

from megatron_tropd.progress import phases
from megatron_tropd.setup import build


def test_the_trainer_makes_room_before_teacher_and_sampler_are_built(monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    note: Any = lambda name: lambda *args, **kwargs: order.append(name)  # noqa: E731
    names = "initialize_distributed build_world load_student load_teacher teacher_request optimize PromptStream Run"
    for name in (*names.split(), "shares_of", "output_weight_for"):
        monkeypatch.setattr(build, name, MagicMock())
    monkeypatch.setattr(build, "Trainer", lambda *args, **kwargs: SimpleNamespace(end_step=note("make room")))
    monkeypatch.setattr(build, "build_teacher", note("teacher"))
    monkeypatch.setattr(build, "build_sampler", note("sampler"))
    monkeypatch.setattr(build, "sections_of", lambda config: {})
    config = MagicMock(dtype="bf16")
    config.train.keep_logits_gb, config.teacher.moves = 0.0, False
    build.build_run(config, MagicMock(), known={})
    assert order == ["make room", "teacher", "sampler"]


def test_the_time_of_building_a_model_has_a_name(monkeypatch: pytest.MonkeyPatch):
    """A large one takes minutes before the first of its weights is read."""
    seen = []
    monkeypatch.setattr(build, "source_architecture", lambda source: None)
    monkeypatch.setattr(build, "open_weights", lambda source: None)
    monkeypatch.setattr(build, "check_weights", lambda *_: None)
    monkeypatch.setattr(build, "build_model", lambda *_, **__: seen.append([phase.what for phase in phases._running]))
    monkeypatch.setattr(build, "load_weights", lambda *_: seen.append([phase.what for phase in phases._running]))
    build.load_model(Path("unread"), cast(Any, None), dtype=torch.float32, device=torch.device("cpu"))
    assert seen == [["building the model"], []]
