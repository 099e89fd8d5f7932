"""Gradients of every objective under tensor parallelism beside autograd of the textbook formula.

On the ranks each objective is computed the way the engine computes it: ``linear_topk`` and ``linear_logprobs`` on
shards of the output weights make the views, ``Method.token_loss`` the loss per token, weights and one division by the
global count the loss, and the region mapping sums the hidden states' gradient. In the parent the truth of
``parity_truth`` is differentiated in fp64 on whole rows of logits. ``parity_page`` makes a page of the outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.engine.views import (
    StudentScores,
    TrainPack,
    ends_as_one,
    picked_ids,
    student_rows,
    support_of,
    views_of,
)
from megatron_tropd.losses import gates, terms
from megatron_tropd.losses.end_class import at_ids, with_ends
from megatron_tropd.losses.support import log_tail
from megatron_tropd.losses.vocab_parallel import linear_divergence, linear_logprobs, linear_topk
from megatron_tropd.methods import build_method
from megatron_tropd.methods.base import Method
from megatron_tropd.parallel.collectives import copy_to_region
from megatron_tropd.types import Pack, Region, StudentView, SupportKind, TeacherOutputs, TeacherView, TokenView
from tests.support import parity_truth as truth
from tests.support.distributed import run_on_ranks
from tests.support.parity_cells import CELLS, SUPPORTS
from tests.support.parity_problems import LOW_PRECISION, PROBLEMS, REPLICATED, Problem, peaked

WORLDS = (1, 2, 4)

# --------------------------------------------------------------------------- what the package computes, on the ranks


def shard_of(weight_VD: Tensor, problem: Problem, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows, in the problem's dtype; nan beyond the true size."""
    padded = torch.full((problem.padded, weight_VD.shape[1]), torch.nan, dtype=torch.float64)
    padded[: len(weight_VD)] = weight_VD
    return padded.chunk(dist.get_world_size(group))[dist.get_rank(group)].to(problem.dtype, copy=True)


Layout = tuple[int, dist.ProcessGroup, dist.ProcessGroup]  # this rank's replica, its tensor- and data-parallel group
# "hidden" [cells, T, D] whole, "weight" [cells, v, D] of this rank's shard, "loss" [cells], "least" [cells] of a token
Gradients = dict[str, Tensor]


def on_ranks(problems: Sequence[Problem]) -> dict[str, Any]:
    """The gradients of every cell of every problem, of the log tail, and of methods that coincide."""
    layouts = {replicas: layout(replicas) for replicas in sorted({problem.replicas for problem in problems})}
    _, tensor, _ = layouts[1]
    return {
        "cells": {problem.name: gradients(problem, *layouts[problem.replicas]) for problem in problems},
        "tails": {mass: tail_of(mass, tensor) for mass in MASSES},
        "coincidences": {name: coincidence(*pair, tensor) for name, pair in COINCIDENCES.items()},
    }


def layout(replicas: int) -> Layout:
    """Replicas are the outer dimension of the world."""
    world, rank = dist.get_world_size(), dist.get_rank()
    tensor = world // replicas
    tp_groups = [dist.new_group(list(range(r * tensor, (r + 1) * tensor))) for r in range(replicas)]
    dp_groups = [dist.new_group(list(range(t, world, tensor))) for t in range(tensor)]
    return rank // tensor, tp_groups[rank // tensor], dp_groups[rank % tensor]


