"""Every method through the command line's own training: steps that no layout changes, and presets that coincide."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.methods import PRESETS as METHODS
from megatron_tropd.methods import build_method
from tests.support.long import LONG, few
from tests.support.run_inputs import (
    ROOT,
    STUDENT,
    TEACHER,
    Job,
    Task,
    commands,
    make_task,
    save_model,
    save_nudged,
    steady_metrics,
)

QUIET = ("report.samples=0", "report.html=false", "evaluate.prompts=null", "checkpoint.every=0")
# enough for every schedule to move and for Adam's moments to matter; `make test-long` takes twenty
STEPS = 20 if LONG else 5
SMALL = (f"train.steps={STEPS}", "train.prompts_per_step=1")
LAYOUTS = {
    "tp2": ("student.parallel.tensor=2", "teacher.parallel.tensor=2"),
    "pp2": ("student.parallel.pipeline=2", "teacher.parallel.tensor=2", "train.pack_tokens=90"),
}
# What rounding makes of these steps is measured: the same runs from weights that are one step of fp32 away, up or down.
# A sum of n terms is rounded n times by half a step, up or down, which together is sqrt(n)/2 steps; the longest sums
# here are over the 219 ids. So runs that add up in another order may be 8 times as far apart as runs from such weights.
NUDGES, ROUNDED = 2, 8
EPS = 2.0**-23
NATS = math.log(219)  # what log-probabilities are like in size: means and differences of them inherit their rounding

Metrics = dict[str, list[dict[str, Any]]]

UNGUIDED = "method.prefix_schedule=none"
# what the teacher reads, and the student does not; within the models' positions and the smallest packs
TOLD = ('data.teacher_template="{{ prompt }}#### {{ answer }}"', "data.max_teacher_prompt_tokens=75")
MOVING = ("teacher.model=student", "teacher.parallel.tensor=1")  # laid out as the student, whatever that is
PRESETS: dict[str, list[str]] = {
    **{name: [f"method.name={name}"] for name in METHODS},
    # those that show what they are under other settings
    "gkd": ["method.name=gkd", "rollout.samples_per_prompt=0"],
    "sft": ["method.name=sft", "rollout.samples_per_prompt=0"],
    "local_support": ["method.name=local_support", "rollout.top_p=0.9"],
    "drift_gate": ["method.name=drift_gate", "train.minibatches=2"],
    "opsd": ["method.name=opsd", "teacher.model=student", *TOLD],
    "sdft": ["method.name=sdft", "teacher.update=ema", "teacher.ema_decay=0.7", *MOVING, *TOLD],
    "prompt_distillation": ["method.name=prompt_distillation", *TOLD],
    "grpo": ["method.name=grpo", f"reward.function={ROOT}/examples/rewards.py:varied", "reward.advantage=raw"],
    # options that no preset has
    "the student's present self, told": [
        *("method.name=opd", "method.ppo_clip=0.2", "teacher.update=live", "train.minibatches=2", *MOVING, *TOLD),
    ],
    "sampled token beside the top k": ["method.name=tropd", "method.support=teacher_and_sampled", "method.tail=bucket"],
    "the student's top k, soft": ["method.name=tropd_soft", "method.support=student", "method.tail=renorm"],
    "union, ranked, drifting": [
        *("method.name=tropd", "method.support=union", "method.tail=bucket", "method.gate=teacher_topk"),
        *("method.k=20", "method.multiplier=drift_gate", "train.minibatches=2"),
    ],
    "early tokens first, rewards by their log": [
        *("method.name=tropd", "method.multiplier=prefix_drift", "method.reward=log", "method.trusted=k1_pg"),
    ],
    "the published script": [
        "method.name=tropd",
        "method.outlier_gradient=pg_scalar",
        "method.prefix_gradient=pg_scalar",
    ],
    "tempered, as the sampler says": [
        *("method.name=tropd", "method.temperature=0.7", "method.ratio=rollout", "method.normalization=region"),
        *("method.mismatch=truncate_and_mask", "method.special_tokens=mask", "train.minibatches=2"),
    ],
}

# these sample; every other method learns from what opd, or tropd when it is guided, has sampled: sampling takes longest
SAMPLES = ("opd", "tropd", "gkd", "sft", "local_support", "tempered, as the sampler says")

# whose parts other presets of the same layout have: compared between layouts in long runs. A new preset always is.
WAITING = {
    *("tropd_mask", "tropd_soft", "tropd_aopd", "tropd_rkl", "aopd", "fkl", "sft", "entropy_opd", "reopold"),
    *("prompt_distillation", "sdft", "drift_gate", "opsd", "the published script"),
    *("sampled token beside the top k", "the student's top k, soft", "early tokens first, rewards by their log"),
}
COMPARED = {
    "tp2": list(PRESETS) if LONG else [name for name in PRESETS if name not in WAITING],
    "pp2": few(PRESETS, "tropd", "rkl", "exopd", "sdft", "union, ranked, drifting"),
}

# pairs that must be one and the same, at one rank; 219 is the whole vocabulary
WHOLE = "method.k=219"
TWINS: dict[str, tuple[list[str], list[str]]] = {
    "tropd(gate=all) is opd": (["method.name=tropd", "method.gate=all", UNGUIDED], ["method.name=opd"]),
    "aopd is tropd(gate=probability_gap)": (
        ["method.name=aopd"],
        ["method.name=tropd", "method.gate=probability_gap", UNGUIDED, "method.normalization=sequence"],
    ),
    "gkd(beta=0) is fkl": (
        ["method.name=gkd", "method.beta=0", "method.temperature=1", "method.on_policy_fraction=1"],
        ["method.name=fkl"],
    ),
    "local_support(k=V) is rkl": (
        ["method.name=local_support", WHOLE, "method.special_tokens=keep"],
        ["method.name=rkl"],
    ),
    "eopd(alpha=0) is clipped opd": (
        ["method.name=eopd", "method.alpha=0", "train.minibatches=2"],
        ["method.name=opd", "method.ppo_clip=0.2", "train.minibatches=2"],
    ),
    "forward bucket(k=V) is fkl": (["method.name=fkl", "method.form=topk", WHOLE], ["method.name=fkl"]),
    "reverse bucket(k=V) is rkl": (["method.name=rkl", "method.form=topk", WHOLE], ["method.name=rkl"]),
    "exopd(lam=1) is opd": (["method.name=exopd", "method.lam=1"], ["method.name=opd"]),
    "union(k=V) is fkl": (
        ["method.name=fkl", "method.form=topk", WHOLE, "method.support=union"],
        ["method.name=fkl"],
    ),
    # sampler and trainer agree here, whatever the temperature
    "ratio=rollout is ratio=old": (
        ["method.name=tropd", "method.temperature=0.7", "method.ratio=rollout"],
        ["method.name=tropd", "method.temperature=0.7"],
    ),
}
# student and teacher are one: nothing to learn, whatever the objective that vanishes there
AGREEING: dict[str, list[str]] = {
    "opd": ["method.name=opd"],
    "rkl": ["method.name=rkl"],
    "tropd": ["method.name=tropd", "rollout.guided_per_prompt=0", "method.tail=bucket"],
    "tropd_rkl": ["method.name=tropd_rkl", "rollout.guided_per_prompt=0"],
    "union": ["method.name=rkl", "method.form=topk", "method.k=5", "method.support=union"],
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Models of as few layers as two stages allow."""
    made = make_task(tmp_path_factory.mktemp("task"))
    save_model(made.student, STUDENT | {"num_hidden_layers": 2}, tied=True, seed=1)
    save_model(made.teacher, TEACHER | {"num_hidden_layers": 1}, tied=False, seed=2)
    text = made.config.read_text().replace("name: tropd\n  k: 7\n  beta: 0.3", "name: opd")
    made.config.write_text(text)
    return made


