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
evaluate(config, limit="five")
Config("my.yaml", 7)
"""


def test_a_program_is_checked_by_mypy_and_its_mistakes_are_found(tmp_path: Path):
    (tmp_path / "program.py").write_text(PROGRAM + WRONG)
    first = len(PROGRAM.splitlines()) + 2
    # nothing is looked into but the modules of these names: the package itself is checked elsewhere
    looked_into = ("megatron_tropd", "commands.api", "config.python", "train.callbacks", "report.records")
    homes = [name if name == "megatron_tropd" else f"megatron_tropd.{name}" for name in looked_into]
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\ndisallow_subclassing_any = False\nfollow_imports = skip\n"
        f"[mypy-{','.join(homes)},collections.*,typing.*,dataclasses.*,pathlib.*]\nfollow_imports = silent\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "program.py"]
    environment = {"MYPYPATH": str(ROOT), "PATH": "/usr/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    errors = [line.split(": error:")[0] for line in done.stdout.splitlines() if ": error:" in line]
    assert errors == [f"program.py:{line}" for line in (first, first + 1, first + 2)], done.stdout + done.stderr
