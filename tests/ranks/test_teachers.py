"""Several teachers: every sequence is graded by its source's, at no teacher's expense for another's sequences."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tropd.config.sections import Layout
from megatron_tropd.engine.context import valid_positions
from megatron_tropd.errors import ConfigError
from megatron_tropd.methods import build_method
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from megatron_tropd.setup.build import World, load_model
from megatron_tropd.setup.validate import check_one_teacher
from megatron_tropd.teacher.engines.megatron import MegatronTeacher
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.teacher.routing import RoutedTeacher
from megatron_tropd.train import rollout_queue as batches
from megatron_tropd.types import Pack, Rollout, TeacherOutputs
from tests.support.distributed import run_on_ranks
from tests.support.run_inputs import (
    Task,
    assert_metrics_agree,
    commands,
    make_task,
    save_model,
    split_prompts,
    steady_metrics,
)
from tests.support.tiny_models import STUDENT, TEACHER, hf_logprobs, load_hf, random_rollouts, save_qwen3

VOCAB = STUDENT["vocab_size"]
# the last one has a single sequence: on one of two replicas there is nothing for it to grade
NAMES = ("", "b", "", "b", "b", "", "", "b", "", "c", "")
ENDS = (90, 3)  # that count as one token: on both shards of a tensor-parallel teacher
ROLLOUTS = [replace(one, teacher=name) for one, name in zip(random_rollouts(0, vocab_size=VOCAB), NAMES, strict=True)]


def packed(rollouts: list[Rollout], world: World) -> list[list[Pack]]:
    run: Any = SimpleNamespace(
        world=world,
        train=SimpleNamespace(pack_tokens=48),
        student=SimpleNamespace(architecture=SimpleNamespace(hidden_size=STUDENT["hidden_size"])),
    )
    return batches.pack_rollouts(run, rollouts)


def grade(root: str) -> dict[str, Any]:
    """On every rank: log-probs by sequence, and which sequences every teacher was given."""
    builder, device = GroupBuilder(), initialize_distributed()
    layouts = {"": Layout(tensor=2), "b": Layout(), "c": Layout(pipeline=2)}
    student = builder.build(Layout())
    groups = {name: builder.build(layout) for name, layout in layouts.items()}
    world = World(
        device=device,
        student=student,
        teacher=groups[""],
        sampler=student,
        teachers={name: own for name, own in groups.items() if name},
    )
    given: dict[str, set[int]] = {}

    class Watched(MegatronTeacher):
        def score(self, packs: Any, spec: Any, asked: Any = None) -> list[TeacherOutputs | None]:
            ids = {int(i) for replica in packs for pack in replica for i in pack.sequence_ids}
            given.setdefault(self._role, set()).update(ids)
            return super().score(packs, spec, asked)

    teachers = {}
    for name, own in groups.items():
        model = load_model(Path(root) / f"teacher-{name}", own, dtype=torch.float32, device=device).freeze()
        teachers[name] = Watched(model, student, vocab_size=VOCAB, role=name)
    packs = packed(ROLLOUTS, world)
    signals = RoutedTeacher(teachers).score(packs, TeacherRequest(top_k=2, end_ids=ENDS))
    found: dict[int, Any] = {}
    for pack, signal in zip(packs[student.replica], signals, strict=True):
        assert signal is not None
        sequence_N = torch.from_numpy(pack.sequence_T[valid_positions(pack)])
        for sequence in pack.sequence_ids.tolist():
            own_N = sequence_N == sequence
            assert signal.topk_logprob_NK is not None
            assert signal.end_logprob_NX is not None
            found[sequence] = (
                signal.logprob_N[own_N],
                signal.topk_logprob_NK[own_N],
                signal.end_logprob_NX[own_N],
            )
    only = [one for one in ROLLOUTS if one.teacher == "b"]
    before = dict(given)
    given.clear()
    RoutedTeacher(teachers).score(packed(only, world), TeacherRequest())
    return {"found": found, "given": before, "given alone": given}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    for seed, (name, sizes) in enumerate({"": TEACHER, "b": STUDENT, "c": TEACHER}.items()):
        save_qwen3(root / f"teacher-{name}", sizes, seed=seed)
    return root


@pytest.fixture(scope="module")
def graded(root: Path) -> list[dict[str, Any]]:
    return run_on_ranks(grade, str(root), world_size=2)


def test_every_sequence_gets_the_grades_of_its_own_teacher(graded, root):
    models = {name: load_hf(root / f"teacher-{name}") for name in set(NAMES)}
    found = graded[0]["found"] | graded[1]["found"]
    assert found.keys() == set(range(len(ROLLOUTS)))
    for one in ROLLOUTS:
        with torch.no_grad():
            truth_LV = hf_logprobs(models[one.teacher], one.token_ids, VOCAB)[one.prompt_length - 1 :]
        target_L = torch.from_numpy(one.token_ids[one.prompt_length :])
        logprob_N, top_NK, end_NX = found[one.sequence_id]
        torch.testing.assert_close(end_NX.double(), truth_LV[:, list(ENDS)], atol=1e-4, rtol=0)
        torch.testing.assert_close(logprob_N.double(), truth_LV.gather(1, target_L[:, None])[:, 0], atol=1e-4, rtol=0)
        torch.testing.assert_close(top_NK.double(), truth_LV.topk(2).values, atol=1e-4, rtol=0)


def test_a_teacher_is_given_its_own_sequences_and_none_without_any(graded):
    own = {name: {one.sequence_id for one in ROLLOUTS if one.teacher == name} for name in set(NAMES)}
    for rank in graded:
        assert rank["given"] == own
        assert rank["given alone"] == {"b": own["b"]}


def test_rollouts_take_their_teacher_from_their_prompt():
    prompts: Any = [SimpleNamespace(teacher=name, teacher_ids=None) for name in ("a", "")]
    named = batches.with_teachers([replace(one, teacher="") for one in ROLLOUTS[:6]], prompts)
    assert [one.teacher for one in named] == ["a", "a", "a", "", "", ""]


# --------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    task = make_task(tmp_path_factory.mktemp("task"))
    split_prompts(task, first=6)
    save_model(task.directory / "stranger", {"hidden_size": 44} | _SIZES, tied=False, seed=9)
    return task


_SIZES = {
    "intermediate_size": 62,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 14,
}


def command(task: Task, run_dir: Path, *, second: str = "", teachers: str = "", **changes: Any) -> list[object]:
    """``second``: the name of the second source's teacher."""
    named = f", teacher: {second}" if second else ""
    sources = (
        f"{{name: one, prompts: {task.directory}/first.jsonl}}",
        f"{{name: two, prompts: {task.directory}/second.jsonl{named}}}",
    )
    settings = {
        "data.prompts": "null",
        "data.sources": f"[{', '.join(sources)}]",
        "teachers": f"[{teachers}]",
        "train.steps": 3,
        "checkpoint.every": 0,
        "evaluate.prompts": "null",
        **changes,
    }
    return ["train", task.config, f"run_dir={run_dir}", *(f"{key}={value}" for key, value in settings.items())]


