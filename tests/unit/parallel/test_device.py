"""Which device a rank takes, what is said when a machine's GPUs are left alone, and how ranks first meet."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_tropd.errors import ConfigError
from megatron_tropd.parallel import collectives, device, groups
from megatron_tropd.parallel.partition import PointToPoint


@pytest.fixture(autouse=True)
def look_again() -> Iterator[None]:
    """What was found on a posed machine is forgotten."""
    yield
    device.unused_gpus.cache_clear()


def pose_gpus(monkeypatch: pytest.MonkeyPatch, visible: int) -> None:
    """Let torch count so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    device.unused_gpus.cache_clear()


@pytest.mark.parametrize(
    ("visible", "local_rank", "found"),
    [(8, "0", "cuda:0"), (8, "7", "cuda:7"), (1, "0", "cuda:0"), (1, "3", "cuda:0"), (4, None, "cuda:0")],
)
def test_a_rank_takes_the_gpu_of_its_local_rank_or_the_only_one_it_is_shown(
    visible: int, local_rank: str | None, found: str, monkeypatch: pytest.MonkeyPatch
):
    pose_gpus(monkeypatch, visible)
    assert str(device.local_device({} if local_rank is None else {"LOCAL_RANK": local_rank})) == found


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    pose_gpus(monkeypatch, 2)
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=2, but this machine shows 2 GPUs.*at most 2 ranks"):
        device.local_device({"LOCAL_RANK": "2"})


@pytest.fixture
def with_a_gpu_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose driver has made the file of a GPU, while torch sees none."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    pose_gpus(monkeypatch, 0)
    monkeypatch.setattr(device, "_has_gpus", lambda has=device._has_gpus: has(tmp_path))


