"""Tiny Qwen3 checkpoints made by `transformers`, recorded rollouts, and the textbook losses in plain autograd.

Importable by the children of ``run_on_ranks``: `transformers` is imported only where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.data.random import Stream, uniforms
from megatron_tropd.types import Region, Rollout, single_turn

# sizes that nothing divides by accident: the vocabulary is prime, and no two dimensions are equal
STUDENT = {
    "vocab_size": 97,
    "hidden_size": 52,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "max_position_embeddings": 96,
}
TEACHER = {
    "vocab_size": 131,  # pads to another multiple than the student's
    "hidden_size": 68,
    "intermediate_size": 94,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 80,
}


def save_qwen3(
    directory: Path,
    sizes: dict[str, int],
    *,
    tied: bool = False,
    seed: int = 0,
    scale: float = 0.25,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A random Qwen3 in a Hugging Face directory; ``scale`` is the spread of its matrices, norms are around 1."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(**sizes, tie_word_embeddings=tied, initializer_range=scale, attention_dropout=0.0)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 3_000.0}  # no default of anyone
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(directory)
    return directory


def load_hf(directory: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The checkpoint in `transformers`, ready to be asked."""
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    return model.eval()


def hf_logprobs(model: Any, token_ids: np.ndarray, vocab_size: int) -> Tensor:
    """``[L - 1, V]`` log-probabilities of every next token, over the first ``vocab_size`` ids alone."""
    logits = model(torch.from_numpy(token_ids)[None]).logits[0, :-1, :vocab_size]
    logprob: Tensor = logits.log_softmax(-1)
    return logprob


