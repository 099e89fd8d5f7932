"""Cached decoding with a Megatron model: one batch of sequences, each with its own length and random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.engine.cache import DistinctContexts, KeyValueCache, PrefillAttention
from megatron_tropd.engine.functional import FunctionalModel
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.patches.parallel_state import use_parallel_state
from megatron_tropd.losses.vocab_parallel import project
from megatron_tropd.types import Float32Array, Int64Array, SamplingParams

# dropping rows copies the cache, so it waits until no more than this share of the batch is alive
_COMPACT_BELOW = 0.7


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens sampled after one context."""

    token_ids: Int64Array  # [L] includes the stop token
    sampling_logprob: Float32Array  # [L]
    model_logprob: Float32Array  # [L]
    finished: bool


class _Batch:
    """The rows of one batch while they are being written. Finished rows idle until enough of them are dropped."""

    def __init__(self, model: Model, contexts: Sequence[Int64Array], budgets: Sequence[int]) -> None:
        device, rows = model.device, len(contexts)
        lengths = [len(context) for context in contexts]
        room = max(lengths) + max(budgets)
        self.layers = FunctionalModel(model, positions=room)
        self.index_B = torch.arange(rows, device=device)  # which context a row continues
        self.position_B = torch.tensor(lengths, device=device)  # where its next token will stand
        self.budget_B = torch.tensor(list(budgets), device=device)
        self.alive_B = torch.ones(rows, dtype=torch.bool, device=device)
        self._distinct = DistinctContexts.of(contexts)
        self.cache = KeyValueCache(self._distinct, self.position_B, room=room)

    def prefill(self) -> Tensor:
        """Cache the contexts, each distinct one computed once; return ``[B, D]`` hidden states of their last tokens."""
        token_PL = torch.from_numpy(self._distinct.padded()).to(self.position_B.device)
        position_PL = torch.arange(token_PL.size(1), device=token_PL.device).expand_as(token_PL)
        attention = PrefillAttention(self.cache, len(token_PL))
        hidden_RD = self.layers.hidden(token_PL.flatten(), position_PL.flatten(), attention)
        source_B = torch.from_numpy(self._distinct.source_B).to(token_PL.device)
        return hidden_RD[source_B * token_PL.size(1) + self.position_B - 1]

    def advance(self, token_B: Tensor) -> Tensor:
        """Append one token per row; return ``[B, D]`` hidden states."""
        hidden_BD = self.layers.hidden(token_B, self.position_B, self.cache)
        self.cache.column += 1
        # an idle row stays where it is: it could otherwise walk past the last position the model knows
        self.position_B = self.position_B + self.alive_B
        return hidden_BD

    def drop_finished(self, token_B: Tensor, alive: int) -> Tensor:
        """Keep only living rows once they are few; return their part of ``token_B``."""
        if alive >= _COMPACT_BELOW * len(token_B):
            return token_B
        keep = self.alive_B.nonzero()[:, 0]
        self.cache.keep(keep)
        for name in ("index_B", "position_B", "budget_B", "alive_B"):
            setattr(self, name, getattr(self, name)[keep])
        return token_B[keep]


@dataclass(frozen=True, slots=True)
class _Step:
    """The tokens drawn in one step, row by row; those of rows that are not alive do not count."""

    index_B: Tensor
    alive_B: Tensor
    stopped_B: Tensor
    drawn: Drawn


@torch.no_grad()
def decode_batch(
    model: Model,
    contexts: Sequence[Int64Array],
    budgets: Sequence[int],
    uniforms_BL: Float32Array,
    params: SamplingParams,
    *,
    vocab_size: int,
    on_token: Callable[[int, int], None] = lambda count, alive: None,
) -> list[Continuation]:
    """Continue every context by at most its budget (>= 1) tokens with ids below ``vocab_size``.

    Args:
        contexts: token ids, one array per row, at least one token each.
        uniforms_BL: ``[B, max budget]`` numbers in [0, 1): token ``i`` of a row uses column ``i``.
        on_token: called with the number of tokens written of each row, and of rows that are still written to.
    """
    uniforms = torch.from_numpy(uniforms_BL).to(model.device)
    steps: list[_Step] = []
    # Megatron's modules, which experts are, read its global state
    with use_parallel_state(model.groups) if model.config.num_moe_experts else nullcontext():
        for step, alive in _write(model, _Batch(model, contexts, budgets), uniforms, params, vocab_size=vocab_size):
            steps.append(step)
            on_token(len(steps), alive)
    return _collect(steps, len(contexts), max(budgets))


