"""An engine that sleeps: what it drops, what it keeps, and in which order it wakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from megatron_tropd.vllm_bridge.local_engine import LocalEngine


class Recorder:
    """Stands in for ``vllm.LLM``: notes what is called, and reads the weights."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def sleep(self, *, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(("wake", tags))

    def collective_rpc(self, name: str, *, kwargs: dict[str, Any]) -> None:
        self.calls.append((name, list(kwargs["weights_iterator"])))

    def reset_prefix_cache(self) -> None:
        """Nothing is cached."""

    def update_weight_version(self, version: str) -> None:
        self.calls.append(("version", version))

    def generate(self, prompts: list[Any], options: list[Any], *, use_tqdm: bool) -> list[Any]:
        self.calls.append("generate")
        return []


@pytest.fixture
def engine() -> Any:
    """An engine that sleeps, without vLLM."""
    found: Any = LocalEngine.__new__(LocalEngine)
    found._llm, found._sleeps, found._asleep_level, found._again = Recorder(), True, 0, None
    return found


def test_weights_that_can_be_had_again_are_dropped_and_wake_before_the_cache(engine: Any):
    engine.load(WEIGHTS, version=1)
    engine.sleep()
    engine.sleep()
    engine.load(WEIGHTS, version=2)
    assert engine._llm.calls == [
        *[("reload_weights", WEIGHTS), ("version", "1"), ("sleep", 2)],
        *[("wake", ["weights"]), ("reload_weights", WEIGHTS), ("wake", ["kv_cache"]), ("version", "2")],
    ]


def test_an_engine_that_is_used_again_before_there_are_new_weights_reads_the_old_ones_anew(engine: Any):
    engine.load(WEIGHTS, version=1)
    engine.sleep()
    engine._llm.calls.clear()
    engine._ask([], [])
    engine._ask([], [])
    assert engine._llm.calls == [
        *[("wake", ["weights"]), ("reload_weights", WEIGHTS), ("wake", ["kv_cache"]), ("version", "1")],
        *["generate", "generate"],
    ]


def test_weights_that_can_be_read_once_and_a_teachers_own_wait_in_host_memory(engine: Any):
    def once() -> Iterator[Any]:
        yield from WEIGHTS

    for first in (lambda: None, lambda: engine.load(once(), version=1)):
        first()
        engine._llm.calls.clear()
        engine.sleep()
        engine._ask([], [])
        assert engine._llm.calls == [("sleep", 1), ("wake", None), "generate"]


WEIGHTS: list[Any] = [("model.norm.weight", 1.0)]
