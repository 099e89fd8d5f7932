"""What runs where vLLM is: module-level functions for ``vllm_commands().call``, and what they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config.sections import Layout
from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.data.packing import pack
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.score import score_packs
from megatron_tropd.engine.weights import load_stream
from megatron_tropd.errors import EngineError
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from megatron_tropd.rollout.engines.vllm import VLLMSampler
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.setup.build import load_model
from megatron_tropd.types import Float32Array, Prompt, Region, Rollout, RolloutRequest, SamplingParams
from megatron_tropd.weight_sync.publishers import WeightStream, probe_logprobs
from megatron_tropd.weight_sync.verify import verify_publish

TOLERANCE = 1e-4  # nats, fp32
BLOCK = 32  # tokens of a block of vLLM's cache: only whole blocks are ever used again
LONGEST = 128
BUDGET = 17
STOPS = (2, 5)
# so few tokens in a step that not all prompts fit into the first one
OPTIONS = {
    "kv_cache_memory_bytes": 16 << 20,
    "max_num_seqs": 16,
    "block_size": BLOCK,
    "max_num_batched_tokens": LONGEST + 1,
}


def trainer_model(path: str, *, tensor: int = 1, pipeline: int = 1) -> Model:
    """The trainer's model with the weights of a directory."""
    device = initialize_distributed()
    groups = GroupBuilder().build(Layout(tensor=tensor, pipeline=pipeline))
    return load_model(path, groups, dtype=torch.float32, device=device)


def set_weights(model: Model, path: str, version: int) -> None:
    """The directory's weights plus noise that only ``version`` decides: whatever the layout, the same weights."""
    source = HFWeights(path)
    generator = torch.Generator().manual_seed(version)
    tensors = []
    for name in sorted(source):
        whole = source[name][:]
        tensors.append((name, whole + 0.05 * torch.randn(whole.shape, generator=generator)))
    load_stream(model, tensors)


def requests_of(vocab_size: int, *, samples: int = 2, prompts: int = 5) -> list[RolloutRequest]:
    """Prompts of odd lengths that start alike, longer than a block of the cache; some guided, one all prefix."""
    rng = np.random.default_rng(0)
    start = rng.integers(1, vocab_size, BLOCK + 7)
    asked = [
        Prompt(
            index=index,
            token_ids=np.concatenate([start, rng.integers(1, vocab_size, int(rng.integers(1, 23)))]),
            text="",
            response_ids=rng.integers(1, vocab_size, 9),
        )
        for index in range(prompts)
    ]
    requests = make_requests(asked, samples=samples, guided=1, fraction=0.5, max_new_tokens=BUDGET)
    return requests + make_requests(asked[:1], samples=0, guided=1, fraction=1.0, max_new_tokens=BUDGET)


def trainer_logprobs(model: Model, rollouts: Sequence[Rollout]) -> list[Float32Array]:
    """The trainer's log-probs of the continuations, as the training loop's scoring pass gives them; first stage 0."""
    multiple = 2 * model.groups.layout.tensor
    numbered = [Rollout(**_fields(r) | {"sequence_id": i}) for i, r in enumerate(rollouts)]
    packs = pack(numbered, max_tokens=2 * LONGEST, multiple_of=multiple)[0]
    found: dict[int, Float32Array] = {}
    for item, score in zip(packs, score_packs(model, packs, vocab_size=model.architecture.vocab_size), strict=True):
        assert score is not None, "these tests have one pipeline stage"
        valid = (item.region_T == Region.PREFIX) | (item.region_T == Region.CONTINUATION)
        values = score.logprob_N.cpu().numpy()
        found |= {int(i): values[item.sequence_T[valid] == i] for i in item.sequence_ids}
    return [found[i][r.count(Region.PREFIX) :] for i, r in enumerate(rollouts)]


def _fields(rollout: Rollout) -> dict[str, Any]:
    return {name: getattr(rollout, name) for name in rollout.__slots__}


def largest_gap(model: Model, rollouts: Sequence[Rollout]) -> float:
    """Between the sampler's model log-probs and the trainer's, over all continuations."""
    theirs = trainer_logprobs(model, rollouts)
    assert all(len(r.model_logprob) == len(t) for r, t in zip(rollouts, theirs, strict=True))
    return float(max(np.abs(r.model_logprob - t).max(initial=0.0) for r, t in zip(rollouts, theirs, strict=True)))


