"""Memory that a rank holds at the same time: the parts of a step follow one another, and not all memory is in use in
each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from megatron_tropd.config.sections import OptimizerConfig, RolloutConfig, TeacherConfig
from megatron_tropd.rollout.engines.registry import ROLLOUT_ENGINES

# what only some phases of a step use; everything else is there in all of them
_USED: Mapping[str, frozenset[str]] = {
    "writing rollouts": frozenset({"key-value cache"}),
    "scoring": frozenset({"teacher"}),
    "scoring by the base model": frozenset({"base"}),
    "learning": frozenset({"gradients", "activations", "loss"}),
    "updating": frozenset({"gradients", "optimizer"}),
}


def leaving(*, rollout: RolloutConfig, teacher: TeacherConfig, optimizer: OptimizerConfig) -> frozenset[str]:
    """Name the parts that are on the device only in the phases that use them."""
    parts = {"activations", "loss"}
    if rollout.vllm.sleep or not ROLLOUT_ENGINES[rollout.engine].sleeps:
        parts.add("key-value cache")
    if teacher.offload:
        parts |= {"teacher", "base"}
    if optimizer.offload:
        parts |= {"optimizer", "gradients"}
    return frozenset(parts)


def by_phase(parts: Mapping[str, float], leave: Collection[str]) -> dict[str, float]:
    """Return the bytes of every phase that uses one of the rank's ``parts``. ``leave``: those of :func:`leaving`."""
    return {
        phase: sum(size for name, size in parts.items() if name in used or name not in leave)
        for phase, used in _USED.items()
        if any(parts.get(name) for name in used)
    }


def moved_bytes(leave: Collection[str], *, frozen: float, states: float) -> float:
    """Return the bytes that a minibatch moves between a rank's device and host memory.

    Args:
        frozen: weights of the models that only score, which are copied to the device.
        states: of the optimizer, which go there and back.
    """
    return frozen * ("teacher" in leave) + 2 * states * ("optimizer" in leave)
