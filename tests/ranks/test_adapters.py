"""A student with adapters is the model that `peft` makes of it: logits, gradients, a step, under every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.adapter_cases import ALPHA, RANK, STEP, Case, run_cases, whole_matrices
from tests.support.distributed import run_on_ranks
from tests.support.family_cases import ROLLOUTS, furthest, logits_of, whole_logits
from tests.support.long import few
from tests.support.tiny_families import config_of, load_transformers, save_family
from tests.support.tiny_models import relative_error

TP2, TP2_SP, TP4, PP2 = {"tensor": 2}, {"tensor": 2, "sequence": True}, {"tensor": 4}, {"pipeline": 2}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
# what has adapters, and sizes other than the family's
FAMILIES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "llama2": (ATTENTION + MLP, {"num_hidden_layers": 4, "intermediate_size": 52}),
    "qwen2-tied": (["q_proj", "v_proj", "up_proj", "down_proj"], {}),
    "qwen3": (["k_proj", "gate_proj", "o_proj"], {}),
    "qwen3-moe": (ATTENTION, {}),
}
WORLD = 4  # ranks; what a layout leaves of them are replicas
ALL = [
    Case(family="llama2"),
    Case(family="llama2", recompute="full"),
    Case(family="qwen3", layout=TP2),
    Case(family="llama2", layout=TP2),
    Case(family="llama2", layout=TP4),
    Case(family="llama2", layout=TP4 | {"sequence": True}),
    Case(family="llama2", layout=TP2_SP | PP2, recompute="full"),
    Case(family="llama2", layout=PP2 | {"virtual_pipeline": 2}),
    Case(family="llama2", layout={"context": 2}),
    Case(family="qwen2-tied", layout=PP2),
    Case(family="qwen2-tied", layout=TP2_SP),
    Case(family="qwen3-moe", layout=TP2_SP | {"expert": 2}),
]
CASES = few(
    ALL,
    *("llama2-replicas", "llama2-te4-se1", "llama2-te2-se1-pi2-full", "llama2-pi2-vi2", "llama2-co2"),
    *("qwen2-tied-te2-se1", "qwen3-te2", "qwen3-moe-te2-se1-ex2"),
)
DROPPED = [
    Case(family="llama2"),
    Case(family="llama2", shared=True),
    Case(family="llama2", layout=TP2, recompute="full"),
    Case(family="llama2", layout=TP2_SP, recompute="full", shared=True),
    Case(family="llama2", layout=PP2 | {"context": 2}),
]
BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# context ranks hold stretches of sequences: what they compute is compared by its gradients, as in all other cases
WITH_LOGITS = [case for case in CASES if case.layout.get("context", 1) == 1]
WITH_LOGITS_BY_NAME = pytest.mark.parametrize("case", WITH_LOGITS, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, (targets, sizes)) in enumerate(FAMILIES.items()):
        soften(save_family(root / name, name, seed=seed, sizes=sizes))
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(load_transformers(root / name, torch.float32), config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.2)  # B too, which begins as zeros: a swapped one is seen
        model.save_pretrained(root / f"{name}-adapter")
    return root


def soften(directory: Path) -> None:
    """Scale the matrices of layers down: attention without norms of queries and keys would amplify fp32's rounding."""
    tensors = load_file(directory / "model.safetensors")
    soft = {name: 0.4 * tensor if "_proj." in name else tensor for name, tensor in tensors.items()}
    save_file(soft, directory / "model.safetensors", metadata={"format": "pt"})


Found = Callable[[Case], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(root: Path) -> Found:
    ranks = run_on_ranks(run_cases, CASES, DROPPED, str(root), world_size=WORLD, timeout_s=300)
    return lambda case: [rank[case.name] for rank in ranks]


@pytest.fixture(scope="module")
def dropped(root: Path, found: Found) -> Found:
    return lambda case: found(replace(case, prefix="dropped-"))


@dataclass(frozen=True)
class Truth:
    logits: dict[str, Tensor]
    base: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]
    stepped: dict[str, Tensor]
    trained: dict[str, Tensor]


@pytest.fixture(scope="module")
def truth(root: Path) -> Callable[[Case], Truth]:
    """By `peft` and plain autograd, one sequence at a time, in fp64."""

    @cache
    def of(family: str) -> Truth:
        base = logits_of(load_transformers(root / family))
        model = in_peft(root, family, root / f"{family}-adapter")
        matrices = {key.replace(".default.", "."): p for key, p in model.named_parameters() if p.requires_grad}
        losses = []
        for rollout in ROLLOUTS:
            tokens = torch.from_numpy(rollout.token_ids)
            losses.append(F.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none"))
        loss = torch.cat(losses).mean()
        loss.backward()
        logits, gradients = logits_of(model), {key: p.grad.clone() for key, p in matrices.items()}
        torch.optim.AdamW(
            matrices.values(), STEP.lr, (STEP.beta1, STEP.beta2), STEP.eps, weight_decay=STEP.weight_decay
        ).step()
        stepped = {key: p.detach().clone() for key, p in matrices.items()}
        return Truth(logits, base, float(loss.detach()), gradients, stepped, logits_of(model))

    return lambda case: of(case.family)


def in_peft(root: Path, family: str, adapter: Path) -> Any:
    model = load_transformers(root / family)
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).double()


def agree(found: dict[str, Tensor], truth: dict[str, Tensor]) -> bool:
    return furthest(found, truth) < 1e-5


def whole(ranks: list[dict[str, Any]], key: str, root: Path, case: Case) -> dict[str, Tensor]:
    return whole_logits(ranks, key, config_of(root / case.family)["vocab_size"])


# --------------------------------------------------------------------------- claims


