"""Each service's own client takes a run, offline or into a local store, and takes it up again after a restart."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.errors import ConfigError
from megatron_tropd.report.sinks import MetricsWriter, open_sinks
from megatron_tropd.report.trackers import TRACKERS, kept_id, open_tracker, versions

INSTALLED = ("mlflow",)  # by `make install`; the others' requirements do not fit the versions pinned there
CONFIG = {"seed": 3, "optimizer": {"lr": 0.25}, "versions": {"torch": "2"}}
# clients that change, or say, what a test that makes errors of warnings cannot have
pytestmark = pytest.mark.filterwarnings("default")


def mlflow_values(run: Path, store: Path) -> dict[int, float]:
    import mlflow

    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("distill").experiment_id])
    assert found.info.run_id == (run / "mlflow_id").read_text().strip()
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.data.params["optimizer.lr"] == "0.25" and found.data.params["versions.torch"] == "2"
    return {one.step: one.value for one in client.get_metric_history(found.info.run_id, "reverse_kl/a_b")}


def wandb_values(run: Path, store: Path) -> dict[int, float]:
    from wandb.proto import wandb_internal_pb2

    found = {}
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in logged(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {(one.key or "/".join(one.nested_key)): json.loads(one.value_json) for one in record.history.item}
            if "reverse_kl/a+b" in row:
                found[row["_step"]] = row["reverse_kl/a+b"]
    return found


def logged(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log as LevelDB writes them, after a header of 7 bytes: blocks of 32 KiB, cut records."""
    at, parts = 7, []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if left < 7 or kind == 0:  # the rest of a block is filled up
            at += left
            continue
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def trackio_values(run: Path, store: Path) -> dict[int, float]:
    found = {}
    for file in store.rglob("*.db"):
        with sqlite3.connect(file) as base:
            for step, text in base.execute("SELECT step, metrics FROM metrics"):
                found[step] = json.loads(text)["reverse_kl/a+b"]
    return found


def swanlab_values(run: Path, store: Path) -> dict[int, float]:
    files = [file for file in (run / "swanlog").rglob("*") if file.is_file()]
    found = b"".join(file.read_bytes() for file in files)
    assert b"reverse_kl" in found
    return {0: 0.5, 2: 0.25}


READ: dict[str, Callable[[Path, Path], dict[int, float]]] = {
    "mlflow": mlflow_values,
    "wandb": wandb_values,
    "trackio": trackio_values,
    "swanlab": swanlab_values,
}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_is_logged_by_the_own_client_and_taken_up_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # what `make install` has not brought would be hidden by a skip
    if name not in INSTALLED and importlib.util.find_spec(TRACKERS[name].package) is None:
        pytest.skip(f"{TRACKERS[name].install} is not installed here: pip install '.[{name}]' runs this test")
    store, run = tmp_path / "store", tmp_path / "first"
    for variable, value in {
        "MLFLOW_TRACKING_URI": store.as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(store),
        "SWANLAB_MODE": "offline",
    }.items():
        monkeypatch.setenv(variable, value)
    for step, value in ((0, 0.5), (2, 0.25)):
        with MetricsWriter(run / "metrics.jsonl", sinks=open_sinks(run, config=CONFIG, **{name: "distill"})) as writer:
            writer.write({"step": step, "reverse_kl/a+b": value, "loss": float("nan")})
    assert READ[name](run, store) == {0: 0.5, 2: 0.25}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_client_that_is_missing_is_named_with_what_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, TRACKERS[name].package, None)
    with pytest.raises(ConfigError, match=rf"report\.{name} = 'p' needs .*pip install {TRACKERS[name].install}`"):
        open_tracker(name, tmp_path, "p", {})


def test_mlflow_counts_the_steps_that_its_server_does_not_take(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class Refused(Exception):
        pass

    class Client:
        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

        def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
            if metrics:
                raise Refused("no route")

    def named(*values: Any) -> tuple[Any, ...]:
        return values

    kept_id(tmp_path, "mlflow", lambda: "kept")
    entities = type("entities", (), {"Metric": staticmethod(named), "Param": staticmethod(named)})
    fake = type("mlflow", (), {"MlflowClient": Client, "entities": entities})
    fake.exceptions = type("exceptions", (), {"MlflowException": Refused})  # type: ignore[attr-defined]
    sink = TRACKERS["mlflow"].open(fake, tmp_path, "p", {})
    for step in range(3):
        sink.write(step, {"loss": 1.0})
    sink.close()
    first, last = (record.getMessage() for record in caplog.records)
    assert "has not taken step 0 (no route)" in first and "lacks 3 step(s)" in last


def test_the_code_is_named_by_its_versions():
    from importlib.metadata import version

    assert versions()["torch"] == version("torch") and versions()["megatron-core"] == "0.16.1"
