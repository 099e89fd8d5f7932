"""The problems of the parity table: shapes, splits and extremes, with every number exact in the dtype under test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Models, tokens and their split. Every number is exact in ``dtype``; logits are shaped by a constant coordinate.

    Students and teachers have ``padded`` rows of output weight, cut into equal shards. Rows beyond the true size hold
    nan. ``vocab`` ids are known to both models.
    """

    name: str
    tokens: int = 17
    vocab: int = 37
    student_vocab: int | None = None  # true size of the student's, when larger
    padded: int = 40
    hidden: int = 9
    teacher_hidden: int = 6
    k: int = 5
    temperature: float = 1.0
    chunk_tokens: int | None = None
    student_bias: tuple[tuple[tuple[int, ...], float], ...] = ()  # (ids, addition to their logits)
    teacher_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    teacher_scale: float = 1.0  # of what varies from token to token
    noise: float | None = None  # the teacher is the student with so much noise, not a model of its own
    targets: tuple[int, ...] = ()  # sampled from these only; () is all
    packs: tuple[int, ...] = ()  # tokens of each pack, dealt to the replicas in turn; () is one pack with all
    replicas: int = 1
    dtype: torch.dtype = torch.float32
    given_support: bool = False  # the true top k are handed in: in bf16 near ties would make another support
    ends: tuple[int, ...] = ()  # ids that count as one token
    scale: float = 1.0
    seed: int = 0

    def draw(self, *shape: int, stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        return self.scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def exact(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).double()

    def model(self, hidden: int, stream: int, bias: Sequence[tuple[tuple[int, ...], float]]) -> tuple[Tensor, Tensor]:
        """Hidden states and true rows of the output weight, fp64."""
        hidden_TD = self.draw(self.tokens, hidden, stream=stream)
        weight_VD = self.draw(self.student_vocab or self.vocab, hidden, stream=stream + 1)
        hidden_TD[:, -1], weight_VD[:, -1] = 1.0, 0.0
        for ids, addition in bias:
            weight_VD[list(ids), -1] = addition
        return self.exact(hidden_TD), self.exact(weight_VD)

    @property
    def student(self) -> tuple[Tensor, Tensor]:
        return self.model(self.hidden, 10, self.student_bias)

    @property
    def old(self) -> tuple[Tensor, Tensor]:
        """The student before the last update."""
        hidden_TD, weight_VD = self.student
        return self.exact(hidden_TD + 0.2 * self.draw(*hidden_TD.shape, stream=30)), weight_VD

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        if self.noise is None:
            hidden_TD, weight_VD = self.model(self.teacher_hidden, 20, self.teacher_bias)
            hidden_TD[:, :-1] *= self.teacher_scale
            return self.exact(hidden_TD), weight_VD[: self.vocab]
        hidden_TD, weight_VD = self.student
        return self.exact(hidden_TD + self.noise * self.draw(*hidden_TD.shape, stream=40)), weight_VD[: self.vocab]

    @property
    def base(self) -> tuple[Tensor, Tensor]:
        return self.model(self.teacher_hidden, 50, ())

    @property
    def target_T(self) -> Tensor:
        ids = torch.tensor(self.targets or range(self.vocab))
        return ids[
            torch.randint(len(ids), (self.tokens,), generator=torch.Generator().manual_seed(1000 * self.seed + 60))
        ]

    @property
    def weight_T(self) -> Tensor:
        """Normalization weights as a sequence mean would give; odd multiples of 1/4, so exact in every dtype."""
        generator = torch.Generator().manual_seed(1000 * self.seed + 70)
        return torch.randint(1, 9, (self.tokens,), generator=generator) / 4.0

    def slices(self, replica: int) -> list[slice]:
        """Tokens of the packs of one replica; a replica without any still gets an empty one."""
        ends = torch.tensor(self.packs or (self.tokens,)).cumsum(0).tolist()
        every = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        return every[replica :: self.replicas] or [slice(0, 0)]


STARTS = (0, 10, 20, 30)  # first ids of the shards of 4 ranks; those of 2 ranks are among them
LAST_QUARTER, BEFORE = tuple(range(31, 37)), tuple(range(31))
HALF = tuple(range(0, 37, 2))
SURE = (3, 9, 17, 23, 31)
UNSURE = tuple(sorted({*range(37)} - {*SURE}))
PROBLEMS = (
    Problem(name="odd sizes, padded vocabulary"),
    Problem(name="temperature 0.7, tiles of 3 tokens' size", temperature=0.7, chunk_tokens=3),
    Problem(
        name="shard-start ids in support and sample",
        student_bias=((STARTS, 6.0),),
        teacher_bias=((STARTS, 6.0),),
        targets=STARTS,
    ),
    Problem(
        name="all candidates on one shard, none elsewhere",
        student_bias=((LAST_QUARTER, 6.0), (BEFORE, -12.0)),
        teacher_bias=((LAST_QUARTER, 6.0), (BEFORE, -12.0)),
        targets=(0, 1, 20),
    ),
    Problem(name="duplicates: both top k nearly alike, sample among them", noise=0.3, teacher_hidden=9, targets=STARTS),
    Problem(
        name="support holds 0.99999 of the student, about half of the teacher",
        student_bias=((SURE, 3.0), (UNSURE, -13.0)),
        teacher_bias=((SURE, 2.0),),
        teacher_scale=0.2,
    ),
    Problem(
        name="support holds more than 0.99999 of both",
        student_bias=((SURE, 6.0), (UNSURE, -11.0)),
        teacher_bias=((SURE, 6.0), (UNSURE, -9.0)),
    ),
    Problem(name="teacher probabilities of exactly 0", teacher_bias=((HALF, -130.0),), k=25),
    Problem(name="K = 1", k=1),
    Problem(name="K = V", k=37),
    Problem(name="T = 1", tokens=1),
    Problem(name="teacher knows fewer ids, temperature 1.3", vocab=33, student_vocab=37, temperature=1.3),
    Problem(name="a shard of padding only", vocab=9, padded=12, k=3),
)
LOW_PRECISION = tuple(
    Problem(
        name=f"bf16, draw {seed}",
        tokens=129,
        vocab=509,
        padded=512,
        hidden=48,
        teacher_hidden=33,
        k=16,
        scale=0.5,
        given_support=True,
        dtype=torch.bfloat16,
        seed=seed,
    )
    for seed in range(5)
)
REPLICATED = (
    Problem(name="five packs on two replicas", tokens=21, packs=(5, 9, 3, 1, 3), replicas=2),
    Problem(name="one valid token, none on the other replica", tokens=1, packs=(1,), replicas=2),
)
APART, UNLIKELY = (35, 10, 31), -9.0
ENDS = (
    Problem(
        name="ends: one in the teacher's top k, another in the student's, the third on another shard",
        ends=APART,
        student_bias=(((31,), 4.0),),
        teacher_bias=(((35,), 4.0),),
        targets=(*APART, 0, 7, 22),
        temperature=0.7,
        chunk_tokens=3,
    ),
    Problem(
        name="ends: none in a support, all likely samples",
        ends=(3, 36, 20),
        student_bias=(((3, 36, 20), UNLIKELY),),
        teacher_bias=(((3, 36, 20), UNLIKELY),),
        targets=(3, 36, 20, 11),
    ),
    Problem(name="ends: all in every support, K = V", ends=(0, 1, 2), k=37),
)


def peaked(mass_outside: float, *, tokens: int = 17, vocab: int = 37, width: int = 41) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a weight, exact in fp32, whose top 5 hold all but about ``mass_outside``; and these 5 ids."""
    generator = torch.Generator().manual_seed(11)
    logits_TV = torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)
    ids_TK = torch.rand(tokens, vocab, generator=generator).topk(5).indices
    logits_TV.scatter_add_(1, ids_TK, torch.full(ids_TK.shape, -np.log(mass_outside) + 2.0, dtype=torch.float64))
    weight_VD = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    hidden_TD = torch.linalg.lstsq(weight_VD, logits_TV.t()).solution.t()
    return hidden_TD.float().double(), weight_VD.float().double(), ids_TK
