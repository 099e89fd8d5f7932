"""The pool's decisions, without servers: each is a function here. Real ones fail in tests/vllm/test_vllm_faults.py."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_tropd.config.sections import ServersConfig
from megatron_tropd.errors import ServingError
from megatron_tropd.vllm_bridge.client import Refused, Server, Unreachable
from megatron_tropd.vllm_bridge.jobs import Job, JobBatch
from megatron_tropd.vllm_bridge.pool import Pool

GOOD, BAD = "http://good", "http://bad"
SETTINGS = ServersConfig(urls=(GOOD, BAD), heartbeat_s=0.3, attempts=3, patience_s=0.5, requests=4)


class World:
    """What the servers say of themselves."""

    def __init__(self) -> None:
        self.infos: dict[str, dict[str, Any]] = {url: {"model": "m", "version": "1"} for url in (GOOD, BAD)}
        self.down: set[str] = set()
        self.pools: list[Pool] = []

    def pool(self) -> Pool:
        pool = Pool(SETTINGS)
        self.pools.append(pool)
        pool.infos()
        return pool


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World()

    async def info(server: Server) -> dict[str, Any]:
        if server.url in world.down:
            raise Unreachable(f"{server.url} is down.")
        return dict(world.infos[server.url])

    async def alive(server: Server, timeout_s: float) -> None:
        await info(server)

    async def nothing(server: Server, *_: object, **__: object) -> None:
        await info(server)

    monkeypatch.setattr(Server, "info", info)
    monkeypatch.setattr(Server, "alive", alive)
    for name in ("start", "meet", "bucket", "finish"):
        monkeypatch.setattr(Server, name, nothing)
    yield world
    for pool in world.pools:
        pool.close()


def finished(batch: JobBatch, timeout_s: float = 60.0) -> list[Any]:
    assert batch.wait(timeout_s), "the batch hangs"
    return batch.results()


def until(reached: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.01)


def test_jobs_that_one_server_answers_wrongly_are_done_by_the_other(world: World):
    tries: Counter[tuple[str, int]] = Counter()

    def job(number: int) -> Job:
        async def call(server: Server) -> int:
            tries[server.url, number] += 1
            await asyncio.sleep(0)
            if server.url == BAD:
                raise ServingError("nonsense.")
            return number

        return Job(call=call, cost=1.0)

    pool = world.pool()
    assert finished(pool.submit([job(number) for number in range(200)])) == list(range(200))
    assert pool.counts["wrong"] > 0 and pool.counts["lost"] > 0
    assert all(tries[GOOD, number] == 1 for number in range(200)), "done once, and by the other"


def test_when_all_answer_wrongly_the_batch_ends_with_what_they_said(world: World):
    async def call(server: Server) -> None:
        raise ServingError("nonsense.")

    with pytest.raises(ServingError, match=r"nonsense\. It was tried 3 times, last of"):
        world.pool().submit([Job(call=call, cost=1.0)]).wait(60)


@pytest.mark.parametrize("error", [ValueError("a bug"), Refused("never.")])
def test_what_no_server_will_do_ends_the_batch_at_once(world: World, error: Exception):
    async def call(server: Server) -> None:
        raise error

    with pytest.raises(ServingError, match=r"a bug|never\."):
        world.pool().submit([Job(call=call, cost=1.0)]).wait(60)


def test_an_answer_that_comes_after_its_job_has_moved_does_not_count(world: World):
    late, moved = asyncio.Event(), threading.Event()

    async def call(server: Server) -> str:
        if server.url == BAD:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                moved.set()
            await late.wait()
        return server.url

    pool = world.pool()
    batch = pool.submit([Job(call=call, cost=1.0) for _ in range(2)])
    until(lambda: sum(job.result is not None for job in batch._jobs) == 1)
    world.down = {BAD}
    until(moved.is_set)
    assert finished(batch) == [GOOD, GOOD]
    pool._loop.call_soon_threadsafe(late.set)
    time.sleep(0.1)
    assert batch.results() == [GOOD, GOOD] and batch._left == 0
    assert pool.counts["moved"] == 1


def test_what_comes_back_as_another_server_is_not_used(world: World):
    async def where(server: Server) -> str:
        return server.url

    pool = world.pool()
    world.down = {BAD}
    until(lambda: pool.counts["lost"] == 1)
    world.infos[BAD]["model"], world.down = "another", set()
    time.sleep(1.0)
    assert pool.on_every(where) == {GOOD: GOOD}
    world.infos[BAD]["model"] = "m"
    until(lambda: pool.counts["back"] == 1)
    assert pool.on_every(where) == {GOOD: GOOD, BAD: BAD}


def test_who_comes_back_while_newer_weights_come_ends_with_those(world: World):
    begun, released, taken = threading.Event(), threading.Event(), []

    def refresh(version: int, gate: threading.Event | None) -> Any:
        async def bring(server: Server) -> None:
            begun.set()
            while gate is not None and not gate.is_set():
                await asyncio.sleep(0.01)
            taken.append((version, server.url))

        return bring

    pool = world.pool()
    pool.begin_update(1, keep=False, timeout_s=60).end()
    world.down = {BAD}
    until(lambda: pool.counts["lost"] == 1)
    world.infos[BAD]["version"] = "0"
    pool.set_refresh(1, refresh(1, released))
    world.down = set()
    until(begun.is_set)
    assert pool.begin_update(2, keep=False, timeout_s=60).end() == [GOOD]
    pool.set_refresh(2, refresh(2, None))
    time.sleep(0.1)
    released.set()
    until(lambda: pool.counts["back"] == 1)
    assert taken == [(1, BAD), (2, BAD)]
    assert all(peer.usable for peer in pool._peers)


def test_weights_of_which_a_part_was_not_sent_are_nobodys(world: World):
    pool = world.pool()
    update = pool.begin_update(1, keep=False, timeout_s=60)
    update.bucket({})
    assert update.intact
    assert update.end(complete=False) == []
    assert pool.starved
    again = pool.begin_update(1, keep=True, timeout_s=60)
    assert again.end() == [GOOD, BAD] and again.left == 2
    assert not pool.starved


def test_an_update_does_not_wait_for_a_server_that_cannot_begin(world: World):
    pool = world.pool()
    assert pool.begin_update(1, keep=False, timeout_s=60).wait_ready()
    world.down = {BAD}
    update = pool.begin_update(2, keep=False, timeout_s=60)
    assert not update.wait_ready()
    assert update.end(complete=False) == [] and update.left == 1
    again = pool.begin_update(2, keep=False, timeout_s=60)
    assert again.urls == [GOOD] and again.wait_ready() and again.end() == [GOOD]


def test_a_probe_is_asked_for_again_and_then_done_without(world: World):
    asked: Counter[str] = Counter()

    async def call(server: Server) -> str:
        asked[server.url] += 1
        if server.url == BAD or asked[GOOD] == 1:
            raise ServingError("nonsense.")
        return "fine"

    pool = world.pool()
    assert pool.on_every(call) == {GOOD: "fine"}
    assert asked == {GOOD: 2, BAD: SETTINGS.attempts}
    assert pool.counts["lost"] == 1


def test_without_any_server_waiting_ends_with_one_error_that_says_what_to_do(world: World):
    async def call(server: Server) -> None:
        raise Unreachable(f"{server.url} is gone.")

    world.down = {GOOD, BAD}
    pool = Pool(SETTINGS)
    world.pools.append(pool)
    batch = pool.submit([Job(call=call, cost=1.0) for _ in range(9)])
    with pytest.raises(ServingError, match=r"no server has been of use for 0.5 s. .*Start one \(`tropd serve`\)"):
        assert batch.wait(60)


def test_servers_that_take_work_and_never_answer_end_the_run_within_its_patience(world: World):
    """They say that they are well whenever they are asked: each time they are back they get the work again."""

    async def call(server: Server) -> None:
        await asyncio.sleep(0.05)
        raise Unreachable(f"{server.url} has not answered.")

    started = time.monotonic()
    with pytest.raises(ServingError, match=r"no server has been of use for 0\.5 s\. http://"):
        # more jobs than can be handed on too often within that time
        world.pool().submit([Job(call=call, cost=1.0) for _ in range(100)]).wait(60)
    assert time.monotonic() - started < 60


def test_a_request_that_ends_servers_is_not_handed_on_without_limit(world: World, monkeypatch: pytest.MonkeyPatch):
    tries: list[str] = []

    async def deadly(server: Server) -> None:
        tries.append(server.url)
        raise Unreachable(f"{server.url} has ended.")

    async def answered(server: Server) -> str:
        return "well"

    monkeypatch.setattr("megatron_tropd.vllm_bridge.health._USELESS_LOSSES", 1000)
    monkeypatch.setattr("megatron_tropd.vllm_bridge.health._LONGEST_PAUSE_S", 0.01)
    pool = world.pool()
    with pytest.raises(ServingError, match="was under way at 6 servers that were lost meanwhile"):
        pool.submit([Job(call=deadly, cost=1.0)]).wait(60)
    assert len(tries) == 6
    assert finished(pool.submit([Job(call=answered, cost=1.0)]), 60) == ["well"]
