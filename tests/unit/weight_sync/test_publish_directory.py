"""Published weights are gone when their process is, and nothing else is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tropd.weight_sync.publish_directory import PREFIX, PublishDirectory, remove_abandoned

ROOT = Path(__file__).resolve().parents[3]
TAKES = """
import sys, time
from pathlib import Path
from megatron_tropd.parallel.leaving import leave
from megatron_tropd.weight_sync.publish_directory import PublishDirectory
place = PublishDirectory(Path(sys.argv[1]))
(place.path / "version-1").mkdir()
(place.path / "version-1" / "00000.safetensors").write_bytes(b"weights")
print(place.path, flush=True)
"""


def process(parent: Path, end: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TAKES + end, str(parent)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    ("end", "status"),
    [("", 0), ("leave(75)", 75), ("raise KeyboardInterrupt", 130), ("raise ValueError", 1)],
    ids=["ends", "leaves", "is interrupted", "fails"],
)
def test_weights_are_gone_with_the_process_that_published_them(tmp_path: Path, end: str, status: int):
    bystander = tmp_path / "mine.safetensors"
    bystander.write_bytes(b"mine")
    started = process(tmp_path, end)
    out, _ = started.communicate(timeout=120)
    assert out.startswith(str(tmp_path)) and started.returncode in (status, -signal.SIGINT)
    assert list(tmp_path.iterdir()) == [bystander] and bystander.read_bytes() == b"mine"


def test_the_next_run_removes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path: Path):
    killed, living = (process(tmp_path, "time.sleep(300)") for _ in range(2))
    try:
        left, used = (Path(p.stdout.readline().strip()) for p in (killed, living))  # type: ignore[union-attr]
        killed.kill()
        killed.wait(timeout=60)
        users = tmp_path / f"{PREFIX}-{os.getuid()}-999999"  # of this name, but without our lock: not ours to judge
        users.mkdir()
        PublishDirectory(tmp_path).close()
        assert remove_abandoned(tmp_path) == []
        assert not left.exists() and (used / "version-1" / "00000.safetensors").exists() and users.is_dir()
    finally:
        for started in (killed, living):
            started.kill()
            started.communicate(timeout=60)


def test_older_versions_are_dropped_and_closing_twice_is_fine(tmp_path: Path):
    place = PublishDirectory(tmp_path)
    for version in ("version-1", "version-2"):
        (place.path / version).mkdir()
    place.drop_all_but(place.path / "version-2")
    assert [path.name for path in place.path.iterdir() if path.is_dir()] == ["version-2"]
    place.close()
    place.close()
    assert list(tmp_path.iterdir()) == []
