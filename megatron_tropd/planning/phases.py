"""What a rank holds at the same time: the parts of a step follow one another, and not all memory is in use in each."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_tropd.config.run import RunConfig

# what only some phases of a step use; everything else is there in all of them
_USED: Mapping[str, frozenset[str]] = {
    "writing rollouts": frozenset({"key-value cache"}),
    "grading": frozenset({"teacher"}),
    "grading by the base model": frozenset({"base"}),
    "learning": frozenset({"gradients", "activations", "loss"}),
    "updating": frozenset({"gradients", "optimizer"}),
}


def leaving(config: RunConfig) -> frozenset[str]:
    """Names of the parts that are on the device only in the phases that use them."""
    parts = {"activations", "loss"}
    if config.rollout.engine != "vllm" or config.rollout.vllm.sleep:
        parts.add("key-value cache")
    if config.teacher.offload:
        parts |= {"teacher", "base"}
    if config.optimizer.offload:
        parts |= {"optimizer", "gradients"}
    return frozenset(parts)


def by_phase(parts: Mapping[str, float], config: RunConfig) -> dict[str, float]:
    """Bytes of every phase that uses one of the rank's ``parts``."""
    leave = leaving(config)
    return {
        phase: sum(size for name, size in parts.items() if name in used or name not in leave)
        for phase, used in _USED.items()
        if any(parts.get(name) for name in used)
    }


def moved_bytes(config: RunConfig, *, frozen: float, states: float) -> float:
    """Bytes that a step moves between a rank's device and host memory.

    Args:
        frozen: weights of the models that only grade, which are copied to the device for every minibatch.
        states: of the optimizer, which go there and back for every update.
    """
    once = frozen * config.teacher.offload + 2 * states * config.optimizer.offload
    return config.train.minibatches * once
