"""Verification that the engines that sample have the weights they were sent."""

from __future__ import annotations

import numpy as np

from megatron_tropd.engine.model import Model
from megatron_tropd.errors import EngineError
from megatron_tropd.types import Int64Array, Prompt
from megatron_tropd.weight_sync.interface import ProbeableSampler
from megatron_tropd.weight_sync.publishers import probe_logprobs

_PROBE_TOKENS = 128
_TOLERANCE = {"torch.float32": 1e-4, "torch.bfloat16": 0.1}


def probe_of(prompt: Prompt, longest: int) -> Int64Array:
    """Build a text like those trained on: the start of a prompt and its response, of 2 to ``longest`` tokens."""
    whole = prompt.token_ids if prompt.response_ids is None else np.concatenate([prompt.token_ids, prompt.response_ids])
    return np.resize(whole, max(2, min(len(whole), _PROBE_TOKENS, longest)))


def verify_publish(model: Model, sampler: ProbeableSampler, probe: Int64Array, tolerance: float | None) -> None:
    """Compare the log-probs of the probe's tokens, trainer against every engine. Collective.

    Raises:
        EngineError: they differ by more than ``tolerance`` on average, nats (None: what rounding allows the dtype).
    """
    trainer = probe_logprobs(model, probe)
    allowed = _TOLERANCE[str(model.dtype)] if tolerance is None else tolerance
    for name, engine in sampler.probe(probe).items():
        gap = float(np.abs(engine - trainer).mean())
        if not gap <= allowed:
            raise EngineError(
                f"after new weights were published, the log-probs of a probe differ between the trainer and {name} of "
                f"the sampler by {gap:.1e} nats on average ({allowed:.0e} allowed). The engine has not got the "
                "weights, or computes another model: check dtype, attention kernels and quantization in rollout.vllm. "
                "rollout.verify_tolerance sets what is allowed."
            )