_AHEAD = {"method.support": "union", "method.ppo_clip": 0.2, "train.minibatches": 2, "rollout.ahead": 1}


@pytest.mark.parametrize(
    ("method", "changes"), [pytest.param("tropd", {}, marks=pytest.mark.long), ("tropd", _AHEAD), ("exopd", {})]
)
def test_two_teachers_that_are_the_same_model_are_one_teacher(task, tmp_path, method, changes):
    if method != "tropd":
        task = replace(task, directory=shutil.copytree(task.directory, tmp_path / "task"))
        text = task.config.read_text()
        task.config.write_text(text.replace("  name: tropd\n  k: 7\n  beta: 0.3\n", f"  name: {method}\n"))
        assert task.config.read_text() != text
    again = f"{{name: again, model: {task.teacher}, parallel: {{tensor: 2}}}}"
    two = command(task, tmp_path / "two", second="again", teachers=again, **changes)
    commands().run(*two, ranks=2).expect_success()
    commands().run(*command(task, tmp_path / "one", **changes), ranks=2).expect_success()
    assert_metrics_agree(steady_metrics(tmp_path / "two"), steady_metrics(tmp_path / "one"))


def test_the_plan_names_every_teacher(task, tmp_path):
    other = f"{{name: other, model: {task.directory}/stranger, parallel: {{pipeline: 2}}}}"
    _, *arguments = command(task, tmp_path / "run", second="other", teachers=other)
    output = commands().run("check", *arguments).expect_success().output
    assert "teacher 'other'" in output and "a multiple of 2" in output


def test_another_teacher_for_one_source_is_another_run(task, tmp_path):
    other = f"{{name: other, model: {task.directory}/stranger}}"
    found = [
        commands().run(*command(task, tmp_path / name, second="other", teachers=teachers), ranks=0)
        for name, teachers in (("other", other), ("same", other.replace("stranger", "teacher")))
    ]
    for outcome in found:
        outcome.expect_success()
    one, two = (steady_metrics(tmp_path / name) for name in ("other", "same"))
    assert one[0]["response_length"] == two[0]["response_length"]
    assert abs(one[0]["reverse_kl"] - two[0]["reverse_kl"]) > 1e-3


def test_a_teacher_with_another_vocabulary_is_refused_by_its_name(task, tmp_path):
    other = save_model(tmp_path / "other", {"hidden_size": 44} | _SIZES, tied=False, seed=3)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = commands().run(
        *command(task, tmp_path / "run", second="other", teachers=f"{{name: other, model: {other}}}")
    )
    assert outcome.status != 0 and "teacher 'other'" in outcome.output


def test_methods_that_compare_hidden_states_take_one_teacher():
    teacher = SimpleNamespace(engine="megatron", recorded_from=None)
    config: Any = SimpleNamespace(method=SimpleNamespace(name="gkd"), teachers=[1], teacher=teacher)
    with pytest.raises(ConfigError, match="gkd compares full vocabularies"):
        check_one_teacher(config, build_method("gkd"))
    check_one_teacher(config, build_method("tropd"))


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_an_engine_that_can_only_be_alone_is_refused_beside_other_teachers(engine: str):
    teacher = SimpleNamespace(engine=engine, recorded_from=None)
    config: Any = SimpleNamespace(method=SimpleNamespace(name="opd"), teachers=[1, 2], teacher=teacher)
    said = f"teacher.engine={engine} is for runs with one teacher, and teachers holds 2 more. Set it to megatron."
    with pytest.raises(ConfigError, match=said):
        check_one_teacher(config, build_method("opd"))
    config.teachers = []
    check_one_teacher(config, build_method("opd"))
