"""The benchmarks measure what they say: parts add up, collectives are all counted, every figure reaches the JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_tropd.benchmarks import against, loss, step, vllm
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.types import Architecture
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


def test_a_turn_beside_trl_is_the_differences_of_its_marks_without_warm_up_by_hand(tmp_path: Path) -> None:
    first = {"marks": [[0.0, 9.0], [50.0, 10.0], [52.0, 11.0], [55.0, 13.0]], "peak": 2**20}
    second = {"marks": [[1.0, 3.0], [51.0, 4.0], [53.0, 4.5], [56.0, 5.5]], "peak": 3 * 2**20}
    parts = [{"rollout": 9.0, "teacher": 9.0}, {"rollout": 1.0, "teacher": 0.5}, {"rollout": 1.5, "teacher": 0.25}]
    for rank, found in enumerate((first | {"tokens": [7, 100, 120], "parts": parts}, second)):
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps(found))
    turn = against.steps_of(tmp_path, warmup=1)
    assert (turn.seconds, turn.processor_seconds, turn.tokens) == ([2.0, 3.0], [1.5, 3.0], [100, 120])
    assert turn.parts == parts[1:] and turn.peak_bytes == 3 * 2**20
    assert turn.tokens_per_second == (100 / 2 + 120 / 3) / 2
    assert turn.processor_milliseconds_per_token == pytest.approx(1e3 * (1.5 / 100 + 3 / 120) / 2)
    rows = [{"tokens": 5.0, "time_rollout": 0.25, "time_teacher": 0.125, "time_train": 1.0}] * 3
    assert against.steps_of(tmp_path, warmup=1, metrics=rows).parts == [{"rollout": 0.25, "teacher": 0.125}] * 2
    both = against.joined([turn, turn])
    assert both.seconds == [2.0, 3.0, 2.0, 3.0] and both.peak_bytes == 3 * 2**20

    comparison = against.Comparison(found={"one": turn}, floors={"one": 0.75}, rate=8e10)
    cells = [next(iter(column.cells)) for column in against.table_of(comparison).columns]
    # seconds, rollout, teacher, the rest, tokens/s, processor seconds and milliseconds a token, floor, MiB
    assert cells == ["one", "2.500", "1.250", "0.375", "0.875", "45", "2.250", "20.000", "0.750", "3"]


def model(**sizes: int) -> Architecture:
    shape = {"num_layers": 3, "hidden_size": 8, "ffn_size": 20, "num_heads": 4, "num_kv_heads": 2, "head_dim": 5}
    fixed = {"family": "x", "vocab_size": 11, "max_positions": 64, "rope_theta": 1e4, "norm_eps": 1e-6}
    return Architecture(**(shape | fixed | sizes), tied_embeddings=True)  # type: ignore[arg-type]


def test_the_products_of_a_step_are_counted_by_hand() -> None:
    # a layer: queries 20, keys 10 and values 10 from 8; 20 back to 8; three matrices of 8 x 20
    layer = 8 * 20 + 2 * 8 * 10 + 20 * 8 + 3 * 8 * 20
    assert against.products_per_token(model()) == (3 * layer, 11 * 8)
    two = against.products_per_token(model(num_experts=4, experts_per_token=2))
    assert two == (3 * (layer + 3 * 8 * 20 + 8 * 4), 11 * 8)
    # student: sampled, forward and two backward products; teacher: forward. Outputs of 6 response tokens alone
    small = against.products_per_token(model(num_layers=1))
    expected = 2 * 4 * (3 * layer * 10 + 88 * 6) + 2 * (small[0] * 10 + 88 * 6)
    assert against.floor_operations(model(), model(num_layers=1), prompt=4, response=6) == expected


def test_a_comparison_says_what_it_lacks(tmp_path: Path) -> None:
    options = {"python": tmp_path / "python", "rounds": 1, "steps": 3, "warmup": 1}
    with pytest.raises(ConfigError, match="=tropd, but TRL learns the reverse KL"):
        against.compare(step._DEMO, [], **options)
    with pytest.raises(ConfigError, match="Say `make bench-trl`"):
        against.compare(step._DEMO, ["method.name=rkl"], **options)
    with pytest.raises(ConfigError, match="only trl can be compared with"):
        step.main(against="verl")
    with pytest.raises(ConfigError, match="Leave them out"):
        step.main(against="trl", processes=4)
