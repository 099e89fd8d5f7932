"""What the trainer does while servers and the network fail: module-level functions for ``vllm_commands().start``."""

from __future__ import annotations

import json
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_tropd.config.sections import StudentServersConfig
from megatron_tropd.engine.model import Model
from megatron_tropd.rollout.engines.vllm_server import ServerSampler
from megatron_tropd.types import Rollout, SamplingParams
from megatron_tropd.vllm_bridge.pool import Pool
from megatron_tropd.weight_sync.publishers import WeightStream
from megatron_tropd.weight_sync.verify import verify_publish
from tests.support.vllm_cases import (
    BUDGET,
    STOPS,
    TOLERANCE,
    check_rollouts,
    largest_gap,
    requests_of,
    set_weights,
    trainer_model,
)
from tests.support.vllm_proxy import CONTROL
from tests.support.vllm_server_cases import server_sampler

SAMPLES = 6
HEARTBEAT_S, TRANSFER_S, TIMEOUT_S = 4.0, 10.0, 8.0


def through_faults(path: str, urls: list[str], key: str, kind: str, folder: str, plan: dict[str, Any]) -> None:
    """Steps of publishing, verifying and sampling, each complete and right whatever fails.

    ``plan``: ``steps``; ``control``: whether proxies are told the number of each; ``back``: servers that are to come
    back before one more step; ``patience_s``. Rank 0 writes ``steps.json`` into the folder, and a file ``waiting`` when
    it waits for them.
    """
    model = trainer_model(path, tensor=2)
    settings = StudentServersConfig(
        heartbeat_s=HEARTBEAT_S, transfer_s=TRANSFER_S, patience_s=plan.get("patience_s", 120.0), attempts=5
    )
    sampler, pool = server_sampler(model, urls, key, kind, f"{folder}/weights", settings=settings, timeout_s=TIMEOUT_S)
    report: list[dict[str, Any]] = []
    for number in range(plan["steps"]):
        if pool is not None and plan.get("control"):
            _all_there(pool)
            _send_request(urls, number)
        report.append(_step(model, path, sampler, pool, version=number + 1))
    if plan.get("back"):
        if pool is not None:
            Path(folder, "waiting").touch()
            _until(lambda: pool.counts["back"] >= plan["back"])
        dist.barrier()
        report.append(_step(model, path, sampler, pool, version=plan["steps"] + 1))
    if pool is not None:
        Path(folder, "steps.json").write_text(json.dumps({"steps": report, "counts": pool.counts}))
    sampler.close()


def _step(model: Model, path: str, sampler: ServerSampler, pool: Pool | None, *, version: int) -> dict[str, Any]:
    before, started = Counter() if pool is None else Counter(pool.counts), time.monotonic()
    set_weights(model, path, version)
    sampler.update_weights(WeightStream(model), version=version)
    probe = np.arange(1, 40) % model.architecture.vocab_size
    verify_publish(model, sampler, probe, TOLERANCE)
    published = time.monotonic() - started
    requests = requests_of(model.architecture.vocab_size, samples=SAMPLES)
    params = SamplingParams(max_new_tokens=BUDGET, stop_token_ids=STOPS)
    rollouts = sampler.generate(requests, params, seed=3, step=version)
    gap = largest_gap(model, rollouts)
    assert gap < TOLERANCE
    facts = {
        "seconds": time.monotonic() - started,
        "publish_seconds": published,
        "gap": gap,
        "asked": len(requests),
        "lost": _missing(requests, rollouts),
        "duplicates": _missing(rollouts, requests) + _alike(rollouts),
        "counts": {} if pool is None else dict(Counter(pool.counts) - before),
    }
    check_rollouts(requests, rollouts, version)
    return facts


def _missing(wanted: Sequence[Any], there: Sequence[Any]) -> int:
    """How many of the one are not among the other, by number."""
    return (Counter(r.sequence_id for r in wanted) - Counter(r.sequence_id for r in there)).total()


def _alike(rollouts: Sequence[Rollout]) -> int:
    """Sequences with the content of another one: all are drawn with seeds of their own."""
    drawn = [(r.prompt_index, tuple(r.token_ids.tolist())) for r in rollouts if len(r.sampling_logprob) > 4]
    return len(drawn) - len(set(drawn))


def _send_request(urls: Sequence[str], number: int) -> None:
    for url in urls:
        urllib.request.urlopen(f"{url}{CONTROL}{number}", timeout=10).close()


def _all_there(pool: Pool) -> None:
    """Every step begins with all servers: one that was lost in the step before has its time to come back."""
    _until(lambda: pool.counts["back"] >= pool.counts["lost"])


def _until(reached: Any, timeout_s: float = 200.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.05)
