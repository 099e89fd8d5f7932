"""Parts of a step are named by the heartbeat, with the step they are part of and how far the sampler is."""

from __future__ import annotations

import io
from functools import partial

from rich.console import Console

from megatron_tropd.progress import phases
from megatron_tropd.progress.phases import Phase
from megatron_tropd.report.progress import TrainingProgress
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.rollout.engines.megatron import _count


def line() -> str:
    return phases._line(tuple(phases._running), phases._running[-1]._started)


def test_a_part_of_a_step_is_named_with_its_step():
    watch, console = Stopwatch(), Console(file=io.StringIO())
    with Phase("tropd train"), TrainingProgress(8, done=2, console=console) as progress:
        with watch("rollout"):
            assert line() == "step 3/8, rollouts: 0 s so far"
        progress.update({})
        with watch("train"):
            assert line() == "step 4/8, learning: 0 s so far"
        assert line() == "step 4/8: 0 s so far"
    with Phase("tropd generate"), TrainingProgress(9, console=console, name="generate") as progress:
        progress.advance(4)
        assert line() == "4/9 prompts: 0 s so far"


def test_a_sampler_counts_finished_rows_and_the_tokens_there_may_be():
    with Phase("sampled", total=5) as phase:
        on_token = partial(_count, phase, before=(2, 100), budgets=[40, 40, 20], work=200)
        on_token(10, 2)  # 10 of 40 tokens, one row finished
    assert phase._done == 3
    assert phase._share == (100 + 100 * 10 / 40) / 200


def test_what_means_nothing_in_a_run_is_not_shown_and_the_divergence_comes_first():
    console = Console(file=io.StringIO(), width=120)
    with TrainingProgress(1, console=console, hidden=("outlier_fraction",)) as progress:
        progress.update({"loss": -3.5, "reverse_kl": 0.25, "outlier_fraction": 0.0})
    assert console.file.getvalue().strip() == "step 1/1  reverse KL 0.2500  loss -3.5000"