@pytest.mark.parametrize(
    ("build", "visible", "said"),
    [
        (None, None, r"training would run on the CPU: this machine has an NVIDIA GPU, but torch .* was built for CPUs"),
        ("13.0", "7", r"CUDA_VISIBLE_DEVICES='7' shows torch .* none"),
        ("13.0", None, r"torch .* \(CUDA 13.0\) sees none.*driver"),
    ],
)
@pytest.mark.usefixtures("with_a_gpu_file")
def test_a_gpu_that_torch_does_not_see_is_a_warning_with_its_cause(
    build: str | None, visible: str | None, said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.warns(UserWarning, match=said):
        assert device.local_device({"LOCAL_RANK": "0"}).type == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one rank of a machine says it
        device.local_device({"LOCAL_RANK": "1"})
    with pytest.raises(ConfigError, match=r"device=cuda, but .*Or set device=cpu"):
        device.use_device("cuda")


@pytest.mark.parametrize("hidden", ["", "-1"])
@pytest.mark.usefixtures("with_a_gpu_file")
def test_gpus_that_were_hidden_on_purpose_are_not_spoken_of(hidden: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert device.unused_gpus() == ""


def test_a_machine_without_gpus_is_none_that_has_them_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "nvidiactl").touch()  # the driver's control file is there without a GPU
    assert not device._has_gpus(tmp_path)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'No devices were found'\n")
    program.chmod(0o755)
    assert not device._has_gpus(tmp_path)
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    assert device._has_gpus(tmp_path)


def test_the_cpu_can_be_chosen_on_a_machine_with_gpus_unless_they_are_in_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    pose_gpus(monkeypatch, 0)
    device.use_device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    pose_gpus(monkeypatch, 2)
    device.use_device("auto")
    device.use_device("cuda")
    with pytest.raises(ConfigError, match="device=cpu, but CUDA is in use"):
        device.use_device("cpu")


def test_all_ranks_have_met_in_one_collective_before_some_of_them_exchange_messages(monkeypatch: pytest.MonkeyPatch):
    """NCCL would wait for those without a message, where theirs is the first use of the group."""
    calls: list[str] = []
    note: Any = lambda name: lambda *args, **kwargs: calls.append(name)  # noqa: E731
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", note("join"))
    monkeypatch.setattr(dist, "all_reduce", note("everyone"))
    monkeypatch.setattr(distributed_c10d, "_set_pg_timeout", note("timeout"))
    monkeypatch.setattr(dist, "batch_isend_irecv", note("some"))
    groups.initialize_distributed()
    PointToPoint().exchange([])()  # a rank without messages
    assert calls == ["join", "everyone", "timeout"]  # meeting may take as long as joining


def test_rows_on_a_gpu_are_reduced_and_scattered_in_one_collective(monkeypatch: pytest.MonkeyPatch):
    class OnGpu(torch.Tensor):
        @property
        def is_cuda(self) -> bool:  # type: ignore[override]
            return True

    shapes = []
    group: Any = object()
    # what torch calls a group of both backends, which is not the name of either
    monkeypatch.setattr(dist, "get_backend", lambda group: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(collectives, "group_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: pytest.fail("twice the bytes"))
    monkeypatch.setattr(
        collectives, "_reduce_scatter_single", lambda share, rows, **kwargs: shapes.append((share.shape, rows.shape))
    )
    collectives.reduce_scatter_rows(torch.ones(6, 5).as_subclass(OnGpu), group)
    assert shapes == [((3, 5), (6, 5))]


@pytest.mark.skipif(not hasattr(dist, "ProcessGroupGloo"), reason="torch without gloo")
def test_torch_still_names_a_group_by_all_of_its_backends():
    """The premise: the day it answers with one name, the predicate may be read off the group again."""
    assert str(dist.Backend("cpu:gloo,cuda:nccl")) != dist.Backend.NCCL


def test_half_an_installation_of_transformer_engine_is_none(tmp_path: Path):
    meta = tmp_path / "transformer_engine"
    meta.mkdir()
    (meta / "__init__.py").write_text(
        "raise RuntimeError('Found empty `transformer-engine` meta package installed.')\n"
    )
    (tmp_path / "transformer_engine-2.11.0.dist-info").mkdir()
    (tmp_path / "transformer_engine-2.11.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.11.0\n"
    )
    program = (
        "import megatron_tropd.parallel\n"
        "from megatron_tropd.parallel.te_package import te_fault\n"
        "try:\n    import transformer_engine\nexcept ImportError:\n    print(te_fault())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    said = "Transformer Engine 2.11.0 is an empty meta package here: its CUDA library is missing."
    assert ran.stdout == said + "\n", ran.stderr
    assert ran.stderr.count(f"{said} It is not used. Complete it (pip install --no-build-isolation") == 1


WHOLE = ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({}, "Transformer Engine is not installed."),
        ({"transformer-engine": "2.11.0"}, "is an empty meta package here: its CUDA library is missing."),
        (
            {"transformer-engine": "2.11.0", "transformer-engine-cu13": "2.11.0"},
            "has no extension for torch here: transformer-engine-torch is missing.",
        ),
        (
            {"transformer-engine": "2.11.0", "transformer-engine-cu13": "2.10.0", "transformer-engine-torch": "2.11.0"},
            "has parts of other versions: transformer-engine-cu13 2.10.0.",
        ),
        (
            dict.fromkeys(("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"), "2.8.0"),
            "2.8.0 is",
        ),
        (
            dict.fromkeys(("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"), "2.12.0"),
            "2.12.0 is",
        ),
        (dict.fromkeys(WHOLE, "2.8.0"), "2.8.0 is outside the versions 2.9 to <2.12"),
        (dict.fromkeys(WHOLE, "2.12.0"), "2.12.0 is outside the versions 2.9 to <2.12"),
        (dict.fromkeys(WHOLE, "2.11.0"), ""),
    ],
)
def test_each_fault_of_transformer_engine_is_one_sentence(
    installed: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
):
    from megatron_tropd.parallel import te_package

    monkeypatch.setattr(te_package, "_version", installed.get)
    monkeypatch.setattr(te_package, "_built_from_source", lambda: False)
    monkeypatch.setattr(te_package.importlib.util, "find_spec", lambda name: installed.get("transformer-engine"))
    assert said in te_package.te_fault() and bool(said) == bool(te_package.te_fault())
