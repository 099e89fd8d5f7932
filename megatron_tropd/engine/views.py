"""Views of a pack for methods, built in one place: for the training step, for sampled answers, for the self check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tropd.losses.end_class import (
    at_ids,
    class_entropy,
    represented,
    tail_outside,
    with_ends,
)
from megatron_tropd.losses.support import first_of_each, tail_beside
from megatron_tropd.losses.vocab_parallel.logprobs import LogProbs
from megatron_tropd.methods import Method
from megatron_tropd.types import Pack, StudentView, TeacherOutputs, TeacherView, TokenView

Divergence = Callable[[str, float], Tensor]  # (kind, beta) -> loss_T, full vocabulary


@dataclass(frozen=True, slots=True)
class StudentScores:
    """The student's scores of one pack at the weights of the rollout."""

    logprob_N: Tensor
    entropy_N: Tensor
    model_logprob_N: Tensor  # at temperature 1, as the sampler reports it
    topk_ids_NK: Tensor | None = None  # its most likely tokens, int64


@dataclass(frozen=True, slots=True)
class Support:
    """The candidates of each token and the teacher's log-probs of them and of the tail; mask: False on duplicates."""

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
    weight_N: Tensor  # normalization weight, sums to the number of valid predictions over the global minibatch
    outputs: TeacherOutputs | None = None  # None when the method needs no teacher (pre-training)
    support: Support = Support()
    old: StudentScores | None = None  # None: the weights of the rollout are the present ones
    end_ids: tuple[int, ...] = ()  # one token in all of the above, ``tokens`` aside: see ``ends_as_one``


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentRows:
    """The student's scores of a pack's N valid predictions at its present weights, with gradient where it learns."""

    logprob_N: Tensor
    entropy_N: Tensor
    support_logprob_NK: Tensor | None = None
    support_logtail_N: Tensor | None = None
    model_logprob_N: Tensor | None = None  # at temperature 1; None: logprob_N is, or the pack's ``old`` knows it
    divergence: Divergence | None = None


class Views(NamedTuple):
    """The arguments of ``Method.token_loss`` and ``Method.gate_weight``."""

    student: StudentView
    teacher: TeacherView
    tokens: TokenView


def views_of(item: TrainPack, rows: StudentRows | None = None) -> Views:
    """Build the views of a pack; without ``rows`` the student is as it was when it wrote the rollouts."""
    if rows is None:
        assert item.old is not None  # whoever requests that has had the student score the pack
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
        advantage_T=item.tokens.advantage_T,
    )
    tokens = complete_tokens(item.tokens, old_N, old_N if plain_N is None else plain_N)
    tokens = replace(tokens, target_T=represented(tokens.target_T, item.end_ids))
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
        support_has_target_T=_has_target(item),
        entropy_T=outputs.entropy_N,
        entropy_bound_T=outputs.entropy_bound_N,
        base_logprob_T=outputs.base_logprob_N,
    )


def _has_target(item: TrainPack) -> Tensor | None:
    """Mark where the target, or the class of ends that it is in, is in the support; None where no tail is requested."""
    if item.support.ids_NK is None or item.support.logtail_N is None:
        return None
    return (item.support.ids_NK == represented(item.tokens.target_T, item.end_ids)[:, None]).any(-1)


def complete_tokens(tokens: TokenView, old_N: Tensor, old_model_N: Tensor) -> TokenView:
    """Make the sampler's log-probs comparable to the trainer's ``old_N``, at the method's temperature.

    The sampler's are at temperature 1. What they differ by from the trainer's there, ``old_model_N``, they are made to
    differ by here. Of teacher-written tokens the sampler has none (nan): they count as the trainer's own.
    """
    sampled_N = tokens.rollout_logprob_T
    if old_model_N is not old_N:
        sampled_N = old_N + (sampled_N - old_model_N)
    return replace(tokens, rollout_logprob_T=torch.where(sampled_N.isnan(), old_N, sampled_N))


def picked_ids(item: TrainPack) -> Tensor:
    """List the ids whose log-probs ``student_rows`` needs: target, support, ends of responses; ``[N, 1 + K + X]``."""
    target_N1, support_NK = item.tokens.target_T[:, None], item.support.ids_NK
    ids_NK = target_N1 if support_NK is None else torch.cat([target_N1, support_NK], dim=1)
    return with_ends(ids_NK, item.end_ids)


