"""Cached decoding through Megatron's modules, one prefill per row: what the sampler's plain functions are held to.

Tokens are drawn by the package's own ``sample``, which tests/unit/engine/test_engine_decode.py holds to the definition.
``python -m tests.support.decode_by_modules`` times the two in turns.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.engine.attention import causal_attention
from megatron_tropd.engine.decode import Continuation, _logits, decode_batch, sample
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.patches.cuda_calls import cuda_names_mean_cpu
from megatron_tropd.engine.patches.parallel_state import use_parallel_state
from megatron_tropd.types import Float32Array, Int64Array, SamplingParams

_COMPACT_BELOW = 0.7


@dataclass(slots=True)
class KeyValueCache:
    """Rotated keys and values of every layer, ``[b, key heads, max_length, d]``, filled left to right per row."""

    batch_size: int
    max_length: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's buffers, made on first use with the heads and dtype of ``like`` ``[s, b, heads, d]``."""
        if layer not in self.keys:
            shape = (self.batch_size, like.size(2), self.max_length, like.size(3))
            self.keys[layer], self.values[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return self.keys[layer], self.values[layer]

    def keep(self, rows: Tensor) -> None:
        """Drop every row but ``rows`` (finished sequences leave the batch)."""
        for buffers in (self.keys, self.values):
            for layer, buffer in buffers.items():
                buffers[layer] = buffer[rows]
        self.batch_size = len(rows)


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """A batch of right-padded prompts; keys and values are cached, and causality alone hides the padding."""

    cache: KeyValueCache
    qkv_format: str = "prefill"

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self.cache.layer(layer, key)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        keys[:, :, : k.size(2)] = k
        values[:, :, : v.size(2)] = v
        return causal_attention(q, k, v, scale).permute(2, 0, 1, 3)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One new token per row, at its own position, attending to what its row has cached."""

    cache: KeyValueCache
    position_B: Tensor  # where each row's token stands
    longest: int  # max(position_B) + 1, known without asking the device
    qkv_format: str = "decode"

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self.cache.layer(layer, key)
        rows = torch.arange(len(self.position_B), device=key.device)
        keys[rows, :, self.position_B] = key[0]
        values[rows, :, self.position_B] = value[0]
        k, v = keys[:, :, : self.longest], values[:, :, : self.longest]
        # plain products: for one query SDPA's setup costs more than its work
        batch, kv_heads = k.shape[:2]
        q = query[0].view(batch, kv_heads, -1, query.size(-1))
        hidden = torch.arange(self.longest, device=k.device) > self.position_B[:, None]
        scores = (q @ k.transpose(-1, -2)).float().mul_(scale).masked_fill_(hidden[:, None, None], -math.inf)
        return (scores.softmax(-1).to(v.dtype) @ v).reshape(1, batch, -1, query.size(-1))


class _Batch:
    """The rows of one batch while they are being written. Finished rows idle until enough of them are dropped."""

    def __init__(self, model: Model, contexts: Sequence[Int64Array], budgets: Sequence[int]) -> None:
        device, rows = model.device, len(contexts)
        lengths = [len(context) for context in contexts]
        self.model = model
        self.longest = max(lengths)
        self.cache = KeyValueCache(rows, self.longest + max(budgets))
        self.index_B = torch.arange(rows, device=device)  # which context a row continues
        self.position_B = torch.tensor(lengths, device=device)  # where its next token will stand
        self.budget_B = torch.tensor(list(budgets), device=device)
        self.alive_B = torch.ones(rows, dtype=torch.bool, device=device)
        padded = np.zeros((rows, self.longest), dtype=np.int64)
        for row, context in enumerate(contexts):
            padded[row, : len(context)] = context
        self._contexts = torch.from_numpy(padded).to(device)

    def prefill(self) -> Tensor:
        """Cache the contexts; return ``[B, D]`` hidden states of their last tokens."""
        positions = torch.arange(self.longest, device=self._contexts.device).expand_as(self._contexts)
        plan = PrefillPlan(self.cache)
        hidden = self.model.chunks[0](self._contexts, positions, None, packed_seq_params=plan)
        return hidden[self.position_B - 1, self.index_B]

    def advance(self, token_B: Tensor) -> Tensor:
        """Append one token per row; return ``[B, D]`` hidden states."""
        self.longest += 1
        plan = DecodePlan(self.cache, self.position_B, self.longest)
        hidden = self.model.chunks[0](token_B[:, None], self.position_B[:, None], None, packed_seq_params=plan)
        # an idle row stays where it is: it could otherwise walk past the last position the model knows
        self.position_B = self.position_B + self.alive_B
        return hidden[0]

    def drop_finished(self, token_B: Tensor, alive: int) -> Tensor:
        """Keep only living rows once they are few; return their part of ``token_B``."""
        if alive >= _COMPACT_BELOW * len(token_B):
            return token_B
        keep = self.alive_B.nonzero()[:, 0]
        self.cache.keep(keep)
        for name in ("index_B", "position_B", "budget_B", "alive_B"):
            setattr(self, name, getattr(self, name)[keep])
        return token_B[keep]


@torch.no_grad()
def decode_by_modules(
    model: Model,
    contexts: Sequence[Int64Array],
    budgets: Sequence[int],
    uniforms_BL: Float32Array,
    params: SamplingParams,
    *,
    vocab_size: int,
) -> list[Continuation]:
    """Continue every context by at most its budget (>= 1) tokens with ids below ``vocab_size``.

    Args:
        contexts: token ids, one array per row, at least one token each.
        uniforms_BL: ``[B, max budget]`` numbers in [0, 1): token ``i`` of a row uses column ``i``.
    """
    device, max_new = model.device, max(budgets)
    uniforms = torch.from_numpy(uniforms_BL).to(device)
    stops = torch.tensor(sorted(params.stop_token_ids), dtype=torch.long, device=device)
    batch = _Batch(model, contexts, budgets)
    tokens = torch.zeros(len(contexts), max_new, dtype=torch.long, device=device)
    logprobs = torch.zeros(2, len(contexts), max_new, device=device)
    count = torch.zeros(len(contexts), dtype=torch.long, device=device)
    finished = torch.zeros(len(contexts), dtype=torch.bool, device=device)
    with use_parallel_state(model.groups):
        hidden_BD = batch.prefill()
        for step in range(max_new):
            drawn = sample(
                _logits(model, hidden_BD, vocab_size),
                uniforms[batch.index_B, step],
                params,
                stops=stops,
                step=step,
            )
            write = batch.index_B[batch.alive_B]
            tokens[write, step] = drawn.token_B[batch.alive_B]
            logprobs[0, write, step] = drawn.sampling_logprob_B[batch.alive_B]
            logprobs[1, write, step] = drawn.model_logprob_B[batch.alive_B]
            count[write] = step + 1
            stopped_B = torch.isin(drawn.token_B, stops)
            finished[write] = stopped_B[batch.alive_B]
            batch.alive_B = batch.alive_B & ~stopped_B & (step + 1 < batch.budget_B)
            alive = int(batch.alive_B.sum())
            if alive == 0:
                break
            hidden_BD = batch.advance(batch.drop_finished(drawn.token_B, alive))
    return _collect(tokens, logprobs, count, finished)


def _collect(tokens: Tensor, logprobs: Tensor, count: Tensor, finished: Tensor) -> list[Continuation]:
    token_ids, (sampling, model) = tokens.cpu().numpy(), logprobs.cpu().numpy()
    return [
        Continuation(token_ids[row, :n].copy(), sampling[row, :n].copy(), model[row, :n].copy(), done)
        for row, (n, done) in enumerate(zip(count.tolist(), finished.tolist(), strict=True))
    ]


def main(*, turns: int = 9, prompts: int = 8, samples: int = 5, new_tokens: int = 30) -> None:
    """Print the processor milliseconds of a batch of the demo's student, of each way of decoding it."""
    from megatron_tropd.parallel.groups import GroupBuilder, Layout, initialize_distributed
    from megatron_tropd.setup.build import load_model

    path, device = Path(__file__).parents[2] / "examples" / "demo" / "student", initialize_distributed()
    model = load_model(path, GroupBuilder().build(Layout()), dtype=torch.float32, device=device).freeze()
    rng = np.random.default_rng(0)
    contexts = [c for c in (rng.integers(5, 200, rng.integers(24, 48)) for _ in range(prompts)) for _ in range(samples)]
    numbers = rng.random((len(contexts), new_tokens), dtype=np.float32)
    ways = {
        "modules, every call wrapped": (decode_by_modules, cuda_names_mean_cpu),
        "modules": (decode_by_modules, nullcontext),
        "functions": (decode_batch, nullcontext),
    }
    seconds: dict[tuple[str, int], list[float]] = {(name, count): [] for name in ways for count in (1, new_tokens)}
    for _ in range(turns):
        for (name, count), found in seconds.items():
            decode, mode = ways[name]
            with mode():
                began = time.process_time()
                params = SamplingParams(max_new_tokens=count)
                decode(model, contexts, [count] * len(contexts), numbers[:, :count], params, vocab_size=200)
                found.append(time.process_time() - began)
    for name in ways:
        first, whole = (1e3 * statistics.median(seconds[name, count]) for count in (1, new_tokens))
        print(
            f"{name:28} {whole:7.1f} ms, first token {first:6.1f}, each other {(whole - first) / (new_tokens - 1):5.2f}"
        )


if __name__ == "__main__":
    main()
