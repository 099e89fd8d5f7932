"""A student and a teacher that are one model but for the token that ends answers: the commonest difference of all.

With the ends for one token there is nothing to learn, whatever the objective; told apart, there is.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tropd.rollout.engines.recorded import read_rollouts
from tests.support.run_inputs import ROOT, STUDENT, TEACHER, Task, commands, make_task, save_model, steady_metrics

PAD, EOS = 0, 1  # of the demo's tokenizer: the teacher ends with the one, the student with the other
QUIET = ("report.samples=0", "report.html=false", "evaluate.prompts=null", "checkpoint.every=0", "train.steps=2")
UNGUIDED = "rollout.guided_per_prompt=0"
METHODS: dict[str, list[str]] = {
    "opd": ["method.name=opd"],
    "tropd": ["method.name=tropd", "method.tail=bucket", UNGUIDED],
    "reverse KL, full": ["method.name=rkl"],
    "JSD, tempered": ["method.name=gkd", "method.temperature=0.7", "method.on_policy_fraction=1"],
    "reverse KL, top k of both": ["method.name=rkl", "method.form=topk", "method.k=6", "method.support=union"],
}
Metrics = dict[str, list[dict[str, Any]]]

# Two passes over the same weights may add up in another order. A log-prob is a sum over the 219 ids, of terms as large
# as it is: rounded 219 times by half a step of fp32 up or down, which together is sqrt(219)/2 = 8 steps
APART = 8 * 2.0**-23 * math.log(219)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    from safetensors.torch import load_file, save_file

    made = make_task(tmp_path_factory.mktemp("task"))
    save_model(made.student, STUDENT | {"num_hidden_layers": 2}, tied=False, seed=1)
    weights = made.student / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"][[PAD, EOS]] *= 4.0  # ends that are likely somewhere
    save_file(tensors, weights, metadata={"format": "pt"})
    shutil.rmtree(made.teacher)
    shutil.copytree(made.student, made.teacher)
    tensors["lm_head.weight"][[PAD, EOS]] = tensors["lm_head.weight"][[EOS, PAD]]
    save_file(tensors, made.teacher / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((made.teacher / "tokenizer_config.json").read_text())
    (made.teacher / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<pad>"}))
    (made.teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": PAD}))
    made.config.write_text(made.config.read_text().replace("name: tropd\n  k: 7\n  beta: 0.3", "name: opd"))
    return made


def train_each(config: str, overrides: list[str], cases: dict[str, list[str]]) -> None:
    """On the ranks: one training per directory."""
    from megatron_tropd.config.loading import load_config
    from megatron_tropd.train.session import run_training

    for directory, changes in cases.items():
        run_training(load_config(config, [*overrides, *changes, f"run_dir={directory}"]))


@pytest.fixture(scope="module")
def trained(task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Every method with the ends as one (and by itself), then a replay."""
    directory = tmp_path_factory.mktemp("trained")
    cases = {f"{directory}/class/{name}": [*changes] for name, changes in METHODS.items()}
    cases |= {f"{directory}/exact/{name}": [*changes, "method.end_tokens=exact"] for name, changes in METHODS.items()}
    cases[f"{directory}/class/opd"] += [f"rollout.record={directory}/rollouts", f"export.hf={directory}/export"]
    cases[f"{directory}/class/tropd"] += [f"teacher.record={directory}/scores", "teacher.record_values=fp32"]
    cases[f"{directory}/replay"] = [*METHODS["tropd"], f"teacher.recorded_from={directory}/scores"]
    outcome = commands().start_call(train_each, task.config, list(QUIET), cases).wait(290).expect_success()
    return directory, outcome.output


def test_a_teacher_on_ranks_of_its_own_says_of_the_ends_what_a_shared_one_says(
    task: Task, tmp_path_factory: pytest.TempPathFactory
):
    """With other weights, so that there is something to learn: bit for bit, as nothing is summed in another order."""
    directory = tmp_path_factory.mktemp("apart")
    other = save_model(directory / "teacher", TEACHER, tied=False, seed=3)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": PAD}))
    own = {"rkl": METHODS["reverse KL, full"], "union": METHODS["reverse KL, top k of both"]}
    settings = [*QUIET, f"teacher.model={other}"]
    commands().call(train_each, task.config, settings, {f"{directory}/shared/{name}": own[name] for name in own})
    for name, changes in own.items():
        command = ("train", task.config, *settings, *changes, "teacher.ranks=1", f"run_dir={directory}/apart/{name}")
        found = commands().run(*command, ranks=2, timeout_s=200).expect_success()
        assert "they count as one token" in found.output
    for name in own:
        shared, apart = (steady_metrics(directory / where / name) for where in ("shared", "apart"))
        assert apart == shared and shared[0]["reverse_kl"] > 0.1, name


