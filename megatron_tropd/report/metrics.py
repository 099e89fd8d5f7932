"""Every metric a run may write, in one table: unit, meaning, and the chart group it belongs to.

Means are over tokens, not over sequences, unless the meaning says otherwise. A metric that does not apply to a step
(no guided sequence, no gate) is left out or null, never 0. ``NAME/SOURCE`` is the metric ``NAME`` over the sequences
of one data source, ``logprob_gap_mean/FROM-TO`` that metric over the tokens at these positions of their sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Group = Literal[
    "count", "loss", "divergence", "gate", "entropy", "optimizer", "length", "mismatch", "guidance", "time", "accuracy"
]


@dataclass(frozen=True, slots=True)
class Metric:
    """Unit (empty for a plain count or name), meaning, and group of related metrics."""

    unit: str
    meaning: str
    group: Group


METRICS: Mapping[str, Metric] = {
    "step": Metric("", "Training step that the line describes.", "count"),
    "tokens": Metric(
        "tokens", "Predictions that carried loss, over all ranks: those that are masked are none.", "count"
    ),
    "rows_fraction": Metric(
        "fraction",
        "Rows computed per token of the packs: below 1 where sequences begin alike and share what they begin with.",
        "count",
    ),
    "sequences": Metric("sequences", "Sequences trained on, over all ranks.", "count"),
    "loss": Metric("nats/token", "The method's loss. Its zero and its sign depend on the method.", "loss"),
    "reverse_kl": Metric(
        "nats/token", "KL(student || teacher), estimated by log q - log p on the student's own tokens.", "divergence"
    ),
    "outlier_fraction": Metric("fraction", "Share of the student's own tokens that the gate did not trust.", "gate"),
    "trusted_fraction": Metric("fraction", "Share of the student's own tokens that the gate trusted.", "gate"),
    "total_variation": Metric(
        "fraction", "Mean of 1 - min(1, p/q): an estimate of the total-variation distance to the teacher.", "gate"
    ),
    "stuck_fraction": Metric(
        "fraction",
        "Share of outliers (tokens weighted by 1 - min(1, p/q), whatever the gate) of which the student is certain, "
        "1 - q < 0.1: log-ratio rewards and reverse KL hardly move them.",
        "gate",
    ),
    "student_entropy": Metric("nats/token", "Full-vocabulary entropy of the student on its own tokens.", "entropy"),
    "teacher_entropy": Metric("nats/token", "The same of the teacher on the same tokens.", "entropy"),
    "teacher_entropy_bound": Metric(
        "nats/token",
        "Upper bound of it from the top k, of a teacher that reports no more: what is not in it is spread evenly.",
        "entropy",
    ),
    "grad_norm": Metric("", "Global norm of the gradient before clipping.", "optimizer"),
    "lr": Metric("", "Learning rate of the step's last update.", "optimizer"),
    "response_length": Metric(
        "tokens", "Mean length of a response, prefix included, and without observations.", "length"
    ),
    "continuation_length": Metric("tokens", "Mean number of tokens the student wrote per sequence.", "length"),
    "observation_length": Metric(
        "tokens", "Mean number of tokens per sequence that neither model wrote after the prompt; if any.", "length"
    ),
    "finished_fraction": Metric("fraction", "Share of sequences ended by a stop token, not by the budget.", "length"),
    "logprob_gap_mean": Metric(
        "nats/token", "Mean absolute difference between the sampler's and the trainer's log-probs.", "mismatch"
    ),
    "logprob_gap_max": Metric("nats", "Largest such difference of the step.", "mismatch"),
    "staleness_mean": Metric(
        "steps", "Mean age of the weights that wrote the student's tokens; with rollout.ahead alone.", "mismatch"
    ),
    "staleness_max": Metric("steps", "Largest such age of the step.", "mismatch"),
    "prefix_length": Metric("tokens", "Mean length of the teacher-written prefix of guided sequences.", "guidance"),
    "prefix_fraction": Metric("fraction", "Share of the teacher's response given as prefix.", "guidance"),
    "prefix_nll": Metric("nats/token", "Mean -log q of the teacher-written prefix tokens.", "guidance"),
    "accuracy_train": Metric(
        "fraction", "Share of the step's own fully on-policy responses graded correct.", "accuracy"
    ),
    "reward_mean": Metric("", "Mean reward of the student's own answers; with methods that look at it.", "accuracy"),
    "reward_advantage": Metric(
        "", "Mean absolute advantage of these answers: 0 where all answers to every prompt fare alike.", "accuracy"
    ),
    "reward_missing": Metric("answers", "The student's own answers that nothing could grade.", "accuracy"),
    "time_step": Metric("s", "Wall time of the whole step.", "time"),
    "time_rollout": Metric("s", "Wall time of sampling, as far as the step waited for it.", "time"),
    "time_rollout_hidden": Metric(
        "s", "Wall time of sampling while the program did something else, not in time_step; with rollout.ahead.", "time"
    ),
    "time_pack": Metric("s", "Wall time of packing.", "time"),
    "time_teacher": Metric("s", "Wall time of teacher scoring.", "time"),
    "time_student": Metric("s", "Wall time of the student's own scoring pass (old log-probs, own top-k).", "time"),
    "time_train": Metric("s", "Wall time of forward, backward and update.", "time"),
    "time_optimizer": Metric("s", "Wall time of gradient norm and update, within time_train.", "time"),
    "time_offload": Metric(
        "s",
        "Wall time of moving weights and states between device and host memory, within time_teacher and time_train; "
        "with teacher.offload or optimizer.offload.",
        "time",
    ),
    "time_publish": Metric("s", "Wall time of handing the new weights to the sampler.", "time"),
    "time_other": Metric("s", "Wall time of everything else in the step.", "time"),
    "tokens_per_second": Metric("tokens/s", "Predictions trained on per second of the whole step.", "time"),
}

STEP_PARTS = ("rollout", "pack", "teacher", "student", "train", "publish", "other")  # time_* that add up to time_step


def of_source(name: str, source: str) -> str:
    """Name the metric ``name`` over the sequences of one data source: ``accuracy_train/math``."""
    return f"{name}/{source}"


def unknown_names(names: Iterable[str]) -> list[str]:
    """List names that are not in the table, sorted: a metric without a unit and a meaning is a mistake."""
    return sorted(name for name in set(names) if name.split("/")[0] not in METRICS)


def metrics_reference() -> str:
    """Return every metric with unit and meaning as a Markdown table, group by group."""
    rows = ["| metric | unit | meaning |", "|---|---|---|"]
    by_group = sorted(METRICS.items(), key=lambda item: get_args(Group).index(item[1].group))
    return "\n".join([*rows, *(f"| `{name}` | {m.unit or '-'} | {m.meaning} |" for name, m in by_group)]) + "\n"
