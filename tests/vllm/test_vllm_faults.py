"""Servers that die, hang and come back, and a network that spoils answers: real vLLM servers behind small proxies.

In every test each step is complete and right: no sequence lost, none twice, every log-prob that of the trainer's
weights. The last test prints the sums.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tropd.vllm_bridge.wire import encoded
from tests.support.run_inputs import Job, make_task, save_model
from tests.support.vllm_fault_cases import HEARTBEAT_S, TIMEOUT_S, TRANSFER_S, through_faults
from tests.support.vllm_proxy import Fault, Message, Proxy
from tests.support.vllm_servers import KEY, ServerProcess
from tests.support.vllm_support import SIZES, SMALL, TEACHER, needs_vllm, vllm_commands

pytestmark = needs_vllm


@dataclass(kw_only=True)
class Place:
    """Two servers, the second of two workers, each behind a proxy; their model has its own output weight."""

    student: Path
    servers: list[ServerProcess]
    proxies: list[Proxy]
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    def start(self, kind: str, folder: Path, **plan: Any) -> Job:
        """The trainer, on two ranks."""
        folder.mkdir(exist_ok=True)
        arguments = [str(self.student), [proxy.url for proxy in self.proxies], KEY, kind, str(folder), plan]
        name = f"{through_faults.__module__}:{through_faults.__qualname__}"
        return vllm_commands().start(json.dumps(arguments), ranks=2, function=name)

    def record(self, name: str, folder: Path, injected: int, step: int | None = None) -> dict[str, Any]:
        """What the trainer has written, and its share of the figures."""
        found: dict[str, Any] = json.loads((folder / "steps.json").read_text())
        steps = found["steps"] if step is None else [found["steps"][step]]
        self.figures[name] = {
            "injected": injected,
            "recovered": injected,  # or the step would not be there
            "asked": sum(s["asked"] for s in steps),
            "lost": sum(s["lost"] for s in steps),
            "duplicates": sum(s["duplicates"] for s in steps),
            "seconds": max(s["seconds"] for s in steps),
        }
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    task = make_task(tmp_path_factory.mktemp("task"), student=SIZES, teacher=TEACHER)
    save_model(task.student, SIZES, tied=False, seed=1)
    settings = (*SMALL, "rollout.max_new_tokens=64")
    servers = [
        ServerProcess(
            task.config, task.directory / f"server-{n}.log", (*settings, f"rollout.vllm_server.tensor={n + 1}")
        )
        for n in range(2)
    ]
    proxies = [Proxy(server.port) for server in servers]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_ready()
        yield Place(student=task.student, servers=servers, proxies=proxies)
    finally:
        for server in servers:
            server.kill()
        for proxy in proxies:
            proxy.close()


@pytest.fixture(autouse=True)
def no_faults(place: Place) -> None:
    for proxy in place.proxies:
        proxy.faults = []


# --------------------------------------------------------------------------- answers


def arrays_of(message: Message) -> dict[str, np.ndarray]:
    from safetensors.numpy import load

    return load(message.body)


def changed(message: Message, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Message:
    """An answer with one array changed, and a checksum that fits: as if the server had computed it so."""
    arrays = arrays_of(message)
    return message.with_body(encoded(arrays | {name: change(arrays[name])}), signed=True)


def spoilt(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[len(array) // 2] = np.nan
    return array


def with_start(message: Message, start: str) -> Message:
    return replace(message.with_body(b"<html>sorry</html>", signed=False), start=start)


def flipped(message: Message) -> Message:
    middle = len(message.body) // 2
    body = message.body[:middle] + bytes([message.body[middle] ^ 1]) + message.body[middle + 1 :]
    return message.with_body(body, signed=False)


ANSWERS: dict[str, Fault] = {
    "cut off": Fault(route="write", answer=lambda m: replace(m, cut=len(m.body) // 2), times=2),
    "shortened": Fault(route="write", answer=lambda m: m.with_body(m.body[:-9], signed=False), times=2),
    "a bit flipped": Fault(route="write", answer=flipped, times=2),
    "invalid JSON": Fault(route="write", answer=lambda m: m.with_body(b'{"token_ids": [1, 2', signed=True), times=2),
    "a token too few": Fault(route="write", answer=lambda m: changed(m, "token_ids", lambda a: a[:-1]), times=2),
    "a log-prob too few": Fault(route="write", answer=lambda m: changed(m, "logprob", lambda a: a[1:]), times=2),
    "NaN log-probs": Fault(route="write", answer=lambda m: changed(m, "logprob", spoilt), times=2),
    "log-probs above 0": Fault(route="write", answer=lambda m: changed(m, "logprob", lambda a: a + 30), times=2),
    "weights of an earlier step": Fault(route="write", answer=lambda m: changed(m, "versions", lambda a: a - 1)),
    "weights of no step": Fault(route="write", answer=lambda m: changed(m, "versions", lambda a: a * 0 - 1)),
    "not the compression it says": Fault(
        route="write", answer=lambda m: replace(m, headers=(*m.headers, ("content-encoding", "gzip"))), times=2
    ),
    "502 from a proxy": Fault(route="write", answer=lambda m: with_start(m, "HTTP/1.1 502 Bad Gateway"), times=2),
    "429 from a proxy": Fault(route="write", answer=lambda m: with_start(m, "HTTP/1.1 429 Slow down"), times=2),
    "a page instead of an answer": Fault(route="write", answer=lambda m: with_start(m, "HTTP/1.1 200 OK"), times=2),
    "late": Fault(route="write", delay_s=TIMEOUT_S + 20),
    "probe: NaN log-probs": Fault(route="score", answer=lambda m: changed(m, "logprob", spoilt)),
    "probe: cut off": Fault(route="score", answer=lambda m: replace(m, cut=len(m.body) // 2)),
    "publish: start is cut off": Fault(route="start", answer=lambda m: replace(m, cut=1)),
    "publish: bucket fails": Fault(route="bucket", answer=lambda m: with_start(m, "HTTP/1.1 500 Oh"), skip=1),
    "publish: bucket is cut off": Fault(route="bucket", answer=lambda m: replace(m, cut=1), skip=2),
    "publish: finish is cut off": Fault(route="finish", answer=lambda m: replace(m, cut=1)),
}


@pytest.mark.parametrize("kind", ["files", "broadcast"])
def test_spoilt_answers_are_asked_for_again(place: Place, tmp_path: Path, kind: str):
    # broadcasts do not pass the proxies: what differs is how weights are sent again
    chosen = {name: f for name, f in ANSWERS.items() if kind == "files" or name.startswith("publish")}
    faults = [replace(fault) for fault in chosen.values()]
    for number, proxy in enumerate(place.proxies):
        # in turns the one server and the other
        proxy.script = [[fault] if n % 2 == number else [] for n, fault in enumerate(faults)]
    place.start(kind, tmp_path, steps=len(faults), control=True).wait(280).expect_success()
    for number, (name, fault) in enumerate(zip(chosen, faults, strict=True)):
        assert fault.struck == fault.times, f"{name} struck {fault.struck} times"
        found = place.record(f"{kind}: {name}", tmp_path, fault.struck, number)
        counts = found["steps"][number]["counts"]
        assert counts.get("wrong", 0) + counts.get("lost", 0) > 0 or name.startswith("publish"), f"{name}: {counts}"


# --------------------------------------------------------------------------- processes


def steps_until_it_is_back(
    place: Place, kind: str, folder: Path, number: int, fault: Fault, bring_back: Callable[[], None]
) -> dict[str, Any]:
    """Two steps, the fault in one of them; the server is brought back; a third step, in which it works again."""
    proxy = place.proxies[number]
    proxy.faults = [fault]
    job = place.start(kind, folder, steps=2, back=1)
    try:
        job.until((folder / "waiting").exists, timeout_s=150)
        assert fault.struck == 1
        proxy.faults, worked = [], proxy.counts["write"]
        bring_back()
        job.wait(200).expect_success()
    except BaseException:
        job.kill()
        raise
    assert proxy.counts["write"] > worked, "the server has come back and got no work"
    return place.record(f"{kind}: {folder.name}", folder, 1)


def published_once(proxy: Proxy) -> Callable[[], bool]:
    done = proxy.counts["finish"]
    return lambda: proxy.counts["finish"] > done


def resumed(server: ServerProcess) -> Callable[[], None]:
    return lambda: server.signal(signal.SIGCONT)


def started_again(server: ServerProcess) -> Callable[[], None]:
    def start() -> None:
        server.kill()
        server.start()
        server.wait_until_ready()

    return start


@pytest.mark.parametrize("kind", ["files", "broadcast"])
def test_a_server_that_hangs_while_weights_are_published_gets_them_when_it_is_back(place, tmp_path, kind):
    server, proxy = place.servers[1], place.proxies[1]
    stop = Fault(route="bucket", before=lambda: server.signal(signal.SIGSTOP), skip=1, when=published_once(proxy))
    folder = tmp_path / "SIGSTOP while publishing"
    found = steps_until_it_is_back(place, kind, folder, 1, stop, resumed(server))
    assert found["steps"][1]["seconds"] < 2 * (HEARTBEAT_S + TRANSFER_S) + 15
    assert found["counts"]["lost"] == found["counts"]["back"] >= 1


def test_a_server_that_hangs_while_it_writes_gives_its_work_to_the_other(place, tmp_path):
    server, proxy = place.servers[1], place.proxies[1]
    # it is the first step's weights that it has when it is back: of an earlier step than the trainer's
    stop = Fault(route="write", before=lambda: server.signal(signal.SIGSTOP), skip=1)
    folder = tmp_path / "SIGSTOP while writing"
    found = steps_until_it_is_back(place, "files", folder, 1, stop, resumed(server))
    assert found["counts"]["moved"] > 0 and found["counts"]["refreshed"] >= 1
    assert proxy.counts["write"] > 0


def test_a_server_that_dies_while_it_writes_and_starts_again_is_sent_the_weights(place, tmp_path):
    server = place.servers[0]
    kill = Fault(route="write", before=lambda: server.signal(signal.SIGKILL), skip=2)
    folder = tmp_path / "SIGKILL while writing"
    found = steps_until_it_is_back(place, "files", folder, 0, kill, started_again(server))
    assert found["counts"]["moved"] > 0 and found["counts"]["refreshed"] >= 1


def test_a_server_that_dies_within_a_broadcast_takes_part_in_the_next(place, tmp_path):
    server, proxy = place.servers[0], place.proxies[0]
    kill = Fault(route="bucket", before=lambda: server.signal(signal.SIGKILL), skip=1, when=published_once(proxy))
    folder = tmp_path / "SIGKILL while publishing"
    found = steps_until_it_is_back(place, "broadcast", folder, 0, kill, started_again(server))
    assert found["steps"][1]["seconds"] < 2 * (HEARTBEAT_S + TRANSFER_S) + 15


def test_when_no_server_is_left_the_run_ends_with_one_error(place, tmp_path):
    """The first dies while files are read, the second as it writes alone."""
    first, second = place.servers
    read = Fault(
        route="bucket",
        before=lambda: first.signal(signal.SIGKILL),
        skip=1,
        when=published_once(place.proxies[0]),
    )
    write = Fault(route="write", after=lambda: second.signal(signal.SIGKILL), skip=3, when=lambda: read.struck == 1)
    place.proxies[0].faults, place.proxies[1].faults = [read], [write]
    started = time.monotonic()
    outcome = place.start("files", tmp_path, steps=3, patience_s=5.0).wait(150)
    assert (read.struck, write.struck) == (1, 1)
    assert all(outcome.statuses), "no rank may go on, or hang"
    assert time.monotonic() - started < 120
    first, *others = outcome.outputs
    assert first.count("ServingError: no server has been of use for 5 s.") == 1, first
    assert "Start one (`tropd serve`) and run again" in first
    assert all(other.count("ServingError: the servers do not answer.") == 1 for other in others), others


def test_sums_of_all_faults(place: Place, capsys: pytest.CaptureFixture[str]):
    """Runs last, and prints what the report of this capability needs."""
    figures = place.figures
    names = ("injected", "recovered", "asked", "lost", "duplicates")
    sums = {name: sum(int(row[name]) for row in figures.values()) for name in names}
    with capsys.disabled():
        print()
        for name, row in figures.items():
            print(f"  {name:52s}" + "".join(f" {n} {int(row[n]):3d}" for n in names) + f"  {row['seconds']:5.1f} s")
        print(f"  {'all':52s}" + "".join(f" {n} {sums[n]:3d}" for n in names))
    assert sums["lost"] == 0 and sums["duplicates"] == 0 and sums["recovered"] == sums["injected"]
