"""Every model family in Megatron is the model `transformers` has: logits, gradients, weights bit for bit, answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.data.packing import pack
from megatron_tropd.models.name_table import entries, hf_shapes
from tests.support.distributed import run_on_ranks
from tests.support.family_cases import NEW_TOKENS, ROLLOUTS, Case, furthest, logits_of, run_cases, whole_logits
from tests.support.long import few
from tests.support.tiny_families import (
    FAMILIES,
    MOE,
    SIZES,
    config_of,
    load_transformers,
    on_disk_gradients,
    save_family,
)
from tests.support.tiny_models import relative_error

TP2, TP2_SP, PP2, EP2 = {"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"expert": 2}
DENSE = ["llama2", "llama3", "mistral", "qwen2", "qwen3", "r1-distill-qwen", "r1-distill-llama"]
ALL = [
    *(Case(family=family) for family in FAMILIES),
    *(Case(family=family, ranks=2, layout=layout) for family in DENSE for layout in (TP2, PP2)),
    *(
        Case(family=family, ranks=2, layout=layout)
        for family in ("qwen3-moe", "mixtral")
        for layout in (TP2_SP, PP2, EP2)
    ),
    Case(family="llama3-tied", ranks=2, layout=PP2),
    Case(family="qwen2-tied", ranks=2, layout=TP2_SP),
    Case(family="qwen3-moe-raw", ranks=2, layout=EP2),
    Case(family="mixtral", ranks=2),  # two whole replicas
    Case(family="mixtral", balance=0.3),
    Case(family="qwen3-moe", ranks=2, layout=TP2_SP, balance=0.3),
    Case(family="mixtral", ranks=2, layout=EP2, balance=0.3),
    Case(family="qwen3-moe", ranks=4, layout=TP2_SP | EP2, balance=0.3),
    Case(family="mixtral", ranks=4, layout=PP2 | EP2),
]
CASES = few(
    ALL,
    # every family by itself, every axis for those with and without experts, tied and untied
    *(Case(family=family).name for family in FAMILIES),
    *("llama3-te2-2", "qwen3-te2-2", "qwen2-pi2-2"),
    *("llama3-tied-pi2-2", "qwen2-tied-te2-se1-2", "mixtral-ex2-2", "qwen3-moe-te2-se1-2", "qwen3-moe-raw-ex2-2"),
    *("mixtral-alone-2", "mixtral-ex2-2-balanced", "qwen3-moe-te2-se1-ex2-4-balanced", "mixtral-pi2-ex2-4"),
)
BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for seed, name in enumerate(FAMILIES):
        save_family(root / name, name, seed=seed)
    return root


Found = Callable[[Case], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(root: Path) -> Found:
    @cache  # a failure too: it would be the same for every case of that size
    def together(ranks: int) -> list[dict[str, Any]] | Exception:
        try:
            cases = [case for case in CASES if case.ranks == ranks]
            return run_on_ranks(run_cases, cases, str(root), world_size=ranks, timeout_s=500)
        except Exception as error:
            return error

    def of(case: Case) -> list[dict[str, Any]]:
        ranks = together(case.ranks)
        if isinstance(ranks, Exception):
            raise ranks
        return [rank[case.name] for rank in ranks]

    return of


# --------------------------------------------------------------------------- what transformers says


@dataclass(frozen=True)
class Truth:
    logits: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]
    moved: dict[str, Tensor]  # the gradients where every weight is one step of fp32 away, up or down


def agree(found: dict[str, Tensor], truth: dict[str, Tensor], limit: float = 1e-5) -> bool:
    return furthest(found, truth) < limit


@pytest.fixture(scope="module")
def truth(root: Path) -> Callable[[Case], Truth]:
    """By plain autograd, one sequence at a time, in fp64."""

    @cache
    def of(family: str, balance: float, replicas: int) -> Truth:
        model = load_transformers(root / family)
        logits, loss = differentiated(model, balance, replicas)
        gradients = {name: gradient.clone() for name, gradient in on_disk_gradients(root / family, model).items()}
        model.zero_grad()
        nudge(model)
        differentiated(model, balance, replicas)
        return Truth(logits, loss, gradients, on_disk_gradients(root / family, model))

    return lambda case: of(case.family, case.balance, case.replicas if case.balance else 1)


def differentiated(model: Any, balance: float, replicas: int) -> tuple[dict[str, Tensor], float]:
    """Logits and loss of the rollouts; gradients are left in the model."""
    logits, losses, routers = {}, [], {}
    for rollout in ROLLOUTS:
        tokens = torch.from_numpy(rollout.token_ids)
        out = model(tokens[None], **({"output_router_logits": True} if balance else {}))
        logits[str(rollout.sequence_id)] = out.logits[0, :-1].detach()
        losses.append(F.cross_entropy(out.logits[0, :-1], tokens[1:], reduction="none"))
        # one [predictions, E] per layer
        routers[rollout.sequence_id] = [layer[: len(tokens) - 1] for layer in out.router_logits] if balance else []
    loss = torch.cat(losses).mean()
    total = loss + balance * balancing_loss(routers, model.config, replicas) if balance else loss
    total.backward()
    return logits, float(loss.detach())


def nudge(model: Any) -> None:
    """Move every weight by one step of fp32, up or down; whole-number draws are the same on every machine."""
    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        signs = 2 * torch.randint(2, weight.shape, generator=generator) - 1
        weight.data.mul_(1 + torch.finfo(torch.float32).eps * signs)


def balancing_loss(routers: dict[int, list[Tensor]], config: Any, replicas: int) -> Tensor:
    """``sum over layers of E * sum_e f_e p_e``, a mean over packs weighted by their predictions (Switch, eq. 4)."""
    packs = [one for replica in pack(ROLLOUTS, max_tokens=64, multiple_of=4, num_replicas=replicas) for one in replica]
    losses, sizes = [], []
    for one in packs:
        ids = [i for i in one.sequence_ids.tolist() if i >= 0]
        for layer in zip(*(routers[i] for i in ids), strict=True):
            probability = torch.cat(layer).softmax(-1)
            chosen = probability.topk(config.num_experts_per_tok).indices
            f = torch.bincount(chosen.flatten(), minlength=config.num_local_experts) / chosen.numel()
            losses.append(config.num_local_experts * (f * probability.mean(0)).sum())
            sizes.append(one.num_valid)
    weights = torch.tensor(sizes) / sum(one.num_valid for one in packs)
    return (torch.stack(losses) * weights).sum()


# --------------------------------------------------------------------------- claims


@BY_NAME
def test_logits_are_those_of_transformers(case, found, truth):
    expected = truth(case).logits
    vocab_size = next(iter(expected.values())).size(-1)
    assert agree(whole_logits(found(case), "logits", vocab_size), expected)


@BY_NAME
def test_what_was_imported_is_exported_bit_for_bit(case, found, root):
    found(case)
    exported: dict[str, Tensor] = {}
    for file in (root / "exported" / case.name / "before").glob("*.safetensors"):
        exported |= load_file(file)
    original = load_file(root / case.family / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(exported[name].equal(tensor) for name, tensor in original.items())


@BY_NAME
def test_published_weights_fill_a_model_in_any_order(case, found):
    assert all(rank["restored"] for rank in found(case))


@BY_NAME
def test_every_gradient_is_that_of_plain_autograd(case, found, truth):
    rank, expected = found(case)[0], truth(case)
    assert rank["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert rank["gradients"].keys() == expected.gradients.keys()
    errors = {name: relative_error(rank["gradients"][name], g) for name, g in expected.gradients.items()}
    # families differ in how far rounding goes (attention without norms of queries and keys amplifies it): as far as
    # that of every weight, for the sqrt(n)/2 steps that sums of n terms, here the ids, are rounded by
    moved = [relative_error(expected.moved[name], g) for name, g in expected.gradients.items()]
    limit = math.sqrt(SIZES["vocab_size"]) / 2 * max(moved)
    assert limit < 1e-4  # a defect of a part in ten thousand is always seen
    assert max(errors.values()) < limit, max(errors, key=errors.__getitem__)


@BY_NAME
def test_the_gradient_norm_counts_every_weight_once(case, found, truth):
    norm = torch.cat([g.flatten() for g in truth(case).gradients.values()]).norm()
    assert all(rank["grad_norm"] == pytest.approx(float(norm), rel=1e-5) for rank in found(case))


@BY_NAME
def test_the_exported_student_gives_the_logits_it_was_trained_to(case, found, root):
    ranks, before = found(case), root / case.family
    model = load_transformers(root / "exported" / case.name / "after")
    after = logits_of(model)
    nudge(model)
    moved = logits_of(model)
    vocab_size = config_of(before)["vocab_size"]
    trained = whole_logits(ranks, "trained", vocab_size)
    # weights that a large step has moved amplify rounding by their own measure: that of one step of fp32 in each of
    # them, for the sqrt(n)/2 steps that sums of n terms, here a row of the MLP, are rounded by
    limit = math.sqrt(config_of(before)["intermediate_size"]) / 2 * furthest(moved, after)
    assert limit < 1e-4  # a defect of a part in ten thousand is always seen
    assert agree(trained, after, limit)
    assert not agree(trained, whole_logits(ranks, "logits", vocab_size))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_names_every_tensor_of_the_checkpoint_once(name, root):
    architecture = read_architecture(root / name)
    table = entries(architecture, range(architecture.num_layers), embedding=True, output=True)
    names = [hf for entry in table for hf in entry.hf]
    weights = HFWeights(root / name)
    assert len(names) == len(set(names)) == len(weights)
    assert {hf: weights[hf].shape for hf in weights} == hf_shapes(architecture)


@pytest.fixture(scope="module")
def generated(root: Path) -> Callable[[str], list[list[int]]]:
    """What `transformers` writes after the first half of every rollout."""

    @cache
    def of(family: str) -> list[list[int]]:
        model = load_transformers(root / family)
        model.generation_config.eos_token_id = None
        written = []
        for rollout in ROLLOUTS:
            prompt = torch.from_numpy(rollout.token_ids[: (len(rollout.token_ids) + 1) // 2])[None]
            whole = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )
            written.append(whole[0, prompt.size(1) :].tolist())
        return written

    return of


@pytest.mark.parametrize("case", [case for case in CASES if case.decodes], ids=lambda case: case.name)
def test_cached_greedy_decoding_is_what_transformers_generates(case, found, generated):
    assert all(rank["answers"] == generated(case.family) for rank in found(case))


def test_experts_are_really_chosen(root):
    """Otherwise a router that always picks the same experts would pass."""
    for name in MOE:
        model = load_transformers(root / name)
        with torch.no_grad():
            out = model(torch.from_numpy(ROLLOUTS[2].token_ids)[None], output_router_logits=True)
        for layer in out.router_logits:
            assert len(layer.topk(2).indices.unique()) == model.config.num_local_experts