def train_each(config: str, directory: str, overrides: list[str], cases: dict[str, list[str]]) -> None:
    """On the ranks: one training per case in the same processes, each with metrics of its own."""
    from megatron_tropd.config.loading import load_config
    from megatron_tropd.train.session import run_training

    for number, (name, changes) in enumerate(cases.items()):
        print(f"{name}:", flush=True)
        run_training(load_config(config, [*overrides, *changes, f"run_dir={directory}/{number}"]))


def train_cases(task: Task, directory: Path, cases: dict[str, list[str]], *extra: str, ranks: int) -> Metrics:
    start_cases(task, directory, cases, *extra, ranks=ranks).wait(560).expect_success()
    return metrics_of(directory, cases)


def start_cases(task: Task, directory: Path, cases: dict[str, list[str]], *extra: str, ranks: int) -> Job:
    return commands().start_call(train_each, task.config, directory, [*QUIET, *extra], cases, ranks=ranks)


def metrics_of(directory: Path, cases: dict[str, list[str]]) -> Metrics:
    """Rows of each; what packs share differs with the packs."""
    found = {name: steady_metrics(directory / f"{number}") for number, name in enumerate(cases)}
    return {
        name: [{k: v for k, v in row.items() if k != "rows_fraction"} for row in rows] for name, rows in found.items()
    }


