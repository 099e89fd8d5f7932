"""What is offloaded has left the device before engines in these processes take their share of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

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