def student_rows(
    out: LogProbs, item: TrainPack, *, divergence: Divergence | None = None, model_logprob_N: Tensor | None = None
) -> StudentRows:
    """Build the student's rows from the log-probs of ``picked_ids``.

    ``divergence`` is over all ids, those of ``item.end_ids`` for one; ``model_logprob_N`` the target's at temperature
    1, where the method's is another.
    """
    target_N, ids_NK, ends = item.tokens.target_T, item.support.ids_NK, item.end_ids
    columns = out.logprob_TK.shape[1] - len(ends)
    logprob_N, support_NK, end_NX = out.logprob_TK[:, 0], out.logprob_TK[:, 1:columns], out.logprob_TK[:, columns:]
    logtail_N, entropy_N = out.logtail_T, out.entropy_T
    if ids_NK is not None and logtail_N is not None:
        logtail_N = _outside(logtail_N, logprob_N, target_N, ids_NK, ends, end_NX)
    if ends:
        if model_logprob_N is None:  # the sampler speaks of the id that it drew
            model_logprob_N = logprob_N.detach()
        logprob_N, entropy_N = at_ids(logprob_N, target_N, ends, end_NX), class_entropy(entropy_N, end_NX)
        if ids_NK is not None:
            support_NK = at_ids(support_NK, ids_NK, ends, end_NX)
    return StudentRows(
        logprob_N=logprob_N,
        entropy_N=entropy_N,
        support_logprob_NK=None if ids_NK is None else support_NK,
        support_logtail_N=logtail_N,
        model_logprob_N=model_logprob_N,
        divergence=divergence,
    )


def _outside(
    logtail_N: Tensor, logprob_N: Tensor, target_N: Tensor, ids_NK: Tensor, ends: tuple[int, ...], end_NX: Tensor | None
) -> Tensor:
    """Log mass outside the support, from that outside the support, the target and the ends of responses."""
    if ends:
        return tail_outside(logtail_N, logprob_N, target_T=target_N, ids_TK=ids_NK, end_ids=ends, end_TX=_given(end_NX))
    return tail_beside(logtail_N, logprob_N, (ids_NK == target_N[:, None]).any(-1))


def ends_as_one(outputs: TeacherOutputs | None, target_N: Tensor, end_ids: tuple[int, ...]) -> TeacherOutputs | None:
    """Give a target that ends a response the log-prob of all of ``end_ids``, and let entropies count them once."""
    if outputs is None or not end_ids:
        return outputs
    end_NX, base_N, entropy_N = _given(outputs.end_logprob_NX), outputs.base_logprob_N, outputs.entropy_N
    if base_N is not None:
        base_N = at_ids(base_N, target_N, end_ids, _given(outputs.base_end_logprob_NX))
    return replace(
        outputs,
        logprob_N=at_ids(outputs.logprob_N, target_N, end_ids, end_NX),
        entropy_N=None if entropy_N is None else class_entropy(entropy_N, end_NX),
        base_logprob_N=base_N,
    )


def support_of(outputs: TeacherOutputs | None, target_N: Tensor, method: Method) -> Support:
    """Put together the support that the method looks at, from the teacher's outputs, in which every id is its own."""
    needs = method.needs
    ends = needs.end_ids
    if outputs is None or not needs.top_k:
        return Support()
    top, named = (outputs.topk_ids_NK, outputs.topk_logprob_NK), (outputs.query_ids_NJ, outputs.query_logprob_NJ)
    parts = {
        "teacher": [top],
        "student": [named],
        "union": [top, named],
        "teacher_and_sampled": [top, (target_N[:, None], outputs.logprob_N[:, None])],
    }[needs.support]
    ids_NK = represented(torch.cat([_given(ids) for ids, _ in parts], dim=1), ends)
    logprob_NK = torch.cat([_given(logprob) for _, logprob in parts], dim=1)
    logtail_N = None
    if needs.tail_mass:
        end_NX, given_N = outputs.end_logprob_NX, _given(outputs.logtail_N)
        logtail_N = _outside(given_N, outputs.logprob_N, target_N, ids_NK, ends, end_NX)
    return Support(
        ids_NK=ids_NK,
        logprob_NK=at_ids(logprob_NK, ids_NK, ends, _given(outputs.end_logprob_NX)) if ends else logprob_NK,
        mask_NK=first_of_each(ids_NK) if len(parts) > 1 or ends else None,
        logtail_N=logtail_N,
    )


def _given(value: Tensor | None) -> Tensor:
    assert value is not None  # requested of the teacher: TeacherRequest.of
    return value
