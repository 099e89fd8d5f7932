"""Which device this process computes on, and what is said when a machine's GPUs are left alone."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_tropd.errors import ConfigError

_DEVICE_FILES = "nvidia[0-9]*"  # the driver makes one for every GPU
_NVIDIA_SMI_S = 20.0


def use_device(wanted: str) -> None:
    """Decide for the whole process, before anything has looked at CUDA: ``auto``, ``cuda`` or ``cpu``.

    Raises:
        ConfigError: the device is not to be had.
    """
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if torch.cuda.is_available():
            raise ConfigError(
                "device=cpu, but CUDA is in use in this process already. Start it with CUDA_VISIBLE_DEVICES= (empty)."
            )
    elif wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device=cuda, but {_why_no_cuda()} Or set device=cpu.")


def local_device(environment: Mapping[str, str]) -> torch.device:
    """Return this rank's device, by ``LOCAL_RANK``: a launcher may also have given each rank one GPU to see.

    Raises:
        ConfigError: there are more ranks on this machine than GPUs.
    """
    if not torch.cuda.is_available():
        warn_of_unused_gpus(first=environment.get("LOCAL_RANK", "0") == "0")
        return torch.device("cpu")
    local, visible = int(environment.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if visible == 1:  # several ranks that share it are refused by NCCL, and named by `tropd health`
        return torch.device("cuda", 0)
    if local >= visible:
        raise ConfigError(
            f"LOCAL_RANK={local}, but this machine shows {visible} GPUs: every rank needs its own. Start at most "
            f"{visible} ranks here, or set device=cpu."
        )
    return torch.device("cuda", local)


def device_id(device: torch.device) -> str:
    """Return what tells a GPU from all others; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def warn_of_unused_gpus(*, first: bool = True) -> None:
    """Warn when the CPU is about to be used on a machine with GPUs, unless they were hidden on purpose."""
    if first and (said := unused_gpus()):
        warnings.warn(f"training would run on the CPU: {said}", stacklevel=3)


@functools.cache
def unused_gpus() -> str:
    """Say in a sentence why torch sees none of this machine's GPUs; empty where it has none, or they are hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return "" if hidden or not _has_gpus() else f"this machine has an NVIDIA GPU, but {_why_no_cuda()}"


def _has_gpus(devices: Path = Path("/dev")) -> bool:
    if any(devices.glob(_DEVICE_FILES)):
        return True
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        listed = subprocess.run(
            [program, "-L"],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=_NVIDIA_SMI_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.stdout.startswith("GPU ")


def _why_no_cuda() -> str:
    build = torch.__version__
    if torch.version.cuda is None:
        return f"torch {build} here was built for CPUs. Install a CUDA build (`make install-gpu`)."
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r} shows torch {build} none. Unset it, or name a GPU that is there."
    return (
        f"torch {build} (CUDA {torch.version.cuda}) sees none. See whether `nvidia-smi` lists one, and whether its "
        "driver is new enough for that CUDA."
    )


def memory_bytes(device: torch.device, environment: Mapping[str, str]) -> int:
    """Return the memory of this rank's device; of a CPU, this rank's share of what its container or machine has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit
            total = min(total, int(Path(path).read_text()))
    return total // int(environment.get("LOCAL_WORLD_SIZE", environment.get("WORLD_SIZE", "1")))


# of a container, by the second and the first version of the kernel's interface
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
