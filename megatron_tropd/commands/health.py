"""Check in seconds whether machines are fit to train on: devices, versions, collectives, the shared file system.

``tropd health``, under the launcher that will start the training. Little of the package is needed, so that what a
broken installation breaks is not this: the rest is imported as one of the checks. Ranks exchange words by the store
they meet at, as JSON, before any collective is tried: a rank that is missing or unfit is named instead of waited for.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
import shutil
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_tropd.errors import ConfigError, HealthError
from megatron_tropd.parallel.device import device_id, local_device, unused_gpus
from megatron_tropd.report.terminal import literal

_TRAINER = "megatron_tropd.train.session"
_PACKAGES = ("torch", "megatron-core", "megatron-tropd")
_MATRIX = {"cpu": 512, "cuda": 8192}  # a product of milliseconds
_MESSAGE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
# a GPU this much slower than the median holds all the others up; CPUs are shared too often to judge
_SLOW = 0.7
_SHARED_WAIT_S = 10.0  # network file systems may show a new file late
# the first rank waits its whole time for the others before it answers them, and they may have come before it
_VERDICT_WAITS = 2
_VERDICT_MARGIN_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitness:
    """The facts that one rank found out about itself."""

    rank: int
    host: str
    device: str
    memory_bytes: int
    tflops: float  # of a square matrix product
    versions: dict[str, str]
    problems: list[str]  # empty when it is fit
    gpu: str = ""  # what tells its GPU from all others; empty for a CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """The facts that all ranks found out together."""

    latency_s: float  # of an all-reduce of one number
    bus_bytes_per_s: float  # of a large one: 2 (n - 1) / n of its bytes cross every rank's link


@dataclass(frozen=True, slots=True)
class _Meeting:
    """The place where ranks leave word for each other."""

    store: dist.Store
    rank: int
    world: int
    timeout_s: float

    def tell(self, topic: str, word: Any) -> None:
        self.store.set(f"{topic}/{self.rank}", json.dumps(word))

    def hear(self, topic: str, rank: int) -> Any:
        """Return what ``rank`` reported; None when it has not within the time."""
        try:
            self.store.wait([f"{topic}/{rank}"], timedelta(seconds=self.timeout_s))
        except (dist.DistStoreError, RuntimeError):
            return None
        return json.loads(self.store.get(f"{topic}/{rank}"))

    def hear_all(self, topic: str, ranks: Sequence[int] | None = None) -> list[Any]:
        """Return what every rank (of ``ranks``) reported, None for one that has not; together they have one's time."""
        deadline = time.monotonic() + self.timeout_s
        return [
            _Meeting(self.store, self.rank, self.world, max(deadline - time.monotonic(), 0.01)).hear(topic, rank)
            for rank in (range(self.world) if ranks is None else ranks)
        ]

    def hear_verdict(self, topic: str) -> Any:
        """Return what the first rank made of all reports; None when it has not, long after it should have."""
        patient_s = _VERDICT_WAITS * self.timeout_s + _VERDICT_MARGIN_S
        return _Meeting(self.store, self.rank, self.world, patient_s).hear(topic, 0)


def check_health(*, gpus: int | None = None, shared: Path | None = None, timeout_s: float = 120.0) -> list[str]:
    """Check every rank alone, then all of them together; the first prints a table. Collective.

    Args:
        gpus: so many GPUs the ranks of every machine must have between them; None: any number.
        shared: a directory that all ranks should see, such as that of the runs.
        timeout_s: how long ranks wait for one another.

    Returns:
        Everything that is wrong, with host and rank; the same on every rank. Empty when all is well.

    Raises:
        HealthError: the ranks cannot meet at all.
    """
    meeting = _meet(timeout_s)
    problems, facts = _agree_alone(meeting, gpus)
    if not problems:
        problems, fabric = _try_together(meeting, facts, shared)
        if meeting.rank == 0:
            Console().print(_table(facts, fabric))
            _print_accelerators()
    # the first keeps the store: it leaves last, after all that had come
    meeting.tell("done", True)
    if meeting.rank == 0:
        meeting.hear_all("done", [fact.rank for fact in facts])
    return problems


