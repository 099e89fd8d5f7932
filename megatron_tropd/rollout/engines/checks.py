"""Check before a model is built that the engine that samples can report the log-probs that training needs."""

from __future__ import annotations

from megatron_tropd.config.sections import RolloutConfig
from megatron_tropd.errors import ConfigError
from megatron_tropd.rollout.engines.registry import ROLLOUT_ENGINES


def check_logprobs(section: RolloutConfig, *, shared_ids: int, student_ids: int, teacher_ids: int) -> None:
    """Raise ConfigError when the engine could not say what the model itself thinks of what was drawn."""
    plain = section.temperature == 1.0 and section.top_p == 1.0 and section.top_k == 0
    if not ROLLOUT_ENGINES[section.engine].exact_vocabulary and not plain and shared_ids < student_ids:
        raise ConfigError(
            f"the student has {student_ids} ids, the teacher {teacher_ids}: with rollout.engine={section.engine} "
            "training then needs rollout.temperature=1, top_p=1 and top_k=0. Set them so, or use "
            "rollout.engine=megatron."
        )
