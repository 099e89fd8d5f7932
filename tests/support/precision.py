"""How far bf16 models' log-probs and divergence gradients are from fp64 on the same bf16 inputs, as the student nears
its teacher: ours, and plain autograd's from bf16 logits.

The teacher is the student plus a few hidden coordinates of its own, so that its logits are the student's plus any
perturbation, however small, with every input exact in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.losses.vocab_parallel import linear_divergence, linear_logprobs
from megatron_tropd.parallel.collectives import copy_to_region
from tests.support import parity_truth as truth
from tests.support.distributed import run_on_ranks

KLS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # KL(student || teacher), nats, mean over tokens
WORLDS = (1, 2)
LOGPROB_LIMIT, GRADIENT_LIMIT = 1e-4, 1e-2  # nats; relative
KINDS = ("reverse_kl", "jsd", "forward_kl")
TOKENS, VOCAB, PADDED, HIDDEN, OWN = 37, 1531, 1536, 192, 8
_TEXTBOOK = {"reverse_kl": truth.rkl_full, "forward_kl": truth.fkl_full, "jsd": truth.jsd_full(0.5)}


@dataclass(frozen=True)
class Models:
    """Hidden states and true rows of the output weight of both, fp64 with values exact in bf16; sampled ids."""

    student: tuple[Tensor, Tensor]
    teacher: tuple[Tensor, Tensor]
    target_T: Tensor


def _draw(*shape: int, stream: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(stream)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).bfloat16().double()


@cache
def models(kl: float) -> Models:
    """Logits of standard deviation about 3; the perturbation is scaled by bisection until the mean KL is ``kl``."""
    hidden_TD = _draw(TOKENS, HIDDEN, stream=1, scale=1.0)
    weight_VD = _draw(VOCAB, HIDDEN, stream=2, scale=3 * HIDDEN**-0.5)
    own_TE, own_VE = _draw(TOKENS, OWN, stream=3, scale=1.0), _draw(VOCAB, OWN, stream=4, scale=OWN**-0.5)
    logq_TV = (hidden_TD @ weight_VD.t()).log_softmax(-1)

    def teacher(size: float) -> tuple[Tensor, Tensor]:
        moved_TE = (own_TE * size).bfloat16().double()
        return torch.cat([hidden_TD, moved_TE], dim=1), torch.cat([weight_VD, own_VE], dim=1)

    low, high = 1e-4, 1e2
    for _ in range(40):
        size = (low * high) ** 0.5
        hidden_TE, weight_VE = teacher(size)
        logp_TV = (hidden_TE @ weight_VE.t()).log_softmax(-1)
        found = float((logq_TV.exp() * (logq_TV - logp_TV)).sum(-1).mean())
        low, high = (size, high) if found < kl else (low, size)
    target_T = torch.multinomial(logq_TV.exp(), 1, generator=torch.Generator().manual_seed(5))[:, 0]
    return Models((hidden_TD, weight_VD), teacher(low), target_T)


ENDS = (7, 900)  # the student ends its responses with the first, the teacher with the second


@cache
def models_with_ends(kl: float) -> Models:
    """The models, to which each other's end is some 25 nats less likely than their own, which is likely at every fourth
    token; ``kl`` apart for the rest, whichever end is meant.
    """
    given = models(kl)
    ends_here_T1 = torch.zeros(TOKENS, 1, dtype=torch.float64)
    ends_here_T1[::4] = 1.0

    def ending(model: tuple[Tensor, Tensor], own: int, other: int) -> tuple[Tensor, Tensor]:
        hidden_TD, weight_VD = model[0], model[1].clone()
        weight_VD[list(ENDS)] = 0.0
        more_V2 = torch.zeros(VOCAB, 2, dtype=torch.float64)
        more_V2[own, 0], more_V2[other, 1] = 11.0, -15.0
        hidden_TE = torch.cat([hidden_TD, ends_here_T1, torch.ones(TOKENS, 1, dtype=torch.float64)], dim=1)
        return hidden_TE, torch.cat([weight_VD, more_V2], dim=1)

    return Models(ending(given.student, *ENDS), ending(given.teacher, *reversed(ENDS)), given.target_T)


# --------------------------------------------------------------------------- the package's, on the ranks


def _shard(weight_VD: Tensor, group: dist.ProcessGroup, dtype: torch.dtype) -> Tensor:
    padded = torch.full((PADDED, weight_VD.shape[1]), torch.nan, dtype=dtype)
    padded[:VOCAB] = weight_VD
    return padded.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()


def on_ranks(dtype: torch.dtype) -> dict[float, dict[str, Any]]:
    """By KL: the sampled tokens' log-probs, and by divergence the (hidden, weight shard) gradients."""
    group = dist.group.WORLD
    assert group is not None
    return {kl: _of(models(kl), group, dtype) for kl in KLS}