def _meet(timeout_s: float) -> _Meeting:
    if "RANK" not in os.environ:
        return _Meeting(dist.HashStore(), 0, 1, timeout_s)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        limit = timedelta(seconds=timeout_s)
        store = dist.TCPStore(address, port, world, is_master=keeps, timeout=limit, wait_for_workers=False)
    except dist.DistNetworkError as error:
        raise HealthError(
            f"{socket.gethostname()} cannot reach the first rank at {address}:{port}: {str(error).splitlines()[0]} "
            "Check that the name resolves and that no firewall is between; MASTER_ADDR may be an address."
        ) from error
    return _Meeting(dist.PrefixStore("health", store), rank, world, timeout_s)


# --------------------------------------------------------------------------- alone


def _agree_alone(meeting: _Meeting, gpus: int | None) -> tuple[list[str], list[Fitness]]:
    """Return what is wrong with single ranks, on every rank, and what they are (on the first only)."""
    meeting.tell("fitness", asdict(_examine(meeting.rank)))
    facts: list[Fitness] = []
    if meeting.rank == 0:
        reported = meeting.hear_all("fitness")
        missing = [rank for rank, word in enumerate(reported) if word is None]
        facts = [Fitness(**word) for word in reported if word is not None]
        found = [*_absence(missing, facts, meeting), *_problems_of(facts), *_gpu_problems(facts, gpus)]
        meeting.tell("alone", found)
    verdict = meeting.hear_verdict("alone")
    return (["the first rank has not answered"] if verdict is None else verdict), facts


def _absence(missing: Sequence[int], facts: Sequence[Fitness], meeting: _Meeting) -> list[str]:
    if not missing:
        return []
    hosts = ", ".join(sorted({fact.host for fact in facts}))
    return [
        f"rank(s) {', '.join(map(str, missing))} of {meeting.world} have not come within {meeting.timeout_s:g} s; "
        f"those that have are on {hosts}. Look at the machines that are not among them."
    ]


def _examine(rank: int) -> Fitness:
    """Examine this rank's own device."""
    problems, gpu = _import_trainer(), ""
    device, name, memory, tflops = torch.device("cpu"), "cpu", _ram_bytes(), 0.0
    if (unused := unused_gpus()) and not torch.cuda.is_available():
        problems.append(f"the CPU would be used: {unused}")
    try:
        if torch.cuda.is_available():
            device = local_device(os.environ)
            torch.cuda.set_device(device)
            name, memory, gpu = (
                torch.cuda.get_device_name(device),
                torch.cuda.mem_get_info(device)[1],
                device_id(device),
            )
        tflops = _product(device)
    except (RuntimeError, ConfigError) as error:  # of a device that is not there, is broken, or gets its sums wrong
        problems.append(str(error).splitlines()[0])
    return Fitness(
        rank=rank,
        host=socket.gethostname(),
        device=name,
        memory_bytes=memory,
        tflops=tflops,
        versions={package: _version(package) for package in _PACKAGES},
        problems=problems,
        gpu=gpu,
    )


def _import_trainer() -> list[str]:
    """Import what ``tropd train`` does: a package that is there by half raises anything."""
    try:
        importlib.import_module(_TRAINER)
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        return [f"the trainer cannot be imported: {type(error).__name__}: {said[0]}"]
    return []