def check_rollouts(requests: Sequence[RolloutRequest], rollouts: Sequence[Rollout], version: int) -> None:
    """Complete, in order, what was asked for, ended as it should be."""
    assert [r.sequence_id for r in rollouts] == [r.sequence_id for r in requests]
    for request, rollout in zip(requests, rollouts, strict=True):
        context = np.concatenate([request.prompt_ids, request.prefix_ids])
        assert np.array_equal(rollout.token_ids[: len(context)], context)
        written = rollout.token_ids[len(context) :]
        assert len(written) == request.max_new_tokens or int(written[-1]) in STOPS
        assert not np.isin(written[:-1], STOPS).any()
        assert rollout.finished == (int(rollout.token_ids[-1]) in STOPS)
        assert rollout.weight_version == version


class Spoilt:
    """A weight stream that loses part of a layer on the way."""

    def __init__(self, stream: WeightStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in self._stream if "layers.1.mlp" not in name)


def in_process(paths: Sequence[str], tensor: int, engine_tensor: int) -> None:
    """Rollouts, publishes and the probe with engines in the trainer's processes, one model after the other."""
    for path in paths:
        _in_process(path, tensor, engine_tensor)


def _in_process(path: str, tensor: int, engine_tensor: int) -> None:
    model, architecture = trainer_model(path, tensor=tensor), read_architecture(path)
    sampler = VLLMSampler(
        path,
        architecture,
        GroupBuilder().build(Layout(tensor=engine_tensor)),
        dtype=torch.float32,
        device=model.device,
        max_tokens=LONGEST,
        options=OPTIONS,
    )
    requests = requests_of(architecture.vocab_size)
    params = SamplingParams(max_new_tokens=BUDGET, stop_token_ids=STOPS)
    probe = np.arange(1, 40) % architecture.vocab_size
    before = None
    for version in (1, 2):
        set_weights(model, path, version)
        sampler.update_weights(WeightStream(model), version=version)
        rollouts = sampler.generate(requests, params, seed=3, step=version)
        check_rollouts(requests, rollouts, version)
        assert largest_gap(model, rollouts) < TOLERANCE
        trainer = probe_logprobs(model, probe)
        verify_publish(model, sampler, probe, TOLERANCE)
        assert before is None or np.abs(trainer - before).max() > 0.1
        before = trainer
    again = sampler.generate(requests, params, seed=3, step=2)
    assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in rollouts]
    other = sampler.generate(requests, params, seed=4, step=2)
    assert [r.token_ids.tolist() for r in other] != [r.token_ids.tolist() for r in rollouts]

    _check_other_distributions(sampler, model, requests)
    set_weights(model, path, 3)
    sampler.update_weights(Spoilt(WeightStream(model)), version=3)
    with pytest.raises(EngineError, match="has not got the weights"):
        verify_publish(model, sampler, probe, None)
    sampler.close()
    dist.barrier()  # the trainer's process group outlives the engine


def _check_other_distributions(sampler: VLLMSampler, model: Model, requests: Sequence[RolloutRequest]) -> None:
    """What the model says stays what the model says, and what was sampled from is renormalized over what was kept."""
    hot = SamplingParams(max_new_tokens=BUDGET, temperature=0.7, top_p=0.8, top_k=9, stop_token_ids=STOPS)
    rollouts = sampler.generate(requests, hot, seed=3, step=9)
    assert largest_gap(model, rollouts) < TOLERANCE
    chosen = np.concatenate([r.sampling_logprob - r.model_logprob for r in rollouts])
    assert (chosen > 0.05).mean() > 0.9, "a token kept by top-p is likelier than under the model itself"
    greedy = SamplingParams(max_new_tokens=BUDGET, temperature=0.0, stop_token_ids=STOPS)
    rollouts = sampler.generate(requests, greedy, seed=3, step=9)
    assert largest_gap(model, rollouts) < TOLERANCE
    assert all((r.sampling_logprob == 0.0).all() for r in rollouts)
