"""Watch how far the sampler's log-probs are from the trainer's, and name likely causes."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from megatron_tropd.losses.logprob_mismatch import BUCKETS, LARGEST, MEAN

_log = logging.getLogger(__name__)

WARN_EVERY = 50  # steps

_ALLOWED = {"fp32": 1e-3, "bf16": 0.1}
_GROWS = 3.0  # times the gap at the start of sequences
_OUTLIERS = 100.0  # times the mean


class MismatchMonitor:
    """Warn of a mean gap that rounding does not explain, once in ``WARN_EVERY`` steps."""

    def __init__(self, dtype: str, allowed: float | None) -> None:
        """Take ``dtype``: fp32 or bf16. ``allowed``: mean gap in nats; None: what rounding may give in the dtype."""
        self._dtype = dtype
        self._allowed = _ALLOWED[dtype] if allowed is None else allowed
        self._quiet_until = 0

    def check(self, metrics: Mapping[str, float]) -> None:
        """Check the metrics of a step; to be called with those of every step."""
        step, gap = int(metrics["step"]), metrics.get(MEAN)
        # a gap that is not a number is one to warn of
        if gap is None or gap <= self._allowed or step < self._quiet_until:
            return
        self._quiet_until = step + WARN_EVERY
        _log.warning(
            "step %d: the log-probs of the sampler and of the trainer differ by %.1e nats on average, at most %.1e "
            "(rollout.gap_warning allows %.0e). Likely causes: %s. Find the cause, or correct for it: "
            "method.mismatch=truncate weighs tokens by the ratio of the two, mask leaves out those far off. "
            "Said once in %d steps.",
            step,
            gap,
            metrics.get(LARGEST, float("nan")),
            self._allowed,
            "; ".join(self._causes(metrics)),
            WARN_EVERY,
        )

    def _causes(self, metrics: Mapping[str, float]) -> list[str]:
        causes = []
        by_position = [metrics[name] for bucket in BUCKETS if (name := f"{MEAN}/{bucket}") in metrics]
        if len(by_position) > 1 and by_position[-1] > _GROWS * by_position[0]:
            causes.append("it grows along the sequence: a cache of lower precision, or other rotary positions")
        if metrics.get(LARGEST, 0.0) > _OUTLIERS * metrics[MEAN]:
            causes.append("it is large on few tokens: ids that one side forbids, or a cache kept from older weights")
        causes += [
            "the engine samples with weights of another step (a recording, rollout.ahead, rollout.verify=false)",
            "it computes otherwise: quantization, attention or expert kernels (rollout.vllm.options)",
        ]
        if self._dtype == "bf16":
            causes.append("bf16 itself, on a model with large logits: compare a step with dtype=fp32")
        return causes
