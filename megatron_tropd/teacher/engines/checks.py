"""Check before a model is built that the engine that scores can report what a method needs."""

from __future__ import annotations

from megatron_tropd.config.sections import TeacherConfig
from megatron_tropd.errors import ConfigError
from megatron_tropd.methods import Method
from megatron_tropd.teacher.engines.registry import scoring_engine


def check_reported(section: TeacherConfig, method: Method, *, shared_ids: int, teacher_ids: int) -> None:
    """Raise ConfigError when the engine cannot report of the teacher what the method needs.

    Args:
        shared_ids: how many ids all models know; ``teacher_ids``: how many the teacher has.
    """
    engine, needs, where = scoring_engine(section), method.needs, f"teacher.engine={section.engine}"
    if needs.hidden_states and not engine.hidden_states:
        raise ConfigError(
            f"method.name={method.name} with these options compares full distributions, for which it needs the "
            f"teacher's hidden states; {where} reports log-probs only. Use teacher.engine=megatron, or a divergence "
            "over the top k."
        )
    if engine.exact_distribution or section.whole_vocabulary:
        return
    if needs.end_ids:
        raise ConfigError(
            f"the ends of responses count as one token (method.end_tokens), ids {list(needs.end_ids)}, but {where} "
            "reports the log-probs of the sampled and the likeliest ids only, so that of all ends is not known. Set "
            "teacher.whole_vocabulary=true (for small vocabularies), use teacher.engine=megatron, or set "
            "method.end_tokens=exact, where the student's own end stays what the teacher would hardly write."
        )
    for why, stands in _lacking(method, shared_ids, teacher_ids).items():
        if stands:
            raise ConfigError(
                f"{why}, but {where} reports the log-probs of the sampled and the likeliest ids at temperature 1 only. "
                "Set teacher.whole_vocabulary=true (for small vocabularies), or use teacher.engine=megatron."
            )


def _lacking(method: Method, shared_ids: int, teacher_ids: int) -> dict[str, bool]:
    """Map what only a full distribution can give to whether it is needed."""
    needs = method.needs
    named = needs.top_k > 0 and needs.support in ("student", "union")
    fewer = shared_ids < teacher_ids
    return {
        f"method.support={needs.support} needs the log-probs of ids that the student names": named,
        f"method.name={method.name} with these options needs the teacher's exact entropy": needs.teacher_entropy,
        f"method.temperature={method.temperature} is not 1": method.temperature != 1.0,
        f"the models share {shared_ids} of the teacher's {teacher_ids} ids, over which its softmax runs": fewer,
    }