@WITH_LOGITS_BY_NAME
def test_logits_are_those_of_peft(case, found, truth, root):
    logits = whole(found(case), "logits", root, case)
    assert agree(logits, truth(case).logits)
    assert not agree(logits, truth(case).base)


@WITH_LOGITS_BY_NAME
def test_switched_off_the_student_is_its_base(case, found, truth, root):
    assert agree(whole(found(case), "base", root, case), truth(case).base)


@BY_NAME
def test_what_is_read_unmerged_is_the_base_bit_for_bit(case, found, root):
    original = load_file(root / case.family / "model.safetensors")
    for rank in found(case):
        assert all(rank["unmerged"][name].equal(tensor) for name, tensor in original.items())


@BY_NAME
def test_every_gradient_is_that_of_peft(case, found, truth):
    ranks, expected = found(case), truth(case)
    gradients = whole_matrices(ranks, "gradients")
    assert ranks[0]["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert gradients.keys() == expected.gradients.keys()
    errors = {key: relative_error(gradients[key], g) for key, g in expected.gradients.items()}
    assert max(errors.values()) < 1e-5, max(errors, key=errors.__getitem__)


@BY_NAME
def test_the_gradient_norm_counts_every_matrix_once(case, found, truth):
    norm = torch.cat([g.flatten() for g in truth(case).gradients.values()]).norm()
    assert all(rank["grad_norm"] == pytest.approx(float(norm), rel=1e-5) for rank in found(case))


@BY_NAME
def test_a_step_of_the_optimizer_is_that_of_peft(case, found, truth, root):
    ranks, expected = found(case), truth(case)
    stepped = whole_matrices(ranks, "stepped")
    errors = {key: relative_error(stepped[key], matrix) for key, matrix in expected.stepped.items()}
    assert max(errors.values()) < 1e-5, max(errors, key=errors.__getitem__)
    assert all(rank["base_untouched"] for rank in ranks)
    if case in WITH_LOGITS:
        assert agree(whole(ranks, "trained", root, case), expected.trained)


@BY_NAME
def test_an_adapter_goes_through_bit_for_bit_and_peft_loads_ours(case, found, truth, root):
    found(case)
    exported = root / "exported" / case.name
    before = load_file(exported / "adapter-before" / "adapter_model.safetensors")
    given = load_file(root / f"{case.family}-adapter" / "adapter_model.safetensors")
    assert before.keys() == given.keys()
    assert all(before[key].equal(matrix) for key, matrix in given.items())
    ours = in_peft(root, case.family, exported / "adapter-after")
    assert agree(logits_of(ours), truth(case).trained)
    again = exported / "again"
    ours.float().save_pretrained(again)
    written, there = (load_file(path / "adapter_model.safetensors") for path in (exported / "adapter-after", again))
    assert written.keys() == there.keys()
    assert all(there[key].equal(matrix) for key, matrix in written.items())


@BY_NAME
def test_merged_weights_are_those_of_peft_and_the_same_under_every_layout(case, found, truth, root):
    found(case)
    exported = root / "exported" / case.name
    assert agree(logits_of(load_transformers(exported / "merged")), truth(case).trained)
    merged: dict[str, Tensor] = {}
    for file in (exported / "merged").glob("*.safetensors"):
        merged |= load_file(file)
    theirs = in_peft(root, case.family, exported / "adapter-after").merge_and_unload().state_dict()
    for name in [name for name in merged if "_proj.weight" in name and ".experts." not in name]:
        # products and sums in fp64, rounded once: what fp64 says, to the bit but where its own rounding decides
        assert (merged[name] - theirs[name].float()).abs().max() <= torch.finfo(torch.float32).eps * 4


@BY_NAME
def test_gradients_and_optimizer_hold_adapters_alone(case, found, root):
    ranks = found(case)
    matrices = load_file(root / f"{case.family}-adapter" / "adapter_model.safetensors")
    if not case.layout:
        elements = sum(matrix.numel() for matrix in matrices.values())
        assert all(rank["trained_elements"] == {"gradients": elements, "optimizer": elements} for rank in ranks)
    for rank in ranks:
        held = sum(matrix["part"].numel() for matrix in rank["stepped"].values())
        assert rank["trained_elements"] == {"gradients": held, "optimizer": held}


def test_our_settings_are_read_by_peft(found, root):
    found(CASES[0])
    config = peft.LoraConfig.from_pretrained(root / "exported" / CASES[0].name / "adapter-after")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (RANK, ALPHA, 0.0)
    assert set(config.target_modules) == set(FAMILIES["llama2"][0])
    text = json.loads((root / "exported" / CASES[0].name / "adapter-after" / "adapter_config.json").read_text())
    assert text["base_model_name_or_path"] == str((root / "llama2").absolute())


# --------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("case", DROPPED[1:], ids=lambda case: case.name)
def test_every_layout_and_packing_drops_the_same(case, dropped):
    for update in ("none dropped", "update 0", "update 1"):
        gradients, expected = (whole_matrices(dropped(one), update) for one in (case, DROPPED[0]))
        errors = {key: relative_error(gradients[key], gradient) for key, gradient in expected.items()}
        # both are rounded, each as far as the other claims here allow
        assert max(errors.values()) < 2e-5, (update, max(errors, key=errors.__getitem__))


def test_updates_drop_different_inputs_and_probes_none(dropped):
    ranks = dropped(DROPPED[0])
    assert len({ranks[0]["loss"], ranks[0]["loss 0"], ranks[0]["loss 1"]}) == 3
    ways = [whole_matrices(ranks, way) for way in ("none dropped", "update 0", "update 1")]
    for number, one in enumerate(ways):
        for other in ways[:number]:
            assert min(relative_error(one[key], other[key]) for key in one) > 0.01
