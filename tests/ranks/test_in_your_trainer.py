"""The examples of docs/library.md: loss and every gradient of two tensor ranks are those of fp64, by the textbook."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from tests.support.distributed import run_on_ranks
from tests.support.megatron_writer import Written, _build, _slice
from tests.support.tiny_families import config_of, load_transformers, save_family

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "in_your_trainer"
VOCAB, LENGTH, BATCH = 101, 14, 3
UNTIED, TIED = Written(name="student", family="llama2", tensor=2), Written(name="tied", family="qwen2-tied", tensor=2)


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"in_your_trainer_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trainers")
    for seed, (name, family) in enumerate((("student", "llama2"), ("teacher", "llama2"), ("tied", "qwen2-tied"))):
        save_family(root / name, family, seed=seed)
    return root


def batch_of(root: Path) -> dict[str, Tensor]:
    """Random tokens, the labels after them, and what a teacher in fp64 says of them."""
    rng = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=rng)
    logprob = teacher_logprobs(root, tokens[:, :-1])
    top = logprob.topk(3, dim=-1)
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(LENGTH)[None].expand(BATCH, -1),
        "attention_mask": torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None],
        "loss_mask": (torch.rand(BATCH, LENGTH, generator=rng) > 0.3).float(),
        "topk_ids": top.indices,
        "topk_logprobs": top.values.float(),
        "label_logprobs": logprob.gather(-1, tokens[:, 1:, None])[..., 0].float(),
    }


def teacher_logprobs(root: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return load_transformers(root / "teacher")(tokens).logits.log_softmax(-1)


def truth(root: Path, name: str, loss_of: Any) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over the mask and its gradient by Hugging Face names, in fp64."""
    model, batch = load_transformers(root / name), batch_of(root)
    logprob = model(batch["tokens"]).logits.log_softmax(-1)
    mask = batch["loss_mask"].double()
    loss = (loss_of(logprob, batch, root) * mask).sum() / mask.sum()
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


def reverse_kl(logprob: Tensor, batch: dict[str, Tensor], root: Path) -> Tensor:
    return (logprob.exp() * (logprob - teacher_logprobs(root, batch["tokens"]))).sum(-1)


def policy_gradient(logprob: Tensor, batch: dict[str, Tensor], root: Path) -> Tensor:
    own = logprob.gather(-1, batch["labels"][..., None])[..., 0]
    return -(batch["label_logprobs"].double() - own.detach()) * own


def topk_forward_kl(logprob: Tensor, batch: dict[str, Tensor], root: Path) -> Tensor:
    own, teacher = logprob.gather(-1, batch["topk_ids"]), batch["topk_logprobs"].double()
    rest, teacher_rest = (1 - own.exp().sum(-1)).log(), (1 - teacher.exp().sum(-1)).log()
    listed = (teacher.exp() * (teacher - own)).sum(-1)
    return listed + teacher_rest.exp() * (teacher_rest - rest)


def run_examples(root: str) -> dict[str, Any]:
    """Loss, and the largest relative error of a gradient, of every example under tensor parallelism."""
    from megatron.core import parallel_state

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    found, place = {}, Path(root)
    for name, case, loss_of, run in (
        ("megatron_core_loop", UNTIED, reverse_kl, _run_loop),
        ("megatron_lm", TIED, topk_forward_kl, _run_lm),
        ("megatron_bridge", UNTIED, policy_gradient, _run_bridge),
    ):
        said, hf = config_of(place / case.name), load_file(place / case.name / "model.safetensors")
        (model,) = _build(case, said, hf)
        loss = run(example(name), model, place)
        expected, gradients = truth(place, case.name, loss_of)
        found[name] = {"loss": loss, "truth": expected, "gradient": _worst(model, said, gradients)}
    parallel_state.destroy_model_parallel()
    return found | {"sequence parallel": _sequence_parallel_error()}


def _sequence_parallel_error() -> float:
    """Error of this rank's rows of the hidden states' gradient, where each rank holds half of the positions."""
    from megatron_tropd.losses.vocab_parallel import enter_vocabulary, linear_logprobs

    rng, rank = torch.Generator().manual_seed(3), dist.get_rank()
    hidden_bsD, weight_VD = torch.randn(BATCH, 6, 5, generator=rng), torch.randn(14, 5, generator=rng)
    labels, grad = torch.randint(0, 13, (BATCH, 6), generator=rng), torch.randn(BATCH, 6, generator=rng)
    mine = hidden_bsD.chunk(2, dim=1)[rank].clone().requires_grad_()
    hidden_TD = enter_vocabulary(mine, dist.group.WORLD, sequence_parallel=True)
    ids_TK = labels.transpose(0, 1).reshape(-1, 1)
    own = weight_VD.chunk(2)[rank]
    found = linear_logprobs(hidden_TD, own, ids_TK, group=dist.group.WORLD, vocab_size=13).logprob_TK[:, 0]
    (found * grad.transpose(0, 1).reshape(-1)).sum().backward()
    exact = hidden_bsD.double().requires_grad_()
    logprob = (exact @ weight_VD[:13].double().T).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    (logprob * grad).sum().backward()
    expected = exact.grad.chunk(2, dim=1)[rank]
    return float((mine.grad - expected).norm() / expected.norm())


