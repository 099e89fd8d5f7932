"""A student that is its own teacher, behind a prompt that it does not see: whose weights teach, and what leaks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tropd.config.loading import load_config
from megatron_tropd.errors import ConfigError
from megatron_tropd.teacher.moving import MovingTeacher
from tests.support.run_inputs import (
    STUDENT,
    Task,
    commands,
    make_task,
    save_model,
    steady_metrics,
    train_each,
    weights_of,
)

OWN = ('data.teacher_template="{{ prompt }}#### {{ answer }}"', "data.max_teacher_prompt_tokens=75")
QUIET = ("report.samples=0", "report.html=false", "evaluate.prompts=null", "train.prompts_per_step=1")
SELF = ("method.name=opsd", "teacher.model=student", *OWN, *QUIET)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    made = make_task(tmp_path_factory.mktemp("task"))
    # untied: a row of the input embedding has gradient where its token is read, and nowhere else
    save_model(made.student, STUDENT | {"num_hidden_layers": 2}, tied=False, seed=1)
    made.config.write_text(made.config.read_text().replace("name: tropd\n  k: 7\n  beta: 0.3", "name: opsd"))
    return made


def train_all(task: Task, directory: Path, cases: dict[str, list[str]], *, ranks: int = 0) -> dict[str, Any]:
    commands().call(
        train_each, task.config, directory, {k: [*SELF, *v] for k, v in cases.items()}, ranks=ranks, timeout_s=560
    )
    return {name: steady_metrics(directory / name) for name in cases}


def test_frozen_live_and_averaged_weights_teach_what_they_are(task: Task, tmp_path: Path):
    three = ["train.steps=3", "checkpoint.every=0", "train.minibatches=2"]
    found = train_all(
        task,
        tmp_path,
        {
            "frozen": [*three],
            "live": [*three, "teacher.update=live"],
            "average that forgets": [*three, "teacher.update=ema", "teacher.ema_decay=1e-12"],
            "average that keeps": [*three, "teacher.update=ema", "teacher.ema_decay=0.999999999999"],
            "average every third step": [*three, "teacher.update=ema", "teacher.ema_decay=0.1", "teacher.ema_every=3"],
        },
    )
    frozen, live = found["frozen"], found["live"]
    assert live[0] == frozen[0], "at first they are the same weights"
    assert live[1]["loss"] != pytest.approx(frozen[1]["loss"], rel=1e-4)
    for name, like in (("average that forgets", live), ("average that keeps", frozen)):
        for one, other in zip(found[name], like, strict=True):
            assert one == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in other.items()}, name
    assert found["average every third step"] == frozen, "three steps are not over when the third is learned from"
    # the teacher reads another prompt: the student is not its own
    assert min(row["loss"] for row in frozen + live) > 1e-3


def test_an_average_resumes_bit_for_bit_under_another_layout_too(task: Task, tmp_path: Path):
    ema = ["teacher.update=ema", "teacher.ema_decay=0.5", "train.steps=4", "checkpoint.every=2", "checkpoint.keep=2"]
    pipeline = ["student.parallel.pipeline=2"]
    whole = train_all(task, tmp_path, {"whole": [*ema, *pipeline]}, ranks=2)["whole"]
    resume = f"checkpoint.resume={tmp_path}/whole/checkpoints/step-00000002"
    again = train_all(task, tmp_path, {"again": [*ema, *pipeline, resume]}, ranks=2)["again"]
    assert again == whole[2:]
    other = train_all(task, tmp_path, {"other": [*ema, resume]})["other"]
    for one, there in zip(other, whole[2:], strict=True):
        for key in ("loss", "grad_norm", "reverse_kl"):
            assert one[key] == pytest.approx(there[key], rel=1e-4), key
    # what teaches is part of what a checkpoint must share
    outcome = commands().run(
        "train", task.config, *SELF, *ema, resume, "teacher.ema_decay=0.6", f"run_dir={tmp_path}/changed"
    )
    assert outcome.status == 2 and "teacher.ema_decay was 0.5, is 0.6" in outcome.output, outcome.output


def test_the_student_learns_nothing_of_a_token_that_the_teacher_alone_reads(task: Task, tmp_path: Path):
    step = ["train.steps=1", "checkpoint.every=0", "optimizer.lr=1e-2", "optimizer.warmup_steps=0"]
    train_all(task, tmp_path, {"first": [*step, f"rollout.record={tmp_path}/rollouts"]})
    with np.load(tmp_path / "rollouts" / "step-00000000.npz") as stored:
        read = set(stored["token_ids"].tolist())
    vocabulary = json.loads((task.student / "tokenizer.json").read_text())["model"]["vocab"]
    word, secret = next(
        (word, i) for word, i in vocabulary.items() if i not in read and word[-1] == " " and word.strip().isalpha()
    )
    replayed = ["rollout.engine=recorded", f"rollout.recorded_from={tmp_path}/rollouts"]
    told = f'data.teacher_template="{word * 3}{{{{ prompt }}}}"'
    cases = {
        update: [*step, *replayed, told, f"teacher.update={update}", f"export.hf={tmp_path}/{update}-hf"]
        for update in ("frozen", "live")
    }
    found = train_all(task, tmp_path, cases)
    before = weights_of(task.student)["model.embed_tokens.weight"]
    for update, rows in found.items():
        after = weights_of(tmp_path / f"{update}-hf")["model.embed_tokens.weight"]
        moved = set(torch.nonzero((after != before).any(1)).flatten().tolist())
        assert rows[0]["loss"] > 1e-3 and moved, "the teacher has read it"
        assert moved <= read and secret not in moved


# --------------------------------------------------------------------------- the average itself


def model_of(*values: float, dtype: torch.dtype = torch.float32) -> Any:
    chunk = torch.nn.ParameterList([torch.tensor(values, dtype=dtype)])
    return SimpleNamespace(chunks=(chunk,), finish_pending_gathers=lambda: None, present=torch.no_grad)


def test_the_average_is_the_recurrence_in_fp32_whatever_the_student_s_dtype():
    student, average, scoring = model_of(0.0, dtype=torch.bfloat16), model_of(1.0), model_of(0.0, dtype=torch.bfloat16)
    teacher = MovingTeacher(student=student, average=average, scoring=scoring, decay=0.999, every=2)
    expected = np.float64(1.0)
    for step in range(1, 2001):
        value = step % 3
        student.chunks[0][0].data.fill_(value)
        teacher.follow(step)
        if step % 2 == 0:
            expected = 0.999 * expected + 0.001 * value
    found = float(average.chunks[0][0].detach()[0])
    assert found == pytest.approx(expected, rel=1e-4)  # a thousand roundings of fp32, each forgotten by and by
    # steps of 1e-3 would be lost in bf16, which has 2**-8
    assert float(scoring.chunks[0][0].detach()[0]) == pytest.approx(expected, rel=2**-8)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["teacher.update=live", "teacher.engine=vllm"], "engine = 'vllm' does not go with update = live"),
        (["teacher.update=ema", "teacher.ranks=1"], "ranks = 1 does not go with update = ema"),
        (["teacher.update=live", "teacher.record=scores"], "does not go with update = live: weights that move"),
        (["teacher.update=ema", "teacher.recorded_from=scores"], "what they said of a sequence holds for one step"),
        (["teacher.update=live", "teacher.offload=true"], "offload = True does not go with update = live"),
        (["teacher.ema_decay=0.9"], "ema_decay = 0.9 is not read with update = frozen"),
        (["teacher.update=live", "teacher.ema_every=2"], "ema_every = 2 is not read with update = live"),
        (["teacher.update=live", "teacher.parallel.pipeline=2"], "it is laid out as the student"),
        (["teacher.like=somewhere"], "teacher.like = 'somewhere' is not read with teacher.model = student"),
        (["data.teacher_template=null"], "max_teacher_prompt_tokens = 75, but the teacher has no prompts of its own"),
        (["train.pack_tokens=80"], "cannot hold the longest sequence that the teacher reads"),
    ],
)
def test_what_cannot_be_is_refused_by_name(task: Task, changes: list[str], message: str):
    with pytest.raises(ConfigError) as refused:
        load_config(task.config, [*SELF, *changes], check_paths=False)
    assert message in " ".join(str(refused.value).split())


def test_weights_that_move_are_the_student_s_own(task: Task):
    with pytest.raises(ConfigError, match=r"is another model\. Set teacher\.model to student"):
        load_config(task.config, [*SELF, f"teacher.model={task.teacher}", "teacher.update=ema"])
    same = load_config(task.config, [*SELF, f"teacher.model={task.student}", "teacher.update=ema"])
    assert same == load_config(task.config, [*SELF, "teacher.update=ema"])


def test_a_student_compared_with_itself_is_refused(task: Task, tmp_path: Path):
    plain = ("data.teacher_template=null", "data.max_teacher_prompt_tokens=null")
    outcome = commands().run("train", task.config, *SELF, *plain, "teacher.update=live", f"run_dir={tmp_path}/run")
    assert outcome.status == 2 and "there is nothing to learn while both read" in outcome.output, outcome.output
