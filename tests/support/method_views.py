"""Views built from whole rows of logits in plain torch: what the engine would hand to a method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.types import Region, StudentView, TeacherView, TokenView

T, V, K = 7, 13, 5


@dataclass(frozen=True)
class Rows:
    """Random logits of student (leaf), rollout-time student, teacher and base model, and the sampled tokens."""

    student_TV: Tensor
    old_TV: Tensor
    teacher_TV: Tensor
    base_TV: Tensor
    target_T: Tensor


def rows(seed: int = 0, *, tokens: int = T, dtype: torch.dtype = torch.float64, on_policy: bool = True) -> Rows:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> Tensor:
        return (scale * torch.randn(tokens, V, generator=generator, dtype=torch.float64)).to(dtype)

    student_TV = draw(1.5)
    old_TV = student_TV.clone() if on_policy else student_TV + draw(0.3)
    target_T = torch.randint(V, (tokens,), generator=generator)
    return Rows(student_TV.requires_grad_(), old_TV, draw(1.5), draw(1.5), target_T)


def entropy(logprob_TV: Tensor) -> Tensor:
    return -(logprob_TV.exp() * logprob_TV).sum(-1)


def log_outside(logprob_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Log mass of the ids that are not listed."""
    listed_TV = torch.zeros_like(logprob_TV, dtype=torch.bool).scatter_(1, ids_TK, True)
    empty_T = listed_TV.all(-1)
    logtail_T = logprob_TV.masked_fill(listed_TV & ~empty_T[:, None], -torch.inf).logsumexp(-1)
    return logtail_T.masked_fill(empty_T, -torch.inf)


def divergence(student_TV: Tensor, teacher_TV: Tensor, kind: str, beta: float) -> Tensor:
    """Textbook formulas on log-probs."""
    q, p = student_TV.exp(), teacher_TV.exp()
    if kind == "forward_kl":
        return (p * (teacher_TV - student_TV)).sum(-1)
    if kind == "reverse_kl":
        return (q * (student_TV - teacher_TV)).sum(-1)
    assert kind == "jsd"
    m = beta * p + (1 - beta) * q
    return (beta * p * (teacher_TV - m.log()) + (1 - beta) * q * (student_TV - m.log())).sum(-1)


def views(
    data: Rows,
    *,
    k: int = K,
    ids_TK: Tensor | None = None,
    mask_TK: Tensor | None = None,
    region_T: Tensor | None = None,
    uniform_T: Tensor | None = None,
    progress: float = 0.0,
) -> tuple[StudentView, TeacherView, TokenView]:
    """All optional fields filled. The support is the teacher's top k unless ids are given."""
    student_TV, teacher_TV = data.student_TV.log_softmax(-1), data.teacher_TV.log_softmax(-1)
    old_TV, base_TV = data.old_TV.log_softmax(-1), data.base_TV.log_softmax(-1)
    target_T1 = data.target_T[:, None]
    count = len(data.target_T)
    ids_TK = teacher_TV.topk(k).indices if ids_TK is None else ids_TK
    old_T = old_TV.gather(1, target_T1)[:, 0]
    student = StudentView(
        logprob_T=student_TV.gather(1, target_T1)[:, 0],
        old_logprob_T=old_T,
        support_logprob_TK=student_TV.gather(1, ids_TK),
        support_logtail_T=log_outside(student_TV, ids_TK),
        entropy_T=entropy(student_TV).detach(),
        old_entropy_T=entropy(old_TV),
        divergence=lambda kind, beta: divergence(student_TV, teacher_TV, kind, beta),
        advantage_T=data.target_T % 3 - 1.0,
    )
    teacher = TeacherView(
        logprob_T=teacher_TV.gather(1, target_T1)[:, 0],
        support_ids_TK=ids_TK,
        support_logprob_TK=teacher_TV.gather(1, ids_TK),
        support_mask_TK=mask_TK,
        support_logtail_T=log_outside(teacher_TV, ids_TK),
        support_has_target_T=(ids_TK == target_T1).any(-1),
        entropy_T=entropy(teacher_TV),
        base_logprob_T=base_TV.gather(1, target_T1)[:, 0],
    )
    tokens = TokenView(
        region_T=torch.full((count,), int(Region.CONTINUATION)) if region_T is None else region_T,
        uniform_T=(torch.arange(count) * 0.381966 % 1.0) if uniform_T is None else uniform_T,
        sequence_T=torch.arange(count) // 4,
        position_T=torch.arange(count) % 4,
        target_T=data.target_T,
        rollout_logprob_T=old_T + 0.01,
        entropy_threshold=float(entropy(old_TV).median()) if count else 0.0,
        progress=progress,
        reward_T=(data.target_T % 3) / 2.0,
        advantage_T=data.target_T % 3 - 1.0,
    )
    return student, teacher, tokens


def gradient(loss_T: Tensor, data: Rows) -> Tensor:
    """d(sum of losses) / d(student logits), ``[T, V]``."""
    (grad_TV,) = torch.autograd.grad(loss_T.sum(), data.student_TV, retain_graph=True, allow_unused=True)
    return torch.zeros_like(data.student_TV) if grad_TV is None else grad_TV
