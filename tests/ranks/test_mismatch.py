"""A sampler whose log-probs are not the trainer's: measured by position, corrected for, and warned of."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_tropd.losses.logprob_mismatch import BUCKETS, bucket_of
from megatron_tropd.rollout.mismatch import WARN_EVERY, MismatchMonitor
from megatron_tropd.types import Region
from tests.support.run_inputs import Outcome, Task, commands, make_task, steady_metrics

OFF = (0.3, 1.2)  # nats, before and from position 64 on
TOKENS = 31


def test_buckets_of_positions():
    positions = torch.tensor([0, 63, 64, 255, 256, 1023, 1024, 4095, 4096, 16383, 16384, 10**6])
    assert bucket_of(positions).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert BUCKETS == ("0-63", "64-255", "256-1023", "1024-4095", "4096-16383", "16384+")


def row(step: int, mean: float, largest: float = 0.5, **buckets: float) -> dict[str, float]:
    named = {f"logprob_gap_mean/{name[1:].replace('_', '-')}": value for name, value in buckets.items()}
    return {"step": step, "logprob_gap_mean": mean, "logprob_gap_max": largest, **named}


def test_a_warning_past_the_threshold_once_in_so_many_steps(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    watch = MismatchMonitor("fp32", None)
    watch.check(row(1, 9e-4))
    watch.check({"step": 2})  # a step without tokens of its own
    assert not caplog.records
    for step in range(3, 3 + WARN_EVERY + 1):
        watch.check(row(step, 2e-3))
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 3", f"step {3 + WARN_EVERY}"]
    assert "differ by 2.0e-03 nats on average, at most 5.0e-01 (rollout.gap_warning allows 1e-03)" in caplog.text
    assert "quantization" in caplog.text and "method.mismatch=truncate" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "found", "said"),
    [
        ("bf16", row(1, 0.2), "bf16 itself"),
        ("fp32", row(1, 0.2, _0_63=0.1, _64_255=0.2, _256_1023=0.31), "it grows along the sequence"),
        ("fp32", row(1, 0.02, largest=4.0), "it is large on few tokens"),
        ("fp32", row(1, float("nan")), "differ by nan nats"),
    ],
)
def test_the_warning_names_what_the_figures_point_to(caplog: pytest.LogCaptureFixture, dtype, found, said):
    MismatchMonitor("fp32", 0.01).check(row(1, 0.2, _0_63=0.2, _64_255=0.2))
    assert said not in caplog.text
    MismatchMonitor(dtype, 0.01).check(found)
    assert said in caplog.text


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


def train(task: Task, run_dir: Path, *settings: str) -> Outcome:
    common = ("rollout.guided_per_prompt=0", f"rollout.max_new_tokens={TOKENS}")
    short = ("train.steps=1", "optimizer.warmup_steps=0")
    quiet = ("evaluate.prompts=null", "report.samples=0", "report.html=false", "checkpoint.every=0")
    outcome = commands().run("train", task.config, f"run_dir={run_dir}", *common, *short, *quiet, *settings)
    return outcome.expect_success()


def test_a_run_measures_the_gap_by_position_and_corrects_for_it(task: Task, tmp_path: Path):
    """What a sampler says of its tokens is changed by known amounts: so is what the trainer makes of them."""
    recording = tmp_path / "rollouts" / "step-00000000.npz"
    train(task, tmp_path / "live", f"rollout.record={recording.parent}")
    arrays = dict(np.load(recording))
    regions = np.split(arrays["regions"], np.cumsum(arrays["lengths"])[:-1])
    late = np.concatenate([np.flatnonzero(region_L == Region.CONTINUATION) - 1 >= 64 for region_L in regions])
    assert 10 < late.sum() < len(late) - 10, "positions on both sides of a bucket's end"
    arrays["model_logprob"] = (arrays["model_logprob"] - np.where(late, OFF[1], OFF[0])).astype(np.float32)
    np.savez(recording, **arrays)

    replayed = ("rollout.engine=recorded", f"rollout.recorded_from={recording.parent}")
    losses = {}
    for kind in ("none", "mask", "truncate"):
        outcome = train(task, tmp_path / kind, *replayed, f"method.mismatch={kind}")
        (found,) = steady_metrics(tmp_path / kind)
        losses[kind] = found["loss"]
        assert found["logprob_gap_mean/0-63"] == pytest.approx(OFF[0], abs=1e-4)
        assert found["logprob_gap_mean/64-255"] == pytest.approx(OFF[1], abs=1e-4)
        assert found["logprob_gap_mean"] == pytest.approx(np.where(late, OFF[1], OFF[0]).mean(), abs=1e-4)
        assert found["logprob_gap_max"] == pytest.approx(OFF[1], abs=1e-4)
        assert not any(name.startswith("logprob_gap_mean/256") for name in found)
        assert outcome.output.count("Likely causes: it grows along the sequence") == 1
    # ratios exp(0.3) and exp(1.2) = 3.3 to a cap of 2: mask keeps the early tokens alone, truncate weighs by 1.35 and 2
    early = losses["mask"]
    assert abs(early) > 1e-2 and abs(losses["none"] - early) > 1e-2
    assert losses["truncate"] == pytest.approx(np.exp(OFF[0]) * early + 2.0 * (losses["none"] - early), rel=1e-4)


def test_a_sampler_that_agrees_is_not_warned_of(task: Task, tmp_path: Path):
    assert "Likely causes" not in train(task, tmp_path / "run").output