def gradients(problem: Problem, replica: int, tp: dist.ProcessGroup, dp: dist.ProcessGroup) -> Gradients:
    """Of every cell, as the engine's step leaves them: summed over packs and replicas, then divided once."""
    hidden_TD = problem.student[0].to(problem.dtype).requires_grad_()
    weight_vD = shard_of(problem.student[1], problem, tp).requires_grad_()
    slices = problem.slices(replica)
    packs = [losses(problem, hidden_TD[part], weight_vD, part, tp) for part in slices]
    totals = [
        sum((loss_T * problem.weight_T[part]).sum() for part, loss_T in zip(slices, every, strict=True))
        for every in zip(*packs, strict=True)
    ]
    partial = [torch.autograd.grad(total, [hidden_TD, weight_vD], retain_graph=True) for total in totals]
    hidden_NTD, weight_NvD = (torch.stack(parts) for parts in zip(*partial, strict=True))
    hidden_NTD = summed_by_the_mapping(hidden_NTD, tp)
    denominator = torch.stack([problem.weight_T[part].double().sum() for part in slices]).sum()
    dist.all_reduce(denominator, group=dp)
    whole = {"hidden": hidden_NTD.float(), "weight": weight_NvD.float()}  # Megatron keeps sums of gradients in fp32
    whole["loss"] = torch.stack(totals).detach()
    for gradient in whole.values():
        dist.all_reduce(gradient, group=dp)
        gradient.mul_((1.0 / denominator).item())
    lowest = [[loss_T.detach().min() for loss_T in every if len(loss_T)] for every in zip(*packs, strict=True)]
    return whole | {"least": torch.tensor([min(every, default=0.0) for every in lowest])}