def _write(
    model: Model, batch: _Batch, uniforms_BL: Tensor, params: SamplingParams, *, vocab_size: int
) -> Iterator[tuple[_Step, int]]:
    """Draw tokens until every row has stopped or spent its budget; yield each step and how many rows are alive."""
    stops = torch.tensor(sorted(params.stop_token_ids), dtype=torch.long, device=model.device)
    hidden_BD = batch.prefill()
    for step in range(uniforms_BL.size(1)):
        logits_BV = _logits(model, hidden_BD, vocab_size)
        drawn = sample(logits_BV, uniforms_BL[batch.index_B, step], params, stops=stops, step=step)
        written = _Step(batch.index_B, batch.alive_B, torch.isin(drawn.token_B, stops), drawn)
        batch.alive_B = batch.alive_B & ~written.stopped_B & (step + 1 < batch.budget_B)
        alive = int(batch.alive_B.sum())
        yield written, alive
        if alive == 0:
            return
        hidden_BD = batch.advance(batch.drop_finished(drawn.token_B, alive))


def _collect(steps: Sequence[_Step], rows: int, longest: int) -> list[Continuation]:
    """Sort what the steps have drawn into rows, all of it at once."""
    device = steps[0].index_B.device
    alive = torch.cat([step.alive_B for step in steps])
    index = torch.cat([step.index_B for step in steps])[alive]
    drawn_in = torch.repeat_interleave(torch.tensor([len(step.index_B) for step in steps], device=device))[alive]
    tokens = torch.zeros(rows, longest, dtype=torch.long, device=device)
    logprobs = torch.zeros(2, rows, longest, device=device)
    tokens[index, drawn_in] = torch.cat([step.drawn.token_B for step in steps])[alive]
    logprobs[0, index, drawn_in] = torch.cat([step.drawn.sampling_logprob_B for step in steps])[alive]
    logprobs[1, index, drawn_in] = torch.cat([step.drawn.model_logprob_B for step in steps])[alive]
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    finished[index[torch.cat([step.stopped_B for step in steps])[alive]]] = True
    counts = torch.bincount(index, minlength=rows).tolist()
    token_ids, (sampling, model) = tokens.cpu().numpy(), logprobs.cpu().numpy()
    return [
        Continuation(token_ids[row, :n].copy(), sampling[row, :n].copy(), model[row, :n].copy(), done)
        for row, (n, done) in enumerate(zip(counts, finished.tolist(), strict=True))
    ]


def _logits(model: Model, hidden_BD: Tensor, vocab_size: int) -> Tensor:
    """Take ``[B, V]`` logits of the ids that may be drawn, fp32 sums whatever the weights are, on every tensor rank."""
    local = project(hidden_BD, model.chunks[0].output_weight())
    if model.groups.tp is not None:
        shards = [torch.empty_like(local) for _ in range(model.groups.layout.tensor)]
        dist.all_gather(shards, local.contiguous(), group=model.groups.tp)
        local = torch.cat(shards, dim=-1)
    return local[:, :vocab_size]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One sampled token per row."""

    token_B: Tensor
    sampling_logprob_B: Tensor  # under the distribution it was drawn from
    model_logprob_B: Tensor  # under softmax(logits)


def sample(
    logits_BV: Tensor, uniform_B: Tensor, params: SamplingParams, *, stops: Tensor | None = None, step: int = 0
) -> Drawn:
    """Draw one token per row by inverting the cumulative distribution at ``uniform_B``.

    Temperature 0 takes the most likely token (probability 1 under the sampling distribution). Top-k keeps the k most
    likely tokens; top-p then keeps the smallest set that reaches p, always with the most likely token in it.
    Stop tokens cannot be drawn before ``params.min_new_tokens``.
    """
    model_logprob_BV = logits_BV.log_softmax(-1)
    if stops is not None and step < params.min_new_tokens:
        logits_BV = logits_BV.index_fill(1, stops, -torch.inf)
    if params.temperature == 0:
        token_B = logits_BV.argmax(-1)
        sampling_B = torch.zeros_like(uniform_B)
    else:
        token_B, sampling_B = _invert(logits_BV / params.temperature, uniform_B, params)
    return Drawn(token_B, sampling_B, model_logprob_BV.gather(1, token_B[:, None])[:, 0])


def _invert(logits_BV: Tensor, uniform_B: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    probability_BV = logits_BV.softmax(-1)
    order_BV = None
    if params.top_k or params.top_p < 1.0:
        probability_BV, order_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        if params.top_k:
            probability_BV[:, params.top_k :] = 0
        if params.top_p < 1.0:
            before_BV = probability_BV.cumsum(-1) - probability_BV
            total_B1 = probability_BV.sum(-1, keepdim=True)
            probability_BV = probability_BV.masked_fill(before_BV >= params.top_p * total_B1, 0.0)
    cumulative_BV = probability_BV.double().cumsum(-1)
    total_B = cumulative_BV[:, -1]
    # strictly greater: a token of probability 0 has an empty interval and cannot be drawn
    column_B1 = (cumulative_BV <= (uniform_B.double() * total_B)[:, None]).sum(-1, keepdim=True)
    column_B1 = column_B1.clamp_(max=probability_BV.size(1) - 1)
    sampling_B = (probability_BV.gather(1, column_B1)[:, 0].double() / total_B).log().float()
    token_B1 = column_B1 if order_BV is None else order_BV.gather(1, column_B1)
    return token_B1[:, 0], sampling_B
