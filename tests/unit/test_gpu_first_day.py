"""The first day on a GPU, as far as a machine without one can tell: its commands are right, its verdicts by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_tropd.benchmarks.device import PROBES, SIZES
from megatron_tropd.config.loading import load_config
from tests.support.distributed import run_on_ranks
from tests.support.run_inputs import ROOT


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_first_day", ROOT / "tools" / "gpu_first_day.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_first_day"] = module  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module


DAY = tool()
STEPS = {step.name: step for step in DAY.steps()}


@pytest.mark.parametrize("name", [name for name, step in STEPS.items() if "train" in step.argv])
def test_every_training_of_the_day_is_a_configuration_of_its_ranks(name: str):
    argv, config = STEPS[name].argv, ROOT / DAY.DEMO[0]
    overrides = [part.format(out="out") for part in argv[argv.index("train") + 2 :]]
    found = load_config(config, overrides, world_size=STEPS[name].gpus, check_paths=False)
    assert found.device == "cuda" and found.checkpoint.every == 1
    if name.endswith("resumed"):
        assert Path(str(found.checkpoint.resume)).name == "step-00000002"
        assert found.checkpoint.resume != str(found.run_dir / "checkpoints" / "step-00000002")


def test_every_probe_and_benchmark_of_the_day_is_there():
    for step in STEPS.values():
        if "megatron_tropd.benchmarks.device" in step.argv:
            assert step.argv[2] in PROBES
        if step.argv[0] == "-m" and step.argv[1].startswith("megatron_tropd."):
            assert importlib.util.find_spec(step.argv[1]) is not None


def test_the_loss_is_judged_by_its_budgets(tmp_path: Path):
    rows = [("fused", 12.6, 4), ("plain", 24.0, 100), ("products", 10.0, 0), ("liger", 12.0, 9)]
    results = [{"name": name, "seconds": seconds, "extra_bytes": size} for name, seconds, size in rows]
    (tmp_path / "loss.json").write_text(json.dumps({"results": results}))
    found = {verdict.what: (round(verdict.value, 3), verdict.kept) for verdict in DAY.judge_loss(tmp_path, "loss")}
    assert found == {
        "fused / products, time": (1.26, False),  # at most 1.25
        "fused / plain, extra memory": (0.04, True),  # at most 0.05
        "plain / fused, time": (1.905, False),  # at least 2
        "Liger / fused, time": (0.952, False),  # at least 1
    }


def test_publishing_is_judged_by_memorys_rate_and_a_wait_for_the_host_is_one_too_many(tmp_path: Path):
    copies = {"device to host, GB/s": 50.0, "device to a file in memory, GB/s": 10.0}
    for name, values in (("copies", copies), ("layers", {"waits for the host": 1.0, "waits at a.py:3": 1.0})):
        (tmp_path / f"probe-{name}.json").write_text(json.dumps({"figures": {name: values}}))
    kept = {v.what: v.kept for name in ("copies", "layers") for v in DAY.judge_figures(tmp_path, f"probe-{name}")}
    assert kept == {
        **dict.fromkeys(copies),
        "publishing / copying": False,
        "waits for the host": False,
        "waits at a.py:3": None,
    }


@pytest.mark.parametrize(
    ("code", "ended"), [("pass", "well"), ("raise SystemExit(7)", "with status 7"), ("input()", "not within 3 s")]
)
def test_a_step_that_fails_or_hangs_is_said_and_its_output_kept(code: str, ended: str, tmp_path: Path):
    hang = "import time; print('begun', flush=True); time.sleep(600)" if "input" in code else f"print('begun'); {code}"
    limit = 3.0 if "input" in code else 120.0
    found = DAY.run_step(DAY.FirstDayStep(name="x", why="", argv=("-c", hang), limit_s=limit), tmp_path)
    assert found["ended"] == ended
    assert (tmp_path / "x.log").exists()


def test_without_a_gpu_the_day_says_what_it_would_be_and_claims_nothing(capsys: pytest.CaptureFixture[str]):
    DAY.main(out=Path("nowhere"), only=None, dry_run=False)
    said = capsys.readouterr().out
    assert "No GPU here: nothing was run, and nothing is claimed." in said
    assert all(name in said for name in STEPS)


def probe(names: list[str]) -> dict[str, Any]:
    return {name: PROBES[name](torch.device("cpu"), SIZES["cpu"]) for name in names}


def test_the_probes_run_where_there_is_no_gpu_in_the_small():
    (found,) = run_on_ranks(probe, list(PROBES), world_size=1)
    assert set(found) == set(PROBES)
    assert all(value >= 0 for figures in found.values() for what, value in figures.items() if "decoding" not in what)
    assert found["layers"]["waits for the host"] == 0 and found["layers"]["forward and backward, ms"] > 0