def _run_loop(module: Any, student: Any, root: Path) -> float:
    teacher_hf = load_file(root / "teacher" / "model.safetensors")
    (teacher,) = _build(UNTIED, config_of(root / "teacher"), teacher_hf)
    module.prepare(student, teacher)
    return float(module.step(student, teacher, batch_of(root), group=dist.group.WORLD, vocab_size=VOCAB))


def _run_lm(module: Any, model: Any, root: Path) -> float:
    from megatron_tropd.losses.vocab_parallel import hand_on_hidden_states

    hand_on_hidden_states(model)
    output, loss_func = module.forward_step(iter([batch_of(root)]), model)
    return _backward(*loss_func(output)[:2])


def _run_bridge(module: Any, model: Any, root: Path) -> float:
    from megatron_tropd.losses.vocab_parallel import hand_on_hidden_states

    hand_on_hidden_states(model)
    output, loss_func = module.forward_step(None, iter([batch_of(root)]), model)
    return _backward(*loss_func(output)[:2])


def _backward(total: Tensor, count: Tensor) -> float:
    """What the schedule does with a sum and a number of tokens."""
    loss = total / count
    loss.backward()
    return float(loss.detach())


def _worst(model: Any, said: dict[str, Any], gradients: dict[str, Tensor]) -> float:
    """Largest error of a parameter's gradient, relative to that gradient's norm; rows of padding must have none."""
    rank, worst = dist.get_rank(), 0.0
    for name, parameter in model.named_parameters():
        layer, plain = None, name
        if name.startswith("decoder.layers."):
            number, plain = name.removeprefix("decoder.layers.").split(".", 1)
            layer = int(number)
        expected = _slice(plain, layer, gradients, model.config, said, rank=rank, size=2, first_expert=0)
        if layer is None and plain != "decoder.final_layernorm.weight":
            expected[VOCAB - rank * len(expected) :] = 0.0  # the vocabulary's padding
        error = (parameter.grad.double() - expected).norm() / expected.norm()
        worst = max(worst, float(error))
    return worst


@pytest.fixture(scope="module")
def found(root: Path) -> list[dict[str, Any]]:
    return run_on_ranks(run_examples, str(root), world_size=2, timeout_s=500)


@pytest.mark.parametrize("name", ["megatron_core_loop", "megatron_lm", "megatron_bridge"])
def test_loss_and_every_gradient_are_those_of_fp64(found: list[dict[str, Any]], name: str):
    for rank in found:
        assert rank[name]["loss"] == pytest.approx(rank[name]["truth"], rel=1e-5)
        assert rank[name]["gradient"] < 1e-5


def test_under_sequence_parallelism_each_rank_gets_the_gradient_of_its_positions(found: list[dict[str, Any]]):
    assert all(rank["sequence parallel"] < 1e-5 for rank in found)


def test_a_hugging_face_trainer_has_loss_and_gradients_of_fp64(root: Path):
    module, batch = example("hugging_face"), batch_of(root)
    student, teacher = (load_transformers(root / name, torch.float32) for name in ("student", "teacher"))
    trainer = module.Distiller.__new__(module.Distiller)  # its loss alone: no loop, no accelerator
    trainer.teacher, trainer.beta = teacher.requires_grad_(False), 0.5
    labels = torch.cat([batch["tokens"][:, :1], batch["labels"]], dim=1)
    tokens, kept = labels, torch.cat([torch.zeros(BATCH, 1), batch["loss_mask"]], dim=1) > 0
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels.where(kept, -100)}
    loss = trainer.compute_loss(student, inputs)
    loss.backward()
    exact = load_transformers(root / "student")
    own, other = exact(batch["tokens"]).logits.log_softmax(-1), teacher_logprobs(root, batch["tokens"])
    middle = torch.logaddexp(own, other) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    jsd = ((own.exp() * (own - middle)).sum(-1) + (other.exp() * (other - middle)).sum(-1)) / 2
    expected = (jsd * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for (name, one), (_, two) in zip(student.named_parameters(), exact.named_parameters(), strict=True):
        assert (one.grad - two.grad).norm() <= 1e-5 * two.grad.norm(), name


@pytest.mark.parametrize("module", ["losses.vocab_parallel", "methods", "data.packing"])
def test_importing_the_library_brings_torch_and_nothing_else_of_weight(module: str):
    code = f"import sys, megatron_tropd.{module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    heavy = {"megatron", "transformers", "omegaconf", "yaml", "typer", "rich", "safetensors", "pyarrow", "jinja2"}
    assert not heavy & set(done.stdout.split())


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        code = [line for line in path.read_text().splitlines() if line.strip()]
        assert 25 <= len(code) <= 75, path.name
