"""The types that ship with the package serve a program that uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.run_inputs import ROOT

PROGRAM = """
from collections.abc import Mapping

from megatron_tropd import Callbacks, Config, TrainingResult, evaluate, train


class Watch(Callbacks):
    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        print(step, metrics["loss"])


config = Config("my.yaml", "train.steps=6", run_dir="runs/mine")
result: TrainingResult = train(config, callbacks=Watch(), prompts=[{"prompt": "1 + 1 ="}])
accuracies: list[float] = [one.accuracy for one in evaluate(config, limit=5)]
"""
WRONG = """
train(config, callback=Watch())
evaluate(3)
Config("my.yaml", 7)
"""


def test_a_program_is_checked_by_mypy_and_its_mistakes_are_found(tmp_path: Path):
    (tmp_path / "program.py").write_text(PROGRAM + WRONG)
    first = len(PROGRAM.splitlines()) + 2
    # what the package imports is not looked into: this is about its own names
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nfollow_imports = silent\n"
        "[mypy-torch.*,transformers.*,numpy.*,megatron.*,pyarrow.*,rich.*,omegaconf.*,yaml.*,httpx2.*,jinja2.*]\n"
        "follow_imports = skip\nignore_missing_imports = True\n"
        "[mypy-megatron_tropd.train.session,megatron_tropd.commands.evaluate,megatron_tropd.losses.*]\n"
        "follow_imports = skip\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "program.py"]
    environment = {"MYPYPATH": str(ROOT), "PATH": "/usr/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    errors = [line.split(": error:")[0] for line in done.stdout.splitlines() if ": error:" in line]
    assert errors == [f"program.py:{line}" for line in (first, first + 1, first + 2)], done.stdout + done.stderr