def _ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _product(device: torch.device) -> float:
    """Measure the TFLOP/s of a bf16 (CPU: fp32) product whose result is known: n rows of ones add up to n."""
    size = _MATRIX[device.type]
    ones = torch.ones(size, size, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        product = ones @ ones
        wrong = int((product != size).sum())  # waits for the device
        best = min(best, time.perf_counter() - started)
        if wrong:
            raise RuntimeError(f"{wrong} of {size * size} elements of a matrix product are wrong")
    return 2 * size**3 / best / 1e12


def _problems_of(facts: Sequence[Fitness]) -> list[str]:
    """List what is wrong with a rank, or with one beside the others."""
    problems = [f"{_name(fact)}: {problem}" for fact in facts for problem in fact.problems]
    for package in _PACKAGES:
        versions = {fact.versions[package] for fact in facts}
        if len(versions) > 1:
            hosts = {v: sorted({fact.host for fact in facts if fact.versions[package] == v}) for v in sorted(versions)}
            where = "; ".join(f"{v} on {', '.join(names)}" for v, names in hosts.items())
            problems.append(f"{package} is not the same everywhere: {where}")
    kinds = sorted({fact.device for fact in facts})
    if len(kinds) > 1:
        problems.append(f"devices differ: {', '.join(kinds)}")
    usual = statistics.median(fact.tflops for fact in facts)
    problems += [
        f"{_name(fact)}: {fact.tflops:.0f} TFLOP/s, where the median is {usual:.0f}"
        for fact in facts
        if fact.device != "cpu" and not fact.problems and fact.tflops < _SLOW * usual
    ]
    return problems


def _gpu_problems(facts: Sequence[Fitness], wanted: int | None) -> list[str]:
    """List the machines whose ranks share a GPU, or have others than the wanted number of them."""
    problems = []
    for host in dict.fromkeys(fact.host for fact in facts):
        here = [fact for fact in facts if fact.host == host and fact.gpu]
        used = {fact.gpu: [other.rank for other in here if other.gpu == fact.gpu] for fact in here}
        problems += [
            f"ranks {', '.join(map(str, ranks))} on {host} share one GPU: each needs its own"
            for ranks in used.values()
            if len(ranks) > 1
        ]
        if wanted is not None and len(used) != wanted:
            problems.append(f"{host}: its ranks use {len(used)} GPU(s), and --gpus is {wanted}")
    return problems


def _name(fact: Fitness) -> str:
    return f"rank {fact.rank} on {fact.host}"


# --------------------------------------------------------------------------- together


def _try_together(meeting: _Meeting, facts: Sequence[Fitness], shared: Path | None) -> tuple[list[str], Fabric]:
    """Try collectives and the shared directory; return what is wrong, on every rank."""
    problems: list[str] = []
    fabric = Fabric(latency_s=0.0, bus_bytes_per_s=0.0)
    gpu = torch.cuda.is_available()
    limit = timedelta(seconds=meeting.timeout_s)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=dist.PrefixStore("group", meeting.store),
            rank=meeting.rank,
            world_size=meeting.world,
            timeout=limit,
        )
        fabric = _try_collectives(torch.device("cuda" if gpu else "cpu"), meeting)
    except RuntimeError as error:
        problems.append(f"a collective failed: {str(error).splitlines()[0]}")
    if shared is not None:
        problems += _try_shared(shared, meeting)
    if dist.is_initialized():
        dist.destroy_process_group()
    return _gather_problems(problems, meeting), fabric


def _gather_problems(mine: list[str], meeting: _Meeting) -> list[str]:
    meeting.tell("together", [[f"rank {meeting.rank} on {socket.gethostname()}", problem] for problem in mine])
    if meeting.rank == 0:
        reported = [word for word in meeting.hear_all("together") if word is not None]
        meeting.tell("all", [f"{who}: {problem}" for words in reported for who, problem in words])
    verdict = meeting.hear_verdict("all")
    return ["the first rank has not answered"] if verdict is None else verdict


