"""The demo fits the machine it is tried on."""

from __future__ import annotations

import pytest
import torch

from megatron_tropd.commands.demo import ranks_for


@pytest.mark.parametrize(
    ("gpus", "overrides", "ranks"), [(0, [], 2), (1, [], 1), (2, [], 2), (8, [], 2), (1, ["device=cpu"], 2)]
)
def test_the_demo_starts_no_more_ranks_than_there_are_gpus(
    gpus: int, overrides: list[str], ranks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert ranks_for(2, overrides) == ranks
    said = "1 GPU(s) here: the demo runs on 1 rank(s) instead of 2\n"
    assert capsys.readouterr().out == (said if ranks == 1 else "")
