"""The benchmarks measure what they say: parts add up, collectives are all counted, every figure reaches the JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_tropd.benchmarks import loss, step, vllm
from megatron_tropd.errors import DataError
from tests.support.run_inputs import make_task


def row(**times: float) -> dict[str, float]:
    return {"tokens": 100.0} | {f"time_{name}": seconds for name, seconds in times.items()}


def test_parts_of_a_step_are_means_without_the_warm_up_by_hand() -> None:
    slow = row(step=99.0, rollout=90.0, train=9.0, optimizer=1.0)
    one = row(step=10.0, rollout=4.0, teacher=1.0, train=4.0, optimizer=1.0, pack=0.25, publish=0.5, other=0.25)
    two = row(step=30.0, rollout=14.0, teacher=3.0, train=12.0, optimizer=3.0, pack=0.25, publish=0.5, other=0.25)
    found = step.breakdown([slow, one, two], warmup=1)
    assert (found.steps, found.step, found.tokens_per_second) == (2, 20.0, 5.0)
    assert found.parts == {
        "rollout": 9.0,
        "student": 0.0,
        "teacher": 2.0,
        "forward and backward": 6.0,
        "optimizer": 2.0,
        "pack": 0.25,
        "publish": 0.5,
        "other": 0.25,
    }
    assert found.overhead == 1.0 / 20.0
    with pytest.raises(DataError, match="3 steps were measured and 3 are left out"):
        step.breakdown([slow, one, two], warmup=3)


def test_a_measured_step_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    task, out = make_task(tmp_path), tmp_path / "step.json"
    command = ["--config", str(task.config), "--processes", "1", "--steps", "2", "--warmup", "1", "--json", str(out)]

    app = typer.Typer()
    app.command()(step.main)
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(out.read_text())
    assert found["steps"] == 2 and all(found["parts"][name] > 0.0 for name in ("rollout", "teacher", "optimizer"))
    assert sum(found["parts"].values()) == pytest.approx(found["step"], rel=1e-6)
    assert "overhead" in outcome.output and 0.0 < found["overhead"] < 1.0


def test_the_loss_hands_in_three_floats_and_k_per_token_forward_and_nothing_backward() -> None:
    shape = loss.Shape(tokens=6, hidden=4, vocab=32, candidates=5)
    found = loss.traffic(shape, entropy=True)
    assert sorted(size for _, size in found["forward"]) == [3 * 4, 5 * 4]
    assert found["backward"] == []


def test_the_loss_benchmark_writes_every_variant(tmp_path: Path) -> None:
    out = tmp_path / "loss.json"
    loss.main(tokens=9, hidden=8, vocab=70, candidates=3, repeats=1, keep_gb=0.001, json_path=out)
    written = json.loads(out.read_text())
    assert {row["name"] for row in written["results"]} == {"fused", "plain", "products", "kept"}
    assert all(row["seconds"] > 0.0 for row in written["results"])
    assert written["settings"]["kernels"] is False


def test_rates_of_vllm_are_shown_beside_the_memory_copy() -> None:
    copy = vllm.Figure(what="memory copy", seconds=0.5, amount=2e9, unit="bytes")
    sent = vllm.Figure(what="sent", seconds=2.0, amount=1e9, unit="bytes")
    drawn = vllm.Figure(what="drawn", seconds=0.25, amount=512, unit="tokens")
    columns = [list(column.cells) for column in vllm.table([copy, sent, drawn]).columns]
    assert columns[3:] == [["4,000 MB", "500 MB", "2,048 tokens"], ["100.0%", "12.5%", "-"]]