def _try_collectives(device: torch.device, meeting: _Meeting) -> Fabric:
    """Measure collectives; RuntimeError when a sum over all ranks is wrong."""
    world = meeting.world
    expected = world * (world + 1) / 2
    small = _all_reduce_seconds(torch.full((1,), meeting.rank + 1.0, device=device), expected)
    elements = _MESSAGE_BYTES[device.type] // 4
    large = _all_reduce_seconds(torch.full((elements,), meeting.rank + 1.0, device=device), expected)
    crossing = 2 * (world - 1) / world * elements * 4
    return Fabric(latency_s=small, bus_bytes_per_s=crossing / large)


def _all_reduce_seconds(mine: torch.Tensor, expected: float) -> float:
    """Return the better of two tries: the first also sets up connections."""
    best = float("inf")
    for _ in range(2):
        x = mine.clone()
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(x)
        wrong = int((x != expected).sum())
        best = min(best, time.perf_counter() - started)
        if wrong:
            raise RuntimeError(f"{wrong} of {x.numel()} elements of an all-reduce are wrong")
    return best


def _try_shared(shared: Path, meeting: _Meeting) -> list[str]:
    """Have every rank write a file that the first one must see, and read one that the first one wrote."""
    problems: list[str] = []
    if meeting.rank == 0:
        problems, token = _offer(shared)
        meeting.tell("token", token)
    token = meeting.hear("token", 0)
    if token is None:  # the first rank has a problem of its own
        return problems
    folder = shared / f".tropd-health-{token}"
    if not _appears(folder / "token", token):
        problems.append(f"{shared.absolute()} is not the directory that rank 0 sees under this name")
    else:
        with _writing(shared, problems):
            (folder / str(meeting.rank)).write_text(token)
    meeting.tell("written", not problems)
    if meeting.rank == 0:
        written = meeting.hear_all("written")
        unseen = [r for r, wrote in enumerate(written) if wrote and not _appears(folder / str(r), token)]
        if unseen:
            problems.append(f"rank 0 does not see what rank(s) {', '.join(map(str, unseen))} wrote to {shared}")
        shutil.rmtree(folder, ignore_errors=True)
    return problems


def _offer(shared: Path) -> tuple[list[str], str | None]:
    """Return (problems, token): a new folder below ``shared``, named by the token, with a file that holds it."""
    problems: list[str] = []
    token = secrets.token_hex(16)
    with _writing(shared, problems):
        folder = shared / f".tropd-health-{token}"
        folder.mkdir(parents=True)
        (folder / "token").write_text(token)
    return problems, None if problems else token


@contextlib.contextmanager
def _writing(shared: Path, problems: list[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problems.append(f"cannot write to {shared.absolute()}: {error.strerror or error}")


def _appears(path: Path, text: str) -> bool:
    deadline = time.monotonic() + _SHARED_WAIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if path.read_text() == text:
                return True
        time.sleep(0.2)
    return False


def _print_accelerators() -> None:
    """Print which optional packages are used, and what the others lack."""
    from megatron_tropd.engine.te import accelerators  # of the rest of the package, which could be imported

    for name, said in accelerators().items():
        print(f"{name}: {said}")


def _table(facts: Sequence[Fitness], fabric: Fabric) -> Table:
    latency, bandwidth = fabric.latency_s * 1e6, fabric.bus_bytes_per_s / 1e9
    table = Table(
        title=f"{len(facts)} rank(s); all-reduce {latency:,.0f} us, {bandwidth:,.1f} GB/s per rank",
        title_justify="left",
        box=None,
    )
    for column in ("host", "ranks", "device", "memory GiB", "TFLOP/s"):
        table.add_column(column)
    for host in dict.fromkeys(fact.host for fact in facts):
        here = [fact for fact in facts if fact.host == host]
        speeds = [fact.tflops for fact in here]
        table.add_row(
            literal(host),
            ", ".join(str(fact.rank) for fact in here),
            here[0].device,
            f"{here[0].memory_bytes / 2**30:,.0f}",
            f"{min(speeds):,.1f}" if len(here) == 1 else f"{min(speeds):,.1f} to {max(speeds):,.1f}",
        )
    return table