def _of(given: Models, group: dist.ProcessGroup, dtype: torch.dtype) -> dict[str, Any]:
    options: dict[str, Any] = {"group": group, "vocab_size": VOCAB}
    hidden_TD = given.student[0].to(dtype).requires_grad_()
    weight_vD = _shard(given.student[1], group, dtype).requires_grad_()
    teacher = (given.teacher[0].to(dtype), _shard(given.teacher[1], group, dtype))
    entered_TD = copy_to_region(hidden_TD, group)  # its backward adds up the partial hidden gradients, as the engine's
    found: dict[str, Any] = {
        "logprob": linear_logprobs(entered_TD, weight_vD, given.target_T[:, None], **options).logprob_TK[:, 0].detach()
    }
    for kind in KINDS:
        loss_T = linear_divergence(entered_TD, weight_vD, *teacher, kind=kind, **options)
        found[kind] = torch.autograd.grad(loss_T.mean(), [hidden_TD, weight_vD], retain_graph=True)
    return found


# --------------------------------------------------------------------------- the truth, and plain bf16


@cache
def plain(kl: float, dtype: torch.dtype) -> dict[str, Any]:
    """As one writes it: logits in ``dtype``, softmax and formula in at least fp32. In fp64 it is the truth."""
    given = models(kl)
    hidden_TD, weight_VD = (x.to(dtype, copy=True).requires_grad_() for x in given.student)
    teacher_TE, teacher_VE = (x.to(dtype) for x in given.teacher)
    wide = torch.promote_types(dtype, torch.float32)
    logq_TV = (hidden_TD @ weight_VD.t()).to(wide).log_softmax(-1)
    logp_TV = (teacher_TE @ teacher_VE.t()).to(wide).log_softmax(-1)
    rows = truth.Rows(
        logq_TV=logq_TV,
        logp_TV=logp_TV,
        logold_TV=logq_TV.detach(),
        logbase_TV=logq_TV.detach(),
        target_T=given.target_T,
        in_A_TV=torch.zeros(TOKENS, VOCAB, dtype=torch.bool),
    )
    found: dict[str, Any] = {"logprob": logq_TV.detach().gather(1, given.target_T[:, None])[:, 0]}
    for kind in KINDS:
        loss = _TEXTBOOK[kind](rows).mean()
        found[kind] = torch.autograd.grad(loss, [hidden_TD, weight_VD], retain_graph=True)
    return found


# --------------------------------------------------------------------------- the errors


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Errors against fp64 at one KL."""

    logprob: float  # mean over tokens of |error of log q(y)|, nats
    gradients: dict[str, float]  # by divergence: relative, the worse of hidden states' and weight's

    @property
    def numbers(self) -> list[float]:
        """log q(y), then the gradients in the order of KINDS."""
        return [self.logprob, *(self.gradients[kind] for kind in KINDS)]


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _budget(found: dict[str, Any], exact: dict[str, Any]) -> Budget:
    return Budget(
        logprob=float((found["logprob"].double() - exact["logprob"]).abs().mean()),
        gradients={kind: max(_relative(a, b) for a, b in zip(found[kind], exact[kind], strict=True)) for kind in KINDS},
    )


@cache
def measured(world: int, dtype: torch.dtype = torch.bfloat16) -> dict[float, Budget]:
    """Ours by KL, the ranks being started once."""
    ranks = run_on_ranks(on_ranks, dtype, world_size=world, timeout_s=500)
    return {kl: _budget(_whole([rank[kl] for rank in ranks]), plain(kl, torch.float64)) for kl in KLS}


def _whole(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first rank's answers, with the weight gradients of all shards; what padding got must be exactly 0."""
    found = {"logprob": ranks[0]["logprob"]}
    for kind in KINDS:
        weight_VD = torch.cat([rank[kind][1] for rank in ranks])
        assert not weight_VD[VOCAB:].any()
        found[kind] = (ranks[0][kind][0], weight_VD[:VOCAB])
    return found


def of_plain_bf16() -> dict[float, Budget]:
    """Plain autograd's by KL, in bf16."""
    return {kl: _budget(plain(kl, torch.bfloat16), plain(kl, torch.float64)) for kl in KLS}
