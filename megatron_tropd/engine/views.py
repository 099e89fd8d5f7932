"""What a method sees of a pack, built in one place: for the training step, for sampled answers, for the self check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tropd.losses.support import first_of_each, tail_beside
from megatron_tropd.methods import Method
from megatron_tropd.types import Pack, StudentView, TeacherOutputs, TeacherView, TokenView


@dataclass(frozen=True, slots=True)
class StudentScores:
    """What the student said of one pack at the weights of the rollout."""

    logprob_N: Tensor
    entropy_N: Tensor
    model_logprob_N: Tensor  # at temperature 1, as the sampler reports it
    topk_ids_NK: Tensor | None = None  # its most likely tokens, int64


@dataclass(frozen=True, slots=True)
class Support:
    """The candidates of each token and the teacher's log-probs of them and of the rest; mask: False on duplicates."""

    ids_NK: Tensor | None = None
    logprob_NK: Tensor | None = None
    mask_NK: Tensor | None = None
    logtail_N: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPack:
    """A pack and everything the method needs to know of its N valid predictions, in stream order, on the device.

    The tensors are only needed on last-stage ranks; elsewhere they may be empty.
    """

    pack: Pack
    tokens: TokenView
    weight_N: Tensor  # normalisation weight, sums to the number of valid predictions over the global minibatch
    outputs: TeacherOutputs | None = None  # None when the method needs no teacher (pre-training)
    support: Support = Support()
    old: StudentScores | None = None  # None: the weights of the rollout are the present ones


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentRows:
    """What the student says of a pack's N valid predictions at its present weights, with gradient where it learns."""

    logprob_N: Tensor
    entropy_N: Tensor
    support_logprob_NK: Tensor | None = None
    support_logtail_N: Tensor | None = None
    model_logprob_N: Tensor | None = None  # at temperature 1; None: logprob_N is, or the pack's ``old`` knows it
    divergence: Callable[[str, float], Tensor] | None = None


class Views(NamedTuple):
    """The arguments of ``Method.token_loss`` and ``Method.gate_weight``."""

    student: StudentView
    teacher: TeacherView
    tokens: TokenView


def views_of(item: TrainPack, rows: StudentRows | None = None) -> Views:
    """Build the views of a pack; without ``rows`` the student is as it was when it wrote the rollouts."""
    if rows is None:
        assert item.old is not None  # whoever asks for that has had the student score the pack
        rows = StudentRows(logprob_N=item.old.logprob_N, entropy_N=item.old.entropy_N)
    present_N = rows.logprob_N.detach()
    old_N = present_N if item.old is None else item.old.logprob_N
    plain_N = rows.model_logprob_N if item.old is None else item.old.model_logprob_N
    student = StudentView(
        logprob_T=rows.logprob_N,
        old_logprob_T=old_N,
        support_logprob_TK=rows.support_logprob_NK,
        support_logtail_T=rows.support_logtail_N,
        entropy_T=rows.entropy_N,
        old_entropy_T=rows.entropy_N.detach() if item.old is None else item.old.entropy_N,
        divergence=rows.divergence,
    )
    tokens = complete_tokens(item.tokens, old_N, old_N if plain_N is None else plain_N)
    return Views(student, _teacher_view(item, present_N), tokens)


def _teacher_view(item: TrainPack, present_N: Tensor) -> TeacherView:
    outputs, support = item.outputs, item.support
    if outputs is None:  # no teacher: the views agree, so every term that compares them is zero
        return TeacherView(logprob_T=present_N)
    return TeacherView(
        logprob_T=outputs.logprob_N,
        support_ids_TK=support.ids_NK,
        support_logprob_TK=support.logprob_NK,
        support_mask_TK=support.mask_NK,
        support_logtail_T=support.logtail_N,
        entropy_T=outputs.entropy_N,
        entropy_bound_T=outputs.entropy_bound_N,
        base_logprob_T=outputs.base_logprob_N,
    )


def complete_tokens(tokens: TokenView, old_N: Tensor, old_model_N: Tensor) -> TokenView:
    """Make the sampler's log-probs comparable to the trainer's ``old_N``, at the method's temperature.

    The sampler's are at temperature 1. What they differ by from the trainer's there, ``old_model_N``, they are made to
    differ by here. Of teacher-written tokens the sampler has none (nan): they count as the trainer's own.
    """
    sampled_N = tokens.rollout_logprob_T
    if old_model_N is not old_N:
        sampled_N = old_N + (sampled_N - old_model_N)
    return replace(tokens, rollout_logprob_T=torch.where(sampled_N.isnan(), old_N, sampled_N))


def support_of(outputs: TeacherOutputs | None, target_N: Tensor, method: Method) -> Support:
    """Put together the support that the method looks at, from the teacher's outputs."""
    needs = method.needs
    if outputs is None or not needs.top_k:
        return Support()
    top, named = (outputs.topk_ids_NK, outputs.topk_logprob_NK), (outputs.query_ids_NJ, outputs.query_logprob_NJ)
    parts = {
        "teacher": [top],
        "student": [named],
        "union": [top, named],
        "teacher_and_sampled": [top, (target_N[:, None], outputs.logprob_N[:, None])],
    }[needs.support]
    ids_NK = torch.cat([_given(ids) for ids, _ in parts], dim=1)
    logtail_N = None
    if needs.tail_mass:
        inside_N = (ids_NK == target_N[:, None]).any(-1)
        logtail_N = tail_beside(_given(outputs.logtail_N), outputs.logprob_N, inside_N)
    return Support(
        ids_NK=ids_NK,
        logprob_NK=torch.cat([_given(logprob) for _, logprob in parts], dim=1),
        mask_NK=first_of_each(ids_NK) if len(parts) > 1 else None,
        logtail_N=logtail_N,
    )


def _given(value: Tensor | None) -> Tensor:
    assert value is not None  # the teacher was asked for it: TeacherRequest.of
    return value
