"""Watch for a student that is certain of what the teacher would never write, and a method that cannot move it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

_log = logging.getLogger(__name__)

LEAST_KL = 1.0  # nats per token
LEAST_STUCK = 0.35  # of the outliers
LARGEST_PUSH = 3.0  # gradient norm per nat of reverse KL


def is_stuck(metrics: Mapping[str, float]) -> bool:
    """Say whether a step's student is far from the teacher, certain of many outliers, and hardly pushed.

    A log-ratio reward r pushes a token's logit by ``r (1 - q(y))``: where the student is certain it is near 0, however
    large r is, and so is the gradient of the exact reverse KL.
    """
    far, stuck, push = (metrics.get(name) for name in ("reverse_kl", "stuck_fraction", "grad_norm"))
    if far is None or stuck is None or push is None:
        return False
    return far >= LEAST_KL and stuck >= LEAST_STUCK and push <= LARGEST_PUSH * far


class StuckMonitor:
    """Warn once of a run that ``is_stuck``, unless its method names what the teacher would write instead."""

    def __init__(self, method: str, *, teaches_certain_students: bool) -> None:
        self._method = method
        self._silent = teaches_certain_students

    def check(self, metrics: Mapping[str, float]) -> None:
        """Check the metrics of a step; to be called with those of every step."""
        if self._silent or not is_stuck(metrics):
            return
        self._silent = True
        _log.warning(
            "step %d: the student is certain where the teacher would never go. Its tokens are %.1f nats less likely to "
            "the teacher than to itself on average, it gives 0.9 or more to %.0f%% of those that the teacher would not "
            "write, and the gradient norm is %.2g: %s moves a token by its log ratio times 1 - q, which is little "
            "there, so the run may stand still for long. Try a method whose outliers learn what the teacher would "
            "write: method.name=tropd, or tropd_rkl (docs/results.md). Said once.",
            int(metrics["step"]),
            metrics["reverse_kl"],
            100 * metrics["stuck_fraction"],
            metrics["grad_norm"],
            self._method,
        )