# --------------------------------------------------------------------------- layouts


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rollouts")


@pytest.fixture(scope="module")
def alone(task: Task, rollouts: Path, tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    """Every method on one process; what is sampled is recorded."""
    places = {name: f"{rollouts}/{number}" for number, name in enumerate(SAMPLES)}
    cases = {name: [*PRESETS[name], f"rollout.record={places[name]}"] for name in SAMPLES}
    cases |= {name: [*changes, *replayed(name, rollouts)] for name, changes in PRESETS.items() if name not in SAMPLES}
    return train_cases(task, tmp_path_factory.mktemp("alone"), cases, *SMALL, ranks=0)


@pytest.fixture(scope="module")
def drift(task: Task, alone: Metrics, rollouts: Path, tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    """How far apart two runs of a method may be that differ in rounding only: by step and metric."""
    place = tmp_path_factory.mktemp("nudged")
    replay = replays(rollouts, {name for names in COMPARED.values() for name in names})
    students = [save_nudged(place / f"student-{seed}", task.student, seed=seed) for seed in range(NUDGES)]
    directories = [place / f"runs-{seed}" for seed in range(NUDGES)]
    jobs = [
        start_cases(task, directory, replay, *SMALL, f"student.model={student}", ranks=0)
        for directory, student in zip(directories, students, strict=True)
    ]
    for job in jobs:
        job.wait(560).expect_success()
    nudged = [metrics_of(directory, replay) for directory in directories]
    return {name: drift_of(alone[name], [runs[name] for runs in nudged]) for name in replay}


def drift_of(rows: list[dict[str, Any]], others: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """By step and metric: ROUNDED times the largest difference so far, and the rounding of a sum of values so large.

    Losses are sums of terms of either sign: their size is the largest so far, not what is left in a step where they
    cancel, and never less than that of the log-probabilities they are made of.
    """
    apart: dict[str, float] = {}
    size: dict[str, float] = {}
    answer = []
    for row, *moved in zip(rows, *others, strict=True):
        for key, value in row.items():
            apart[key] = max(apart.get(key, 0.0), *(abs(other[key] - value) for other in moved))
            size[key] = max(size.get(key, NATS), abs(value))
        answer.append({key: ROUNDED * (apart[key] + EPS * size[key]) for key in row})
        # a gate that falls the other way would make room for any defect
        assert all(answer[-1][key] < 1e-3 * size[key] for key in row), (row["step"], answer[-1])
    return answer


def replays(rollouts: Path, names: Collection[str]) -> dict[str, list[str]]:
    return {name: [*PRESETS[name], *replayed(name, rollouts)] for name in PRESETS if name in names}


def replayed(name: str, rollouts: Path) -> tuple[str, str]:
    """The overrides that give a method the rollouts of its own kind."""
    guided = build_method(PRESETS[name][0].removeprefix("method.name=")).guided
    source = name if name in SAMPLES else "tropd" if guided else "opd"
    return "rollout.engine=recorded", f"rollout.recorded_from={rollouts}/{SAMPLES.index(source)}"


def test_every_preset_trains(alone: Metrics):
    assert set(METHODS) <= set(alone)
    for name, rows in alone.items():
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), name
        for row in rows:
            assert all(value is not None and math.isfinite(value) for value in row.values()), (name, row)
            assert row["grad_norm"] > 1e-3, (name, row)
            # where it samples itself, sampler and trainer are one model, whatever temperature the method gives it
            assert name not in SAMPLES or row.get("logprob_gap_max", 0.0) < 1e-4, (name, row)
    ends = [tuple(rows[-1][key] for key in ("loss", "grad_norm")) for rows in alone.values()]
    assert len(set(ends)) == len(ends), "two of them are one"
    assert alone["sft"][0]["tokens"] == alone["tropd"][0]["prefix_length"]


@pytest.mark.timeout(900)  # alone, it also trains what it compares with
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_step_of_every_preset_has_the_metrics_of_one_rank(
    task: Task, alone: Metrics, drift: Metrics, rollouts: Path, tmp_path: Path, layout: str
):
    found = train_cases(task, tmp_path, replays(rollouts, COMPARED[layout]), *SMALL, *LAYOUTS[layout], ranks=2)
    for name, rows in found.items():
        for here, there, apart in zip(rows, alone[name], drift[name], strict=True):
            assert here.keys() == there.keys(), name
            off = {key: (here[key], there[key]) for key in here if not abs(here[key] - there[key]) <= apart[key]}
            assert off == {}, (f"{name}, step {there['step']}", {key: apart[key] for key in off})
            # the recorded tokens' log-probs were taken by the same weights: differences of sums over the vocabulary
            gaps = [here[key] for key in here if key.startswith("logprob_gap")]
            assert name not in SAMPLES or all(gap < 1e-4 for gap in gaps), (name, gaps)


# --------------------------------------------------------------------------- coincidences


def test_presets_that_coincide_have_one_training(task: Task, tmp_path: Path):
    cases = {f"{name}/{side}": pair[side] for name, pair in TWINS.items() for side in (0, 1)}
    extra = ("train.steps=3", "train.prompts_per_step=2", "optimizer.lr=1e-2")
    found = train_cases(task, tmp_path, cases, *extra, ranks=0)
    for name in TWINS:
        for one, other in zip(found[f"{name}/0"], found[f"{name}/1"], strict=True):
            for key in ("loss", "grad_norm", "reverse_kl", "tokens"):
                # losses and the like are means of terms of either sign, as large as log-probabilities
                rounding = ROUNDED * EPS * NATS
                assert one[key] == pytest.approx(other[key], rel=1e-5, abs=rounding), (name, key, one["step"])


def test_a_student_that_is_its_own_teacher_learns_nothing(task: Task, tmp_path: Path):
    # Adam would make full steps of rounding errors
    same = (
        f"teacher.model={task.student}",
        "optimizer.name=sgd",
        "optimizer.eps=1e-8",
        "optimizer.lr=1e-3",
        "train.steps=2",
        "train.prompts_per_step=2",
    )
    for name, rows in train_cases(task, tmp_path, AGREEING, *same, *LAYOUTS["tp2"], ranks=2).items():
        for row in rows:
            # with two models the gradient is above 1
            assert abs(row["loss"]) < 1e-5 and row["grad_norm"] < 1e-4, (name, row)
            assert row["outlier_fraction"] < 1e-3, (name, row)