def random_rollouts(step: int, *, vocab_size: int, count: int = 11, longest: int = 37) -> list[Rollout]:
    """Random sequences of odd and even lengths: some guided, one that is all prefix, one of two tokens."""
    rng = np.random.default_rng(1000 + step)
    rollouts = []
    for number in range(count):
        length = 2 if number == 3 else int(rng.integers(5, longest + 1))
        prompt = 1 if number == 3 else int(rng.integers(1, length // 2 + 1))
        prefix = {1: length - prompt, 4: (length - prompt) // 2, 7: 1}.get(number, 0)
        written = length - prompt - prefix
        logprob = rng.uniform(-4, 0, written).astype(np.float32)
        rollouts.append(
            Rollout(
                sequence_id=number,
                prompt_index=number,
                token_ids=rng.integers(0, vocab_size, length),
                region_L=single_turn(prompt=prompt, prefix=prefix, continuation=written),
                sampling_logprob=logprob,
                model_logprob=logprob,
                finished=True,
            )
        )
    return rollouts


def grouped_rollouts(step: int, *, vocab_size: int) -> list[Rollout]:
    """Samples of prompts under one system prompt of three tokens, and one that is alone.

    Prompts of 9 (five samples), 5 (three) and 20 tokens (four, too many for a pack of 64). Among the answers: two that
    are equal, one that begins another, two that begin alike, one written by the teacher from end to end, one guided in
    its first half, one of a single token.
    """
    rng = np.random.default_rng(3000 + step)

    def draw(count: int) -> np.ndarray:
        return rng.integers(0, vocab_size, count)

    system = draw(3)
    equal, longer, start = draw(7), draw(11), draw(4)
    groups = [
        (draw(6), [equal, equal, longer, longer[:5], draw(8)]),
        (draw(2), [np.append(start, draw(5)), np.append(start, draw(9)), draw(1)]),
        (draw(17), [draw(12), draw(15), draw(14), draw(13)]),
    ]
    listed = [(np.append(system, prompt), answer) for prompt, answers in groups for answer in answers]
    listed.append((draw(4), draw(10)))
    prefixes = {4: 8, 7: 1, 9: 7}  # tokens that the teacher wrote, by the number of the sequence
    return [_sample(number, *texts, prefixes.get(number, 0), rng) for number, texts in enumerate(listed)]


def _sample(number: int, prompt: np.ndarray, answer: np.ndarray, prefix: int, rng: np.random.Generator) -> Rollout:
    written = len(answer) - prefix
    logprob = rng.uniform(-4, 0, written).astype(np.float32)
    return Rollout(
        sequence_id=number,
        prompt_index=number,
        token_ids=np.append(prompt, answer),
        region_L=single_turn(prompt=len(prompt), prefix=prefix, continuation=written),
        sampling_logprob=logprob,
        model_logprob=logprob,
        finished=True,
    )


def with_turns(rollouts: Sequence[Rollout], *, seed: int = 0) -> list[Rollout]:
    """The same sequences with responses of several turns: stretches of all kinds, of one to four tokens."""
    rng = np.random.default_rng(2000 + seed)
    kinds = [Region.OBSERVATION, Region.CONTINUATION, Region.PREFIX]
    found = []
    for one in rollouts:
        prompt, region_L = one.prompt_length, one.region_L.copy()
        at, kind = prompt, int(rng.integers(3))
        while at < len(region_L):
            stretch = int(rng.integers(1, 5))
            region_L[at : at + stretch] = kinds[kind]
            at, kind = at + stretch, (kind + int(rng.integers(1, 3))) % 3
        logprob = rng.uniform(-4, 0, int((region_L == Region.CONTINUATION).sum())).astype(np.float32)
        found.append(replace(one, region_L=region_L, sampling_logprob=logprob, model_logprob=logprob))
    return found


# --------------------------------------------------------------------------- the textbook


@dataclass(frozen=True, kw_only=True)
class Objective:
    """``tropd`` with these options; ``opd``, ``exopd``; or ``fkl``, ``rkl``, over the whole vocabulary or a support."""

    name: str = "tropd"
    k: int = 7
    beta: float = 0.3
    seed: int = 5
    support: str = ""  # fkl and rkl: whose k tokens; "" is the whole vocabulary
    tail: str = "bucket"
    ends: tuple[int, ...] = ()  # ids that count as one token; opd, fkl and rkl alone

    def options(self) -> dict[str, object]:
        """The method section of a config."""
        if self.name == "tropd":
            return {"name": "tropd", "k": self.k, "beta": self.beta}
        if self.support:
            return {"name": self.name, "form": "topk", "k": self.k, "support": self.support, "tail": self.tail}
        return {"name": self.name}


@dataclass
class Reference:
    """A student trained by plain autograd on one process, one sequence at a time, in the models' precision."""

    student: Any
    teacher: Any
    objective: Objective
    vocab_size: int
    base: Any = None  # exopd's third model
    losses: list[float] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)  # mean absolute loss of a token: what a loss's rounding is about
    grad_norms: list[float] = field(default_factory=list)
    outliers: list[float] = field(default_factory=list)
    over_tokens: list[float] = field(default_factory=list)  # loss of a step's minibatches together: a mean over tokens
    tokens: list[int] = field(default_factory=list)  # that carry loss, of a step
    first_gradients: dict[str, Tensor] = field(default_factory=dict)

    def train(
        self,
        batches: Sequence[list[Rollout]],
        optimizer: dict[str, float],
        rates: Sequence[float],
        *,
        minibatches: int = 1,
    ) -> None:
        """AdamW with clipping. ``batches[i]``: the rollouts of step i. ``rates``: the learning rate of every update."""
        matrices = [p for p in self.student.parameters() if p.dim() > 1]
        vectors = [p for p in self.student.parameters() if p.dim() == 1]
        adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optimizer["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
            lr=optimizer["lr"],
            betas=(optimizer["beta1"], optimizer["beta2"]),
            eps=optimizer["eps"],
        )
        rate = iter(rates)
        for step, rollouts in enumerate(batches):
            with torch.no_grad():
                old = {r.sequence_id: hf_logprobs(self.student, r.token_ids, self.vocab_size) for r in rollouts}
            ends = np.linspace(0, len(rollouts), minibatches + 1).astype(int).tolist()
            results = []
            for a, b in pairwise(ends):
                now = next(rate)
                for group in adam.param_groups:
                    group["lr"] = now
                results.append(self._update(rollouts[a:b], old, step, adam, optimizer["clip_grad"]))
            loss, size, norm, outliers, _ = np.mean(results, axis=0).tolist()
            counts = [count for *_, count in results]
            self.tokens.append(sum(counts))
            self.over_tokens.append(sum(result[0] * result[-1] for result in results) / sum(counts))
            self.losses.append(loss)
            self.sizes.append(size)
            self.grad_norms.append(norm)
            self.outliers.append(outliers)

    def _update(
        self, rollouts: list[Rollout], old: dict[int, Tensor], step: int, adam: Any, clip: float
    ) -> tuple[float, float, float, float, int]:
        adam.zero_grad()
        losses, outliers, written = [], 0, 0
        for rollout in rollouts:
            loss_N, outside = self._token_losses(rollout, old[rollout.sequence_id], step)
            losses.append(loss_N)
            outliers += outside
            written += rollout.count(Region.CONTINUATION)
        loss_T = torch.cat(losses)
        loss_T.mean().backward()
        if not self.first_gradients:
            self.first_gradients = {
                name: p.grad.clone() for name, p in self.student.named_parameters() if p.grad is not None
            }
        norm = float(torch.nn.utils.clip_grad_norm_(self.student.parameters(), clip))
        adam.step()
        loss_T = loss_T.detach()
        return float(loss_T.mean()), float(loss_T.abs().mean()), norm, outliers / max(written, 1), len(loss_T)

    def _support(self, logp_NV: Tensor, old_NV: Tensor, target_N1: Tensor) -> Tensor:
        """True at the candidates, bool ``[N, V]``; the student's own are those at the weights of the rollout.

        Candidates are ids; the ends are one when one of them is.
        """
        inside_NV = torch.zeros_like(logp_NV, dtype=torch.bool)
        whose = {
            "": [torch.arange(logp_NV.size(1)).expand(len(logp_NV), -1)],
            "teacher": [logp_NV.topk(self.objective.k).indices],
            "student": [old_NV.topk(self.objective.k).indices],
            "union": [x.topk(self.objective.k).indices for x in (logp_NV, old_NV)],
            "teacher_and_sampled": [logp_NV.topk(self.objective.k).indices, target_N1],
        }
        for ids_NK in whose[self.objective.support]:
            inside_NV.scatter_(1, ids_NK, True)
        if not self.objective.ends:
            return inside_NV
        ends_N1 = inside_NV[:, list(self.objective.ends)].any(-1, keepdim=True)
        return torch.cat([inside_NV[:, self._others()], ends_N1], dim=1)

    def _others(self) -> list[int]:
        return [i for i in range(self.vocab_size) if i not in self.objective.ends]

    def _merged(self, logprob_LV: Tensor) -> Tensor:
        """Log-probs of all ids that are no end, and in the last column those of the ends together."""
        ends_L1 = logprob_LV[:, list(self.objective.ends)].logsumexp(-1, keepdim=True)
        return torch.cat([logprob_LV[:, self._others()], ends_L1], dim=1)

    def _category(self, token: int) -> int:
        others = self._others()
        return len(others) if token in self.objective.ends else others.index(token)

    def _token_losses(self, rollout: Rollout, old_LV: Tensor, step: int) -> tuple[Tensor, int]:
        """Loss of every token of the sequence that carries one, and its number of outliers."""
        loss_N, outliers = self._response_losses(rollout, old_LV, step)
        written = torch.from_numpy(rollout.region_L[rollout.prompt_length :] != Region.OBSERVATION)
        return loss_N[written], outliers

    def _response_losses(self, rollout: Rollout, old_LV: Tensor, step: int) -> tuple[Tensor, int]:
        """Losses of all tokens after the prompt, as if each were one of a response."""
        tokens = torch.from_numpy(rollout.token_ids)
        first = rollout.prompt_length - 1  # the position that predicts the first response token
        logq_NV = hf_logprobs(self.student, rollout.token_ids, self.vocab_size)[first:]
        with torch.no_grad():
            logp_NV = hf_logprobs(self.teacher, rollout.token_ids, self.vocab_size)[first:]
        target_N1 = tokens[first + 1 :, None]
        compared = self.objective.name in ("fkl", "rkl")
        inside_NV = self._support(logp_NV, old_LV[first:], target_N1) if compared else None
        if self.objective.ends:
            old_LV = self._merged(old_LV)
            logq_NV, logp_NV = self._merged(logq_NV), self._merged(logp_NV)
            target_N1 = torch.tensor([[self._category(int(i))] for i in target_N1])
        logq, logp, old = (x.gather(1, target_N1)[:, 0] for x in (logq_NV, logp_NV, old_LV[first:]))
        continuation = torch.from_numpy(rollout.region_L[first + 1 :] == Region.CONTINUATION)
        on_policy = -(logp - logq).detach() * logq
        if inside_NV is not None:
            first_NV, second_NV = (logp_NV, logq_NV) if self.objective.name == "fkl" else (logq_NV, logp_NV)
            divergence = kl_within(first_NV, second_NV, inside_NV, self.objective.tail)
            return torch.where(continuation, divergence, 0.0), 0
        if self.objective.name == "exopd":
            with torch.no_grad():
                logb_NV = hf_logprobs(self.base, rollout.token_ids, self.vocab_size)[first:]
                logb = logb_NV.gather(1, target_N1)[:, 0]
                reward = 1.25 * (logp - logb) - (logq - logb)
            return torch.where(continuation, -reward * logq, 0.0), 0
        if self.objective.name == "opd":
            return torch.where(continuation, on_policy, 0.0), 0
        drawn = uniforms(
            seed=self.objective.seed,
            step=step,
            sequence_id=rollout.sequence_id,
            stream=Stream.GATE,
            count=len(tokens),
        )
        uniform = torch.from_numpy(drawn)[first:-1].double()
        trusted = uniform < torch.exp(logp - old).clamp(max=1.0)
        top = logp_NV.topk(self.objective.k)
        forward_kl = (top.values.exp() * (top.values - logq_NV.gather(1, top.indices))).sum(-1)
        loss = torch.where(continuation, torch.where(trusted, on_policy, forward_kl), self.objective.beta * -logq)
        return loss, int((continuation & ~trusted).sum())


def kl_within(first_NV: Tensor, second_NV: Tensor, inside_NV: Tensor, tail: str) -> Tensor:
    """``sum f (log f - log g)`` over the ids inside, and the rest as one more category (or neither): dense sums."""
    if tail == "renorm":
        first_NV, second_NV = (
            x - x.masked_fill(~inside_NV, -torch.inf).logsumexp(-1, keepdim=True) for x in (first_NV, second_NV)
        )
    kl_N = torch.where(inside_NV, first_NV.exp() * (first_NV - second_NV), 0.0).sum(-1)
    if tail != "bucket" or bool(inside_NV.all()):
        return kl_N
    first_N, second_N = (torch.where(inside_NV, 0.0, x.exp()).sum(-1) for x in (first_NV, second_NV))
    return kl_N + first_N * (first_N / second_N).log()


def relative_error(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|`` over all elements, in fp64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
