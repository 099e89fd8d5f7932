"""Planned bytes of every collective and message are those that Megatron-Core and this package send, rank by rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed import run_on_ranks
from tests.support.invariance import CP2, EP2, EXPERTS, PP2, SP, TP2, VPP2, Row, save_models
from tests.support.layout_cases import Case
from tests.support.tiny_models import Objective
from tests.support.traffic_cases import loss_traffic, run_cases, signal_traffic

RKL = Objective(name="rkl")


def case(
    name: str, *, ranks: int = 2, models: tuple[str, str] | None = None, distributed: bool = False, **axes: Any
) -> Case:
    row = Row(ranks=ranks, student=axes, distributed_optimizer=distributed, **({"models": models} if models else {}))
    return replace(row.case("tropd"), name=name, sgd=False)


STEPS = {
    2: [
        case("tp2", **TP2),
        case("tp2-sp", **TP2, **SP),
        replace(case("tp2-sp-bf16", **TP2, **SP), dtype="bf16"),
        replace(case("tp2-rkl", **TP2), objective=RKL, method={"name": "rkl"}),
        replace(case("tp2-sp-full", **TP2, **SP), recompute="full"),
        case("cp2", **CP2),
        replace(case("cp2-selective", **CP2), recompute="selective"),
        case("pp2", **PP2),
        case("vpp2", **VPP2),
        case("dp2"),
        case("dp2-distributed", distributed=True),
        case("ep2", **EP2, models=EXPERTS),
    ],
    4: [
        case("tp2-sp-ep2", ranks=4, **TP2, **SP, **EP2, models=EXPERTS),
        case("pp2-ep2-distributed", ranks=4, **PP2, **EP2, models=EXPERTS, distributed=True),
        case("tp2-sp-cp2-distributed", ranks=4, **TP2, **SP, **CP2, distributed=True),
        case("tp2-sp-vpp2", ranks=4, **TP2, **SP, **VPP2),
    ],
}
# (student, teacher, by hand: times that what is asked about a prediction, and what is answered, travels between ranks)
SIGNALS = [
    (TP2, TP2, 0, 0),  # the same ranks
    (TP2 | SP, PP2, 0, 1),  # the teacher's last stage is rank 1, which knows what it is asked; rank 0 gets its copy
    (PP2, TP2, 1, 0),  # the student's last stage is rank 1, which has it; rank 0 must be told what to look for
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    save_models(directory)
    return directory


@pytest.mark.parametrize("ranks", sorted(STEPS))
def test_a_step_sends_the_bytes_that_are_planned(ranks, models):
    every = run_on_ranks(run_cases, STEPS[ranks], str(models), world_size=ranks)
    for number, step in enumerate(STEPS[ranks]):
        exchanged: Counter[str] = Counter()
        for rank, found in enumerate(every):
            counted, planned = (dict(found[number][name]) for name in ("counted", "planned"))
            for name, bytes_ in (("counted", counted), ("planned", planned)):
                exchanged[name] += sum(bytes_.pop(key) for key in list(bytes_) if key[0] == "all_to_all")
            assert counted == planned, (step.name, rank)
        # a rank's share of these is the router's choice, their sum is not
        assert exchanged["counted"] == exchanged["planned"], step.name
        assert bool(exchanged["counted"]) == ("ep2" in step.name)


def test_the_loss_sends_268_bytes_per_token_forward_and_none_backward():
    tokens = 33
    for found in run_on_ranks(loss_traffic, 64, tokens, world_size=2):
        # three statistics from each of two ranks; one log-prob of each of 64 ids
        assert found["forward"] == [("all_gather", 2 * 12 * tokens), ("all_reduce", 256 * tokens)]
        assert found["backward"] == []


def test_signals_travel_once_to_every_rank_that_lacks_them(models):
    methods = {
        "tropd": None,
        "rkl": {"name": "rkl"},
        "student-top": {"name": "rkl", "form": "topk", "k": 5, "support": "student"},
    }
    cases = [
        replace(Row(ranks=2, student=student, teacher=teacher).case("tropd"), name=name, method=method)
        for student, teacher, *_ in SIGNALS
        for name, method in methods.items()
    ]
    every = run_on_ranks(signal_traffic, cases, str(models), world_size=2)
    # log-prob, entropy and 7 candidates with their ids; hidden states of 68 numbers instead; 5 log-probs that are asked
    told = {"tropd": 4 * (2 + 14), "rkl": 4 * (2 + 68), "student-top": 4 * (2 + 5 + 1)}
    for number, step in enumerate(cases):
        there, back = SIGNALS[number // len(methods)][2:]
        found = [rank[number] for rank in every]
        assert (found[0]["told"], found[0]["asked"]) == (told[step.name], 20 * (step.name == "student-top"))
        sent = sum(rank["sent"] for rank in found)
        assert sent == found[0]["valid"] * (there * found[0]["asked"] + back * told[step.name]), step.name
