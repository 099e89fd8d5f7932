"""The one-file example and one process of the package: two programs, one loss, one gradient."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_tropd.data.random import Stream, uniforms
from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.train.loop import score_and_pack
from megatron_tropd.train.rollout_queue import score_rollouts
from megatron_tropd.types import Prompt, Region, Rollout
from tests.support.layout_cases import VOCAB, Case, assemble, config_of, student_directory, whole_gradients
from tests.support.tiny_models import STUDENT, TEACHER, Objective, random_rollouts, relative_error, save_qwen3

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPT = EXAMPLES / "one_file_opd.py"
STEP = 3  # of the recorded rollouts and their draws

# megatron-core warns of its own defaults when a model is built and trained
pytestmark = [
    pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\.core"),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:megatron\.core"),
]


@pytest.fixture(scope="module")
def one_file() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("one_file_opd", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_qwen3(folder / "untied", STUDENT, seed=1)
    save_qwen3(folder / "tied", STUDENT, seed=2, tied=True)
    save_qwen3(folder / "teacher", TEACHER, seed=3)
    return folder


@pytest.fixture(scope="module")
def builder() -> Iterator[GroupBuilder]:
    mine = not dist.is_initialized()
    initialize_distributed()
    yield GroupBuilder()
    if mine:
        dist.destroy_process_group()


# --------------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    ("name", "tied", "pack_tokens"),
    [("opd", False, 4096), ("tropd", False, 4096), ("tropd", True, 60)],
    ids=["opd", "tropd", "tropd-tied-many-packs"],
)
def test_one_process_of_the_package_has_the_loss_and_every_gradient_of_the_one_file(
    one_file, models, builder, name, tied, pack_tokens
):
    objective = Objective(name=name)
    case = Case(name=name, objective=objective, tied=tied, pack_tokens=pack_tokens)
    rollouts = random_rollouts(STEP, vocab_size=VOCAB)

    run = assemble(config_of(case, models), builder)
    (packs,) = score_and_pack(run, score_rollouts(run, rollouts, watch=Stopwatch()), step=STEP, watch=Stopwatch())
    assert (len(packs) > 1) == (pack_tokens < 4096)
    package = run.trainer.probe(packs)
    found = whole_gradients(run.student)

    student, teacher = (load(models / directory) for directory in (student_directory(case), "teacher"))
    log = one_file.accumulate(
        student,
        teacher,
        [as_sequence(one_file, rollout, objective.seed) for rollout in rollouts],
        one_file.Objective(method=name, k=objective.k, beta=objective.beta),
    )
    expected = {key: p.grad for key, p in student.named_parameters()}

    assert package.loss == pytest.approx(log["loss"], rel=1e-5)
    assert package.stats["reverse_kl"] == pytest.approx(log["reverse KL"], rel=1e-5)
    if name == "tropd":
        assert 0.0 < log["outliers"] < 1.0  # both terms are at work
        assert package.stats["outlier_fraction"] == pytest.approx(log["outliers"], abs=1e-9)
    assert sum(rollout.count(Region.PREFIX) for rollout in rollouts) > 0
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        assert relative_error(found[key], gradient) < 1e-5, key


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def as_sequence(one_file: ModuleType, rollout: Rollout, seed: int) -> Any:
    length = len(rollout.token_ids)
    drawn = uniforms(seed=seed, step=STEP, sequence_id=rollout.sequence_id, stream=Stream.GATE, count=length)
    return one_file.Sequence(
        ids=torch.from_numpy(rollout.token_ids),
        prompt=rollout.prompt_length,
        prefix=rollout.count(Region.PREFIX),
        uniform=torch.from_numpy(drawn),
    )


# --------------------------------------------------------------------------- the oracle itself


def test_gradients_at_the_logits_are_those_of_the_formulas(one_file):
    torch.manual_seed(0)
    num_tokens, vocab, k, beta = 9, 7, 3, 0.25
    student_NV = torch.randn(num_tokens, vocab, dtype=torch.float64, requires_grad=True)
    teacher_NV = torch.randn(num_tokens, vocab, dtype=torch.float64)
    teacher_NV[8] = 0.3 * student_NV[8].detach()  # flatter than the student: the partial sum is negative
    target_N = torch.arange(num_tokens) % vocab
    # three of each kind: a draw of 0 is accepted, one of nearly 1 is not unless p >= q
    region_N = torch.tensor([one_file.PREFIX] * 3 + [one_file.CONTINUATION] * 6)
    q, p = student_NV.detach().softmax(-1), teacher_NV.softmax(-1)
    rows = torch.arange(num_tokens)
    q_y, p_y = q[rows, target_N], p[rows, target_N]
    uniform_N = torch.zeros(num_tokens, dtype=torch.float64)
    uniform_N[6:] = ((p_y / q_y).clamp(max=1.0) + 1e-6)[6:]  # just refused, or just beyond 1
    score_NV = torch.nn.functional.one_hot(target_N, vocab) - q
    candidate_NV = torch.zeros_like(p).scatter(1, p.topk(k).indices, 1.0)

    policy_NV = -(p_y / q_y).log()[:, None] * score_NV
    forward_NV = (p * candidate_NV).sum(-1, keepdim=True) * q - p * candidate_NV
    expected_NV = torch.cat([-beta * score_NV[:3], policy_NV[3:6], forward_NV[6:]])

    objective = one_file.Objective(method="tropd", k=k, beta=beta)
    loss_N, facts = one_file.token_loss(student_NV, teacher_NV, target_N, region_N, uniform_N, objective)
    loss_N.sum().backward()
    assert loss_N[8] < 0
    torch.testing.assert_close(student_NV.grad, expected_NV)
    assert facts["outliers"][3:].tolist() == [0.0] * 3 + [1.0] * 3

    student_NV.grad = None
    one_file.token_loss(student_NV, teacher_NV, target_N, region_N, uniform_N, one_file.Objective(method="opd"))[
        0
    ].sum().backward()
    torch.testing.assert_close(student_NV.grad, torch.cat([torch.zeros(3, vocab).double(), policy_NV[3:]]))


def test_chunks_and_padding_do_not_change_the_step(one_file, models, monkeypatch):
    student, teacher = load(models / "untied"), load(models / "teacher")
    sequences = [as_sequence(one_file, r, 0) for r in random_rollouts(STEP, vocab_size=VOCAB)]
    gradients = []
    for chunk in (100, 1):
        monkeypatch.setattr(one_file, "CHUNK", chunk)
        student.zero_grad()
        one_file.accumulate(student, teacher, sequences, one_file.Objective(k=5))
        gradients.append(student.lm_head.weight.grad.clone())
    assert relative_error(*gradients) < 1e-5


@pytest.mark.parametrize("step", [0, 1, 17, 39])
@pytest.mark.parametrize("length", [1, 30, 90])
def test_guided_sequences_get_the_prefix_the_package_gives(one_file, step, length):
    from megatron_tropd.methods.schedule import cosine

    prompt = Prompt(index=0, token_ids=np.arange(4), text="", response_ids=np.arange(length))
    fraction = cosine().fraction(step, 40)
    (request,) = make_requests([prompt], samples=0, guided=1, fraction=fraction, max_new_tokens=64)
    assert one_file.prefix_length(length, step=step, steps=40, budget=64) == len(request.prefix_ids)


def test_cosine_gives_all_then_half_then_nothing(one_file):
    # (1 + cos(pi t / N)) / 2 at t = 0, N/3, N/2 and at the last step of 6: 1, 3/4, 1/2, 0.067
    given = [one_file.prefix_length(20, step=t, steps=6, budget=64) for t in (0, 2, 3, 5)]
    assert given == [20, 15, 10, 1]
    assert one_file.prefix_length(20, step=0, steps=6, budget=8) == 8


def test_samples_end_at_the_end_token_or_the_budget_and_use_shared_ids_only(one_file, models):
    torch.manual_seed(0)
    contexts = [torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 10]), torch.tensor([11])] * 8
    budgets, end, vocab = [12, 3, 0, 12] * 8, 4, 50
    answers = one_file.sample(load(models / "untied"), contexts, budgets, end=end, vocab=vocab)
    assert max(int(answer.max()) for answer in answers if len(answer)) < vocab < STUDENT["vocab_size"]
    assert any(len(answer) < budget for answer, budget in zip(answers, budgets, strict=True))
    for answer, budget in zip(answers, budgets, strict=True):
        assert len(answer) == budget or int(answer[-1]) == end
        assert end not in answer[:-1].tolist()


# --------------------------------------------------------------------------- the script


@pytest.mark.parametrize("method", ["opd", "tropd"])
def test_the_script_runs(one_file, tmp_path, capsys, method):
    # the student knows more ids than the teacher, as families whose members are padded differently do
    for name, sizes in (("student", STUDENT | {"vocab_size": 230}), ("teacher", TEACHER | {"vocab_size": 223})):
        save_qwen3(tmp_path / name, sizes | {"max_position_embeddings": 128}, scale=0.02)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(EXAMPLES / "demo" / "teacher" / file, tmp_path / name)
    lines = (EXAMPLES / "demo" / "data" / "train.jsonl").read_text().splitlines()[:5]
    rows = [row | {"response": row["prompt"]} for row in map(json.loads, lines)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    command = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"), "--method", method]
    command += ["--prompts", str(prompts), "--steps", "2", "--prompts-per-step", "3", "--max-new-tokens", "9"]
    one_file.main(command)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["1", "2"]
    assert all("nan" not in line and "accuracy" in line for line in printed)


@pytest.mark.parametrize("chat", [True, False])
def test_prompts_are_those_of_the_package(one_file, chat):
    from transformers import AutoTokenizer

    folder = EXAMPLES / "demo" / "teacher"
    with (EXAMPLES / "demo" / "data" / "train.jsonl").open() as lines:
        text = json.loads(next(lines))["prompt"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    if not chat:
        tokenizer.chat_template = None
    expected = load_tokenizer(folder, chat_template=chat).render_prompt(text)
    assert one_file.prompt_ids(text, tokenizer).tolist() == expected


def test_the_script_says_that_guidance_needs_responses(one_file, tmp_path, capsys, models):
    shutil.copytree(models / "untied", tmp_path / "m")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "demo" / "teacher" / file, tmp_path / "m")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "There are 9 plums."}\n')
    with pytest.raises(SystemExit):
        one_file.main(["--student", str(tmp_path / "m"), "--teacher", str(tmp_path / "m"), "--prompts", str(prompts)])
    assert "'response' in every row" in capsys.readouterr().err


def test_the_file_stands_on_torch_and_transformers_alone():
    imported = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}
