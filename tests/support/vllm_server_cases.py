"""What the trainer does with servers in the tests: module-level functions for ``vllm_commands().call``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_tropd.config.sections import StudentServersConfig
from megatron_tropd.engine.model import Model
from megatron_tropd.rollout.engines.vllm_server import ServerSampler
from megatron_tropd.types import SamplingParams
from megatron_tropd.vllm_bridge.pool import Pool
from megatron_tropd.weight_sync.publishers import (
    BroadcastPublisher,
    FilePublisher,
    Publisher,
    WeightStream,
    probe_logprobs,
)
from megatron_tropd.weight_sync.verify import verify_publish
from tests.support.vllm_cases import (
    BUDGET,
    LONGEST,
    STOPS,
    TOLERANCE,
    check_rollouts,
    largest_gap,
    requests_of,
    set_weights,
    trainer_model,
)

# many buckets, so that what can go wrong between two of them does
BUCKET_BYTES = 60_000
SETTINGS = StudentServersConfig(heartbeat_s=30, transfer_s=60, patience_s=120)


def server_sampler(
    model: Model,
    urls: list[str],
    key: str,
    kind: str,
    directory: str,
    *,
    settings: StudentServersConfig = SETTINGS,
    timeout_s: float = 60,
) -> tuple[ServerSampler, Pool | None]:
    """A sampler over servers, with a publisher of the kind."""
    pool = Pool(settings.model_copy(update={"urls": tuple(urls)}), key=key) if dist.get_rank() == 0 else None
    if pool is not None:
        pool.infos()
    publisher: Publisher
    if kind == "files":
        publisher = FilePublisher(pool, Path(directory), bucket_bytes=BUCKET_BYTES, transfer_s=settings.transfer_s)
    else:
        publisher = BroadcastPublisher(
            pool,
            address="127.0.0.1",
            bucket_bytes=BUCKET_BYTES,
            transfer_s=settings.transfer_s,
            device=model.device,
        )
    sampler = ServerSampler(pool, publisher, model.architecture, max_tokens=LONGEST, timeout_s=timeout_s)
    return sampler, pool


def over_http(path: str, urls: list[str], key: str, directory: str, tensor: int) -> None:
    """Both ways of publishing, rollouts, and the distributions sampled from."""
    model = trainer_model(path, tensor=tensor)
    requests = requests_of(model.architecture.vocab_size)
    params = SamplingParams(max_new_tokens=BUDGET, stop_token_ids=STOPS)
    hot = SamplingParams(max_new_tokens=BUDGET, temperature=0.7, top_p=0.8, top_k=9, stop_token_ids=STOPS)
    probe = np.arange(1, 40) % model.architecture.vocab_size
    before, version = None, 0
    for kind in ("files", "broadcast"):
        sampler, pool = server_sampler(model, urls, key, kind, directory)
        for _ in range(2):
            version += 1
            set_weights(model, path, version)
            sampler.update_weights(WeightStream(model), version=version)
            verify_publish(model, sampler, probe, TOLERANCE)
            rollouts = sampler.generate(requests, params, seed=3, step=version)
            check_rollouts(requests, rollouts, version)
            assert largest_gap(model, rollouts) < TOLERANCE
            trainer = probe_logprobs(model, probe)
            assert before is None or np.abs(trainer - before).max() > 0.1
            before = trainer
        again = sampler.generate(requests, params, seed=3, step=version)
        assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in rollouts]
        drawn = sampler.generate(requests, hot, seed=3, step=version)
        assert largest_gap(model, drawn) < TOLERANCE
        chosen = np.concatenate([r.sampling_logprob - r.model_logprob for r in drawn])
        assert (chosen > 0.05).mean() > 0.9
        assert pool is None or not pool.counts, pool.counts
        sampler.close()
    everyone = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, torch.tensor([float(sum(len(r.token_ids) for r in rollouts))]))
    assert len({float(x) for x in everyone}) == 1, "every rank has the same rollouts"