def test_a_base_student_learns_to_stop_from_a_teacher_that_ends_otherwise(tmp_path: Path):
    """The demo's student, which ends with ``<pad>`` and not as surely as the teacher with ``<eos>``: told apart, it has
    unlearned to end after two such steps (less than a fifth of its responses do).
    """
    from safetensors.torch import load_file, save_file

    demo = ROOT / "examples" / "demo"
    base = shutil.copytree(demo / "student", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[[PAD, EOS]] = embedding[[EOS, PAD]]
    embedding[PAD] *= 0.3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<pad>"}))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": PAD}))
    changes = ["method.name=opd", "optimizer.lr=1e-3", "optimizer.warmup_steps=1", "train.prompts_per_step=8"]
    changes += ["rollout.samples_per_prompt=2", "rollout.max_new_tokens=48", "export.hf=null", UNGUIDED, *QUIET]
    changes += ["train.steps=16", "student.parallel.tensor=1", "teacher.parallel.tensor=1", f"student.model={base}"]
    train = (f"data.prompts={demo}/data/train.jsonl", f"teacher.model={demo}/teacher", f"run_dir={tmp_path}/run")
    job = commands().start("train", demo / "demo.yaml", *changes, *train, cwd=ROOT)
    job.until(lambda: lines_of(tmp_path / "run" / "metrics.jsonl") >= 4)
    job.kill()
    finished = [row["finished_fraction"] for row in steady_metrics(tmp_path / "run")[:4]]
    assert finished[0] < 0.9 and np.mean(finished[2:]) > 0.8, finished


def lines_of(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def of(trained: tuple[Path, str], mode: str, metric: str) -> dict[str, float]:
    """At the first step, by method: Adam makes a step of what rounding leaves of a gradient."""
    return {name: abs(steady_metrics(trained[0] / mode / name)[0][metric]) for name in METHODS}


def test_with_one_end_nothing_is_left_to_learn_whatever_the_objective(trained):
    for metric, rounding in (("reverse_kl", APART), ("loss", APART), ("grad_norm", 2e-5), ("outlier_fraction", 1e-5)):
        assert {k: v for k, v in of(trained, "class", metric).items() if not v < rounding} == {}, metric
    # the comparison sees something
    assert min(of(trained, "exact", "reverse_kl").values()) > 1e-2
    assert min(of(trained, "exact", "grad_norm").values()) > 1e-2


def test_sampling_stops_at_either_end(trained):
    rollouts = [rollout for step in range(2) for rollout in read_rollouts(trained[0] / "rollouts", step)]
    last = {int(rollout.token_ids[-1]) for rollout in rollouts if rollout.finished}
    assert last == {PAD, EOS}
    for rollout in rollouts:
        written = rollout.token_ids[-len(rollout.model_logprob) :]
        assert not np.isin(written[:-1], (PAD, EOS)).any()
        assert rollout.finished == bool(np.isin(written[-1], (PAD, EOS)))


def test_an_export_names_both_ends(trained):
    assert json.loads((trained[0] / "export" / "generation_config.json").read_text())["eos_token_id"] == [EOS, PAD]


def test_the_first_lines_name_both_sets_and_what_is_made_of_them(trained):
    lines = trained[1].splitlines()
    student = next(
        i for i, line in enumerate(lines) if line.startswith("responses end, to the student, with 1 '<eos>'")
    )
    assert lines[student + 1].startswith("responses end, to the teacher, with 0 '<pad>'")
    assert lines[student + 2].startswith("they count as one token")
    assert trained[1].count("WARNING: they differ") == len(METHODS)  # told apart they are not without a word


def test_a_recording_replays_with_the_same_ends_and_with_no_others(trained, task):
    directory = trained[0]
    assert steady_metrics(directory / "replay") == steady_metrics(directory / "class" / "tropd")
    other = ["train", task.config, *QUIET, *METHODS["tropd"], f"teacher.recorded_from={directory}/scores"]
    outcome = commands().run(*other, "method.end_tokens=exact", f"run_dir={directory}/other")
    assert outcome.status != 0 and "end tokens" in outcome.output


def test_check_prints_both_sets_and_refuses_where_that_is_wanted(task, tmp_path):
    found = commands().run("check", task.config, f"run_dir={tmp_path}").expect_success().output
    assert "to the student, with 1 '<eos>'" in found and "to the teacher, with 0 '<pad>'" in found
    refused = commands().run("check", task.config, f"run_dir={tmp_path}", "method.end_tokens=refuse")
    assert refused.status != 0 and "method.end_tokens=refuse" in refused.output
    assert "1 '<eos>'" in refused.output and "0 '<pad>'" in refused.output