def summed_by_the_mapping(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The region mapping's backward on the partial gradients of many losses at once."""
    entered = torch.zeros_like(partial, requires_grad=True)
    return torch.autograd.grad(copy_to_region(entered, group), entered, partial)[0]


def losses(
    problem: Problem, hidden_TD: Tensor, weight_vD: Tensor, part: slice, group: dist.ProcessGroup
) -> list[Tensor]:
    """Of one pack: every cell's loss per token."""
    tokens = tokens_of(problem, part)
    seen = Scores(problem, hidden_TD, weight_vD, part, group)
    views = {key: seen.views(*key) for key in product(SUPPORTS, (False, True))}
    result = []
    for cell in CELLS:
        method = Method(gate=gates.ALL, trusted=cell.build(problem.k))
        result.append(method.token_loss(*views[method.needs.support, method.needs.tail_mass], tokens).loss_T)
    return result


def tokens_of(problem: Problem, part: slice) -> TokenView:
    target_T = problem.target_T[part]
    return TokenView(
        region_T=torch.full_like(target_T, int(Region.CONTINUATION)),
        uniform_T=torch.rand(problem.tokens, generator=torch.Generator().manual_seed(80))[part],
        sequence_T=torch.zeros_like(target_T),
        position_T=torch.arange(len(target_T)),
        target_T=target_T,
        rollout_logprob_T=torch.zeros(len(target_T)),
        advantage_T=truth.advantages(problem.tokens)[part],
    )


class Scores:
    """What both models say of one pack: the views that the engine would hand to a method, for any support."""

    def __init__(
        self, problem: Problem, hidden_TD: Tensor, weight_vD: Tensor, part: slice, group: dist.ProcessGroup
    ) -> None:
        self._problem, self._part, self._group = problem, part, group
        self._student = (hidden_TD, weight_vD)
        self._target_T1 = problem.target_T[part][:, None]
        self._options: dict[str, Any] = {
            "group": group,
            "vocab_size": problem.vocab,
            "temperature": problem.temperature,
            "chunk_tokens": problem.chunk_tokens,
        }
        self._teacher = self._given(problem.teacher)
        ids_TJ = with_ends(self._target_T1, problem.ends)
        self._old_TJ, self._base_TJ = (
            linear_logprobs(*self._given(model), ids_TJ, **self._options).logprob_TK
            for model in (problem.old, problem.base)
        )

    def _given(self, model: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return model[0][self._part].to(self._problem.dtype), shard_of(model[1], self._problem, self._group)

    def views(self, support: SupportKind, tail: bool) -> tuple[StudentView, TeacherView]:
        outputs, target_T, ends = self._signal(support, tail), self._target_T1[:, 0], self._problem.ends
        term = terms.fkl_topk(k=self._problem.k, support=support, tail="bucket" if tail else "none")
        old_T = self._old_TJ[:, 0]
        if ends:
            old_T = at_ids(old_T, target_T, ends, self._old_TJ[:, 1:])
        item = TrainPack(
            pack=cast(Pack, None),  # no view is of it
            tokens=tokens_of(self._problem, self._part),
            weight_N=self._problem.weight_T[self._part],
            outputs=ends_as_one(outputs, target_T, ends),
            support=support_of(outputs, target_T, Method(gate=gates.ALL, trusted=term, end_ids=ends)),
            old=StudentScores(old_T, old_T, old_T),
            end_ids=ends,
        )
        rows = student_rows(
            linear_logprobs(*self._student, picked_ids(item), **self._options, tail=tail),
            item,
            divergence=lambda kind, beta: linear_divergence(
                *self._student, *self._teacher, kind=kind, beta=beta, end_ids=ends, **self._options
            ),
        )
        return views_of(item, rows)[:2]

    @torch.no_grad()
    def _signal(self, support: SupportKind, tail: bool) -> TeacherOutputs:
        """What the teacher answers: its own likeliest ids where they play a part, the student's where it asks."""
        problem, options, k = self._problem, self._options, self._problem.k
        own = support != "student"
        query_TJ = self._target_T1[:, :0]
        if support in ("student", "union"):
            given = support_ids(problem, "student")[self._part] if problem.given_support else None
            query_TJ = linear_topk(*self._student, k, **options).ids_TK if given is None else given
        named = 1 + query_TJ.shape[1]
        listed_TJ = with_ends(torch.cat([self._target_T1, query_TJ], dim=1), problem.ends)
        if own and not problem.given_support:
            top = linear_topk(*self._teacher, k, ids_TJ=listed_TJ, **options, tail=tail)
            ids_TK, logprob_TK, logprob_TJ = top.ids_TK, top.logprob_TK, top.picked_logprob_TJ
            entropy_T, logtail_T = top.entropy_T, top.logtail_T
        else:
            ids_TK = support_ids(problem, "teacher")[self._part] if own else listed_TJ[:, :0]
            out = linear_logprobs(*self._teacher, torch.cat([listed_TJ, ids_TK], dim=1), **options, tail=tail)
            logprob_TJ, logprob_TK = out.logprob_TK.split([listed_TJ.shape[1], ids_TK.shape[1]], dim=1)
            entropy_T, logtail_T = out.entropy_T, out.logtail_T
        assert logprob_TJ is not None
        return TeacherOutputs(
            logprob_N=logprob_TJ[:, 0],
            topk_ids_NK=ids_TK,
            topk_logprob_NK=logprob_TK,
            query_ids_NJ=query_TJ,
            query_logprob_NJ=logprob_TJ[:, 1:named],
            logtail_N=logtail_T,
            entropy_N=entropy_T,
            base_logprob_N=self._base_TJ[:, 0],
            end_logprob_NX=logprob_TJ[:, named:],
            base_end_logprob_NX=self._base_TJ[:, 1:],
        )


# --------------------------------------------------------------------------- the log tail by itself

MASSES = (1e-3, 1e-5, 1e-7, 1e-15)


def tail_of(mass: float, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The log mass outside a support that holds nearly everything, its gradients, and what ``1 - sum`` would say."""
    hidden_TD, weight_VD, ids_TK = peaked(mass)
    problem = Problem(name="peaked")
    hidden_TD, weight_vD = hidden_TD.float().requires_grad_(), shard_of(weight_VD, problem, group).requires_grad_()
    out = linear_logprobs(hidden_TD, weight_vD, ids_TK, group=group, vocab_size=problem.vocab, tail=True)
    assert out.logtail_T is not None
    hidden, weight = torch.autograd.grad(out.logtail_T.sum(), [hidden_TD, weight_vD])
    return {
        "logtail": out.logtail_T.detach(),
        "one_minus_sum": log_tail(out.logprob_TK),
        "hidden": summed_by_the_mapping(hidden, group),
        "weight": weight,
    }


# --------------------------------------------------------------------------- methods that coincide

UNGUIDED = {"prefix_schedule": "none"}
Options = dict[str, Any]
COINCIDENCES: dict[str, tuple[Options, Options]] = {
    "tropd(gate=all), unguided = opd": ({"name": "tropd", "gate": "all", **UNGUIDED}, {"name": "opd"}),
    "tropd(gate=none), unguided = fkl(form=topk, tail=none)": (
        {"name": "tropd", "gate": "none", "k": 5, **UNGUIDED},
        {"name": "fkl", "form": "topk", "tail": "none", "k": 5},
    ),
    "aopd = tropd(gate=probability_gap), unguided": (
        {"name": "aopd", "k": 5},
        {"name": "tropd", "gate": "probability_gap", "k": 5, **UNGUIDED},
    ),
    "gkd(beta=0) = fkl": ({"name": "gkd", "beta": 0.0}, {"name": "fkl"}),
    "gkd(beta=1) = rkl": ({"name": "gkd", "beta": 1.0}, {"name": "rkl"}),
    "local_support(k=V) = rkl": ({"name": "local_support", "k": 37}, {"name": "rkl"}),
    "eopd(alpha=0) = opd(ppo_clip=0.2)": ({"name": "eopd", "alpha": 0.0}, {"name": "opd", "ppo_clip": 0.2}),
    "fkl(form=topk, tail=bucket, k=V) = fkl": (
        {"name": "fkl", "form": "topk", "tail": "bucket", "k": 37},
        {"name": "fkl"},
    ),
    "rkl(form=topk, tail=bucket, k=V) = rkl": (
        {"name": "rkl", "form": "topk", "tail": "bucket", "k": 37},
        {"name": "rkl"},
    ),
    "exopd(lam=1) = opd": ({"name": "exopd", "lam": 1.0}, {"name": "opd"}),
    "tropd_soft = mean of tropd over 1001 draws of the gate": (
        {"name": "tropd", "k": 5, **UNGUIDED, "draws": 1001},
        {"name": "tropd_soft", "k": 5, **UNGUIDED},
    ),
}


def coincidence(first: Options, second: Options, group: dist.ProcessGroup) -> list[float]:
    """Relative difference of two methods' losses, hidden and weight gradients."""
    one, other = (method_gradients(options, group) for options in (first, second))
    assert all(float(x.norm()) > 0.0 for x in other)
    return [relative_error(a, b.double()) for a, b in zip(one, other, strict=True)]


def method_gradients(options: Options, group: dist.ProcessGroup) -> list[Tensor]:
    """(loss per token, hidden gradient, this shard's weight gradient); with ``draws`` the mean over the gate's."""
    options = dict(options)
    draws = options.pop("draws", None)
    method = build_method(**options)
    problem = Problem(name="coincidence", k=method.needs.top_k or 5)
    hidden_TD = problem.student[0].float().requires_grad_()
    weight_vD = shard_of(problem.student[1], problem, group).requires_grad_()
    views = Scores(problem, hidden_TD, weight_vD, slice(None), group).views(
        method.needs.support, method.needs.tail_mass
    )
    tokens = tokens_of(problem, slice(None))
    if draws is None:
        loss_T = method.token_loss(*views, tokens).loss_T
    else:
        every = ((i + 0.5) / draws for i in range(draws))
        drawn = (replace(tokens, uniform_T=torch.full((problem.tokens,), u)) for u in every)
        loss_T = sum(method.token_loss(*views, t).loss_T for t in drawn) / draws
    hidden, weight = torch.autograd.grad((loss_T * problem.weight_T).sum(), [hidden_TD, weight_vD])
    return [loss_T.detach(), summed_by_the_mapping(hidden, group), weight]


# --------------------------------------------------------------------------- the truth, in the parent


def logprobs(
    problem: Problem, model: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float64, shards: int = 1
) -> Tensor:
    """Of whole rows, ids that both models know; in at least fp32 from logits in ``dtype``."""
    hidden_TD, weight_VD = (x.to(dtype) for x in model)
    cut = weight_VD[: problem.vocab].split(problem.padded // shards)
    logits_TV = torch.cat([hidden_TD @ weight_wD.t() for weight_wD in cut], dim=1)
    return (logits_TV.to(torch.promote_types(dtype, torch.float32)) / problem.temperature).log_softmax(-1)


def support_ids(problem: Problem, support: SupportKind) -> Tensor:
    """Ids of the support from fp64 logits, [T, K], with duplicates."""
    top = {name: logprobs(problem, getattr(problem, name)).topk(problem.k).indices for name in ("teacher", "student")}
    parts = {
        "teacher": [top["teacher"]],
        "student": [top["student"]],
        "union": [top["teacher"], top["student"]],
        "teacher_and_sampled": [top["teacher"], problem.target_T[:, None]],
    }
    return torch.cat(parts[support], dim=1)


def support_mask(problem: Problem, support: SupportKind | None) -> Tensor:
    """True on the categories of the support, bool [T, V]."""
    mask_TV = torch.zeros(problem.tokens, problem.vocab, dtype=torch.bool)
    if support is not None:
        mask_TV.scatter_(1, support_ids(problem, support), True)
    if not problem.ends:
        return mask_TV
    return torch.cat([mask_TV[:, others(problem)], mask_TV[:, list(problem.ends)].any(-1, keepdim=True)], dim=1)


def others(problem: Problem) -> list[int]:
    """Ids that are categories of their own."""
    return [i for i in range(problem.vocab) if i not in problem.ends]


def categories(problem: Problem, logprob_TV: Tensor) -> Tensor:
    """Columns of the ends merged into one, the last."""
    if not problem.ends:
        return logprob_TV
    class_T1 = logprob_TV[:, list(problem.ends)].logsumexp(-1, keepdim=True)
    return torch.cat([logprob_TV[:, others(problem)], class_T1], dim=1)


def target_categories(problem: Problem) -> Tensor:
    """The column of each target among ``categories``."""
    column_V = torch.full((problem.vocab,), len(others(problem)))
    column_V[others(problem)] = torch.arange(len(others(problem)))
    return column_V[problem.target_T]


@cache
def true_losses(problem: Problem) -> tuple[Tensor, Tensor]:
    """(loss, mean size of its terms) of every cell, fp64."""
    known = {name: categories(problem, logprobs(problem, model)) for name, model in models_of(problem).items()}
    weight_T = problem.weight_T.double()
    losses_NT = torch.stack(
        [
            cell.textbook(
                truth.Rows(
                    logq_TV=known["student"],
                    logp_TV=known["teacher"],
                    logold_TV=known["old"],
                    logbase_TV=known["base"],
                    target_T=target_categories(problem),
                    in_A_TV=support_mask(problem, cell.support),
                )
            )
            for cell in CELLS
        ]
    )
    share_T = weight_T / weight_T.sum()
    return (losses_NT * share_T).sum(-1), (losses_NT.abs() * share_T).sum(-1)


@cache
def plain_gradients(problem: Problem, dtype: torch.dtype, shards: int = 1) -> list[tuple[Tensor, Tensor]]:
    """(hidden, weight) of every cell by autograd of the textbook formula; fp64 makes it the truth.

    In a lower precision: logits in ``dtype``, softmax and formula in at least fp32, gradients in ``dtype``; with
    ``shards`` the hidden states' gradient is the sum, in ``dtype``, of one for each shard of the vocabulary.
    """
    return gradients_of(problem, models_of(problem), dtype, shards)


Models = dict[str, tuple[Tensor, Tensor]]  # hidden states and output weights by name


def models_of(problem: Problem) -> Models:
    return {name: getattr(problem, name) for name in ("student", "teacher", "old", "base")}


def gradients_of(problem: Problem, models: Models, dtype: torch.dtype, shards: int = 1) -> list[tuple[Tensor, Tensor]]:
    """The same of other models; the supports are those of the problem's own."""
    hidden_TD, weight_VD = (x.to(dtype).requires_grad_() for x in models["student"])
    known = {name: categories(problem, logprobs(problem, models[name], dtype)) for name in ("teacher", "old", "base")}
    rows = truth.Rows(
        logq_TV=categories(problem, logprobs(problem, (hidden_TD, weight_VD), dtype, shards)),
        logp_TV=known["teacher"],
        logold_TV=known["old"],
        logbase_TV=known["base"],
        target_T=target_categories(problem),
        in_A_TV=support_mask(problem, None),
    )
    weight_T = problem.weight_T.to(rows.logq_TV.dtype)
    answer = []
    for cell in CELLS:
        loss_T = cell.textbook(replace(rows, in_A_TV=support_mask(problem, cell.support)))
        loss = (loss_T * weight_T).sum() / weight_T.sum()
        answer.append(torch.autograd.grad(loss, [hidden_TD, weight_VD], retain_graph=True))
    return answer


# --------------------------------------------------------------------------- what rounding may do to it

NUDGES = 4


class Nudge:
    """Every number a step of fp32 away, up or down; whole-number draws are the same on every machine."""

    def __init__(self, seed: int = 90) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        signs = 2 * torch.randint(2, x.shape, generator=self._generator) - 1
        return x * (1 + torch.finfo(torch.float32).eps * signs)


@cache
def sensitivities(problem: Problem) -> dict[str, tuple[float, float]]:
    """By row: the largest relative change of the true gradients in NUDGES draws of numbers a step of fp32 away.

    In fp64 from the textbook formula, so it is a property of the objective and of the inputs, not of a machine.
    """
    nudge, exact = Nudge(), plain_gradients(problem, torch.float64)
    found = {cell.row: (0.0, 0.0) for cell in CELLS}
    for _ in range(NUDGES):
        models = {name: (nudge(hidden), nudge(weight)) for name, (hidden, weight) in models_of(problem).items()}
        moved = gradients_of(problem, models, torch.float64)
        for cell, (hidden, weight), true in zip(CELLS, moved, exact, strict=True):
            before = found[cell.row]
            found[cell.row] = (
                max(before[0], relative_error(hidden, true[0])),
                max(before[1], relative_error(weight, true[1])),
            )
    return found


# --------------------------------------------------------------------------- the comparison


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the truth: off in scale or in direction, both show."""
    difference, size = (found.double() - exact).norm(), exact.norm()
    return float(difference) if size == 0.0 else float(difference / size)


Errors = dict[tuple[str, str], tuple[float, float]]  # (row of the table, problem) -> (hidden, weight)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was measured in a world of so many ranks."""

    gradients: Errors
    losses: dict[tuple[str, str], float]  # (row, problem) -> error of the loss, relative to the mean size of its terms
    least: dict[tuple[str, str], float]  # (row, problem) -> least loss of a token
    tails: dict[float, tuple[float, float, float, float]]  # errors of the mass, its hidden and weight gradient; 1 - sum
    coincidences: dict[str, float]  # worst of loss, hidden and weight gradient over the ranks


def problems_of(world: int) -> list[Problem]:
    return [p for p in (*PROBLEMS, *REPLICATED, *LOW_PRECISION) if world % p.replicas == 0]


@cache
def measured(world: int) -> Outcome:
    """All of it, the ranks being started once."""
    problems = problems_of(world)
    ranks = run_on_ranks(on_ranks, problems, world_size=world, timeout_s=500)
    errors: Errors = {}
    losses, least = {}, {}
    for problem in problems:
        found = [rank["cells"][problem.name] for rank in ranks]
        errors |= gradient_errors(problem, found)
        for number, (cell, exact, size) in enumerate(zip(CELLS, *true_losses(problem), strict=True)):
            key = (cell.row, problem.name)
            losses[key] = max(float((rank["loss"][number] - exact).abs() / size.clamp(min=1e-9)) for rank in found)
            least[key] = min(float(rank["least"][number]) for rank in found)
    return Outcome(
        gradients=errors,
        losses=losses,
        least=least,
        tails={mass: tail_errors(mass, [rank["tails"][mass] for rank in ranks]) for mass in MASSES},
        coincidences={name: max(max(rank["coincidences"][name]) for rank in ranks) for name in COINCIDENCES},
    )


def gradient_errors(problem: Problem, ranks: Sequence[Gradients]) -> Errors:
    """Worst over ranks and replicas. What padding, or an id that the teacher lacks, gets must be exactly 0."""
    tensor, found = len(ranks) // problem.replicas, {}
    for number, (cell, exact) in enumerate(zip(CELLS, plain_gradients(problem, torch.float64), strict=True)):
        hidden = max(relative_error(rank["hidden"][number], exact[0]) for rank in ranks)
        shards = [rank["weight"][number] for rank in ranks]
        weights = [torch.cat(shards[first : first + tensor]) for first in range(0, len(ranks), tensor)]
        assert not any(weight_VD[problem.vocab :].any() for weight_VD in weights), f"{cell.row} of {problem.name}"
        weight = max(relative_error(weight_VD[: len(exact[1])], exact[1]) for weight_VD in weights)
        found[cell.row, problem.name] = (hidden, weight)
    return found


TailTruth = tuple[Tensor, Tensor, Tensor]  # log mass, its gradients for hidden states and weight


def true_tail(mass: float, change: Callable[[Tensor], Tensor] = lambda x: x) -> TailTruth:
    """In fp64, after that change of the inputs."""
    hidden_TD, weight_VD, ids_TK = peaked(mass)
    inputs = [change(hidden_TD).requires_grad_(), change(weight_VD).requires_grad_()]
    logq_TV = (inputs[0] @ inputs[1].t()).log_softmax(-1)
    listed_TV = torch.zeros_like(logq_TV, dtype=torch.bool).scatter_(1, ids_TK, True)
    logtail_T = truth.log_sum(logq_TV, ~listed_TV)
    hidden, weight = torch.autograd.grad(logtail_T.sum(), inputs)
    return logtail_T.detach(), hidden, weight


def mass_error(logtail_T: Tensor, exact_T: Tensor) -> float:
    """Largest relative error of a token's mass."""
    return float((logtail_T.double() - exact_T).expm1().abs().max())


def tail_sensitivities(mass: float) -> list[float]:
    """Of the hidden and the weight gradient of the log mass: as ``sensitivities``."""
    nudge, (_, *exact) = Nudge(), true_tail(mass)
    moved = [true_tail(mass, nudge)[1:] for _ in range(NUDGES)]
    return [max(relative_error(pair[i], exact[i]) for pair in moved) for i in (0, 1)]


def tail_errors(mass: float, ranks: Sequence[Gradients]) -> tuple[float, float, float, float]:
    logtail_T, hidden, weight = true_tail(mass)
    assert abs(float(logtail_T.exp().log10().mean()) - np.log10(mass)) < 1.0
    of_mass, one_minus_sum = (
        max(mass_error(rank[name], logtail_T) for rank in ranks) for name in ("logtail", "one_minus_sum")
    )
    shards_VD = torch.cat([rank["weight"] for rank in ranks])[: len(weight)]
    gradient = max(relative_error(rank["hidden"], hidden) for rank in ranks)
    return of_mass, gradient, relative_error(shards_VD, weight), one_minus_sum


def plain_errors(problem: Problem, shards: int = 1) -> dict[str, tuple[float, float]]:
    """Of plain autograd in the problem's dtype, by row."""
    exact, plain = plain_gradients(problem, torch.float64), plain_gradients(problem, problem.dtype, shards)
    return {
        cell.row: (relative_error(found[0], true[0]), relative_error(found[1], true[1]))
        for cell, found, true in zip(CELLS, plain, exact, strict=True)
    }


def low_precision_ratios(world: int) -> dict[str, float]:
    """Error of the package in bf16 over that of plain bf16 autograd, by row: the worse of hidden and weight gradient.

    Root mean squares over several draws: in one draw luck of rounding makes it 1.2 either way.
    """
    ours, plain = ({cell.row: torch.zeros(2) for cell in CELLS} for _ in range(2))
    for problem in LOW_PRECISION:
        theirs = plain_errors(problem, shards=world)
        for row in ours:
            ours[row] += torch.tensor(measured(world).gradients[row, problem.name]).square()
            plain[row] += torch.tensor(theirs[row]).square()
    return {row: float((ours[row] / plain[row]).sqrt().max()) for row in ours if plain[row].any()}
