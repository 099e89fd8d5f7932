"""Measure what is saved where what samples of a prompt share is computed once.

``python -m megatron_tropd.benchmarks.sharing`` scores and learns from batches of the same number of tokens, with 1, 4,
8 and 16 samples of a prompt, and prompts eight times, once and an eighth as long as the answers: as forests
(``train.share_prefixes``), and every sequence by itself. Both ways take turns, batch by batch, on the same models in
one process; seconds are processor seconds, the least of the rounds, and good for ratios on a machine that does other
things, too. Models are random: what they say is of no interest here.
"""

from __future__ import annotations

import ctypes
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from megatron_tropd.config.sections import Layout, OptimizerConfig
from megatron_tropd.data.packing import pack
from megatron_tropd.engine.batch import BatchFacts, batch_weights, train_packs
from megatron_tropd.engine.model import build_model
from megatron_tropd.engine.optimizer import optimize
from megatron_tropd.engine.rows import computed_rows
from megatron_tropd.engine.score import score_packs
from megatron_tropd.engine.step import Trainer
from megatron_tropd.engine.views import TrainPack
from megatron_tropd.methods import build_method
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from megatron_tropd.types import Architecture, Pack, Rollout, single_turn

_SAMPLES = (1, 4, 8, 16)
_RATIOS = {"8:1": (256, 32), "1:1": (144, 144), "1:8": (32, 256)}
_VOCAB = 4096
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingRow:
    """One kind of batch: shared against every sequence by itself."""

    samples: int
    ratio: str  # prompt : answer
    tokens: int
    rows: int
    scoring: tuple[float, float]  # processor seconds, shared and by itself
    learning: tuple[float, float]
    peak: tuple[float, float]  # bytes that a pass adds to what the process holds; nan where the system does not say


def architecture(*, layers: int, hidden: int) -> Architecture:
    """Describe a dense model of the family that the demo trains."""
    return Architecture(
        family="qwen3",
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=3 * hidden,
        num_heads=hidden // 32,
        num_kv_heads=hidden // 64,
        head_dim=32,
        vocab_size=_VOCAB,
        max_positions=512,
        rope_theta=1e4,
        norm_eps=1e-6,
        tied_embeddings=True,
        qk_norm=True,
    )


def batch(*, samples: int, prompt: int, answer: int, sequences: int, seed: int = 0) -> list[Rollout]:
    """Draw sequences of which each ``samples`` begin with one prompt; answers have next to nothing in common."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, _VOCAB, prompt) for _ in range(-(-sequences // samples))]
    nothing = np.empty(0, np.float32)
    return [
        Rollout(
            sequence_id=number,
            prompt_index=number // samples,
            token_ids=np.append(prompts[number // samples], rng.integers(0, _VOCAB, answer)),
            region_L=single_turn(prompt=prompt, prefix=answer),
            sampling_logprob=nothing,
            model_logprob=nothing,
            finished=True,
        )
        for number in range(sequences)
    ]


class Bench:
    """A model that scores and one that learns, on this process alone."""

    def __init__(self, shape: Architecture) -> None:
        device = initialize_distributed()
        groups = GroupBuilder().build(Layout())
        self.teacher, self.student = (
            build_model(shape, groups, dtype=torch.float32, device=device, seed=seed) for seed in (1, 2)
        )
        self.teacher.freeze()
        self.method = build_method("sft")
        optimization = optimize(self.student, OptimizerConfig(lr=1e-4), steps=1)
        self.trainer = Trainer(self.student, optimization, self.method)

    def items(self, packs: Sequence[Pack], rollouts: Sequence[Rollout]) -> list[TrainPack]:
        """Make packs ready for learning."""
        facts, nothing = BatchFacts(seed=0, step=0, progress=0.0), [None] * len(packs)
        return train_packs(
            packs,
            batch_weights([packs], self.method, facts, self.student.groups),
            nothing,
            nothing,
            rollouts={one.sequence_id: one for one in rollouts},
            method=self.method,
            facts=facts,
            model=self.student,
        )

    def measure(self, rollouts: Sequence[Rollout], *, samples: int, ratio: str, rounds: int) -> SharingRow:
        """Score and learn both ways, in turns."""
        tokens = sum(len(one.token_ids) for one in rollouts)
        packs = [pack(rollouts, max_tokens=tokens, multiple_of=2, share_prefixes=share)[0] for share in (True, False)]
        items = [self.items(one, rollouts) for one in packs]
        scoring, learning, peak = ([math.inf] * 2 for _ in range(3))
        for _ in range(rounds):
            for way in range(2):
                spent, _ = _spent(lambda way=way: score_packs(self.teacher, packs[way], vocab_size=_VOCAB))  # type: ignore[misc]
                scoring[way] = min(scoring[way], spent)
                spent, added = _spent(lambda way=way: self.trainer.probe(items[way]))  # type: ignore[misc]
                learning[way], peak[way] = min(learning[way], spent), min(peak[way], added)
        return SharingRow(
            samples=samples,
            ratio=ratio,
            tokens=tokens,
            rows=sum(map(computed_rows, packs[0])),
            scoring=(scoring[0], scoring[1]),
            learning=(learning[0], learning[1]),
            peak=(peak[0], peak[1]),
        )


def _spent(run: Callable[[], object]) -> tuple[float, float]:
    """Return the processor seconds of a call, and the bytes it added to the process at its peak."""
    before = _reset_peak()
    start = time.process_time()
    run()
    return time.process_time() - start, _status("VmHWM") - before


def _reset_peak() -> float:
    """Forget the process's peak, where Linux lets one; return the bytes that it holds now."""
    if hasattr(ctypes.CDLL(None), "malloc_trim"):  # or what earlier passes have freed would hide what this one takes
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return math.nan
    return _status("VmRSS")


def _status(name: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.nan
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), math.nan)


def table_of(rows: Sequence[SharingRow]) -> Table:
    """Tabulate, a line for each kind of batch."""
    table = Table(title="shared / every sequence by itself", title_justify="left")
    for column in ("samples", "prompt:answer", "tokens", "rows", "scoring, s", "", "learning, s", "", "peak, MiB", ""):
        table.add_column(column, justify="right")
    for row in rows:
        pairs = []
        for here, alone in (row.scoring, row.learning):
            pairs += [f"{here:.3f} / {alone:.3f}", f"{here / alone:.2f}"]
        here, alone = row.peak
        pairs += [f"{here / _MIB:.0f} / {alone / _MIB:.0f}", f"{here / alone:.2f}" if alone else "-"]
        share = f"{row.rows:,} ({row.rows / row.tokens:.2f})"
        table.add_row(str(row.samples), row.ratio, f"{row.tokens:,}", share, *pairs)
    return table


def main(
    rounds: Annotated[int, typer.Option(help="Turns of each way; the least counts.", min=1)] = 5,
    sequences: Annotated[int, typer.Option(help="Sequences of 288 tokens in a batch.", min=1)] = 16,
    layers: Annotated[int, typer.Option(help="Layers of both models.", min=1)] = 4,
    hidden: Annotated[int, typer.Option(help="Their hidden size, a multiple of 64.", min=64)] = 256,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure what sharing saves of scoring and learning."""
    bench = Bench(architecture(layers=layers, hidden=hidden))
    rows = []
    for ratio, (prompt, answer) in _RATIOS.items():
        for samples in _SAMPLES:
            rollouts = batch(samples=samples, prompt=prompt, answer=answer, sequences=sequences)
            rows.append(bench.measure(rollouts, samples=samples, ratio=ratio, rounds=rounds))
    Console(width=140).print(table_of(rows))
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
