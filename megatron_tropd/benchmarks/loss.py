"""Time and memory of the vocabulary-parallel loss against what it replaces.

``python -m megatron_tropd.benchmarks.loss``

One run compares, forward and backward, for K log-probs per token (and, with ``--entropy``, the entropy):

* ``fused``: ``losses.linear_logprobs``, by kernels on a GPU;
* ``kept``: the same with its logits kept in the inputs' dtype, so that it needs three products (``--keep-gb``);
* ``no kernels``: the same by torch alone (GPU only);
* ``plain``: ``log_softmax`` of whole fp32 logits under autograd;
* ``compiled``: the same under ``torch.compile``;
* ``liger``: Liger's fused linear JSD, where installed: another objective of the same four products;
* ``products``: the floor, its four matrix products alone (logits, logits again, two gradients).

Variants take turns, so that a busy machine is busy for all; times are medians, between CUDA events on a GPU. Peak extra
memory is what is allocated beyond the inputs and their gradients: counted allocation by allocation on a CPU, by the
allocator's peak on a GPU. With ``--traffic`` the collectives are counted instead: bytes a rank hands in per token.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tropd.losses.vocab_parallel import linear_logprobs
from megatron_tropd.losses.vocab_parallel.backends.triton import kernels

_GPU_SLICE = 8192  # columns of the vocabulary
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the problem: tokens, hidden size, vocabulary, candidates per token."""

    tokens: int
    hidden: int
    vocab: int
    candidates: int


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Leaves with gradient, ids, and the incoming gradients."""

    hidden_TD: Tensor
    weight_VD: Tensor
    ids_TK: Tensor
    grad_TK: Tensor
    grad_T: Tensor | None  # of the entropy; None: not requested


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Median seconds of one variant and its peak extra memory in bytes."""

    name: str
    seconds: float
    extra_bytes: int


def make_inputs(shape: Shape, *, dtype: torch.dtype, device: torch.device, entropy: bool = False) -> LossInputs:
    """Make random inputs with logits of standard deviation about 3, as a trained model has."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype) * scale

    return LossInputs(
        normal(shape.tokens, shape.hidden).requires_grad_(),
        normal(shape.vocab, shape.hidden, scale=3 * shape.hidden**-0.5).requires_grad_(),
        torch.randint(0, shape.vocab, (shape.tokens, shape.candidates), generator=generator, device=device),
        normal(shape.tokens, shape.candidates).float(),
        normal(shape.tokens).float() if entropy else None,
    )


def fused(x: LossInputs, *, cache_bytes: int = 0) -> None:
    """Run the package's own loss core."""
    vocab_size = x.weight_VD.shape[0]
    out = linear_logprobs(x.hidden_TD, x.weight_VD, x.ids_TK, vocab_size=vocab_size, cache_bytes=cache_bytes)
    _backward([out.logprob_TK, out.entropy_T], x)


def without_kernels(x: LossInputs) -> None:
    """Run ``fused`` by torch alone."""
    before = os.environ.get(kernels.SWITCH)
    os.environ[kernels.SWITCH] = "off"
    try:
        fused(x)
    finally:
        if before is None:
            del os.environ[kernels.SWITCH]
        else:
            os.environ[kernels.SWITCH] = before


def _backward(outputs: list[Tensor], x: LossInputs) -> None:
    gradients = [x.grad_TK] if x.grad_T is None else [x.grad_TK, x.grad_T]
    torch.autograd.backward(outputs[: len(gradients)], gradients)


def _plain_forward(hidden_TD: Tensor, weight_VD: Tensor, ids_TK: Tensor, entropy: bool) -> list[Tensor]:
    logprob_TV = F.linear(hidden_TD, weight_VD).float().log_softmax(-1)
    picked_TK = logprob_TV.gather(1, ids_TK)
    return [picked_TK, -(logprob_TV.exp() * logprob_TV).sum(-1)] if entropy else [picked_TK]


def plain(x: LossInputs) -> None:
    """Run the loss as one writes it first."""
    _backward(_plain_forward(x.hidden_TD, x.weight_VD, x.ids_TK, x.grad_T is not None), x)


def products(x: LossInputs) -> None:
    """Run the four matrix products of a loss that recomputes its logits, in slices, nothing else."""
    if x.hidden_TD.is_cuda:
        _gpu_products(x)
        return
    with torch.no_grad():
        weight_gradient = torch.zeros_like(x.weight_VD)
        for hidden in x.hidden_TD.split(1024):
            logits = hidden @ x.weight_VD.T
            torch.mm(hidden, x.weight_VD.T, out=logits)
            logits @ x.weight_VD
            weight_gradient.addmm_(logits.T, hidden)


@torch.no_grad()
def _gpu_products(x: LossInputs) -> None:
    """Multiply in slices of the vocabulary, as large as ``fused`` takes them, which leaves each weight gradient one
    product.
    """
    hidden_gradient, weight_gradient = torch.empty_like(x.hidden_TD), torch.empty_like(x.weight_VD)
    slices = zip(x.weight_VD.split(_GPU_SLICE), weight_gradient.split(_GPU_SLICE), strict=True)
    for weight, gradient in slices:
        logits = x.hidden_TD @ weight.T
        torch.mm(x.hidden_TD, weight.T, out=logits)
        torch.mm(logits, weight, out=hidden_gradient)
        torch.mm(logits.T, x.hidden_TD, out=gradient)


def compiled() -> Callable[[LossInputs], None]:
    """Run ``plain`` under ``torch.compile``."""
    forward = torch.compile(_plain_forward)

    def run(x: LossInputs) -> None:
        _backward(forward(x.hidden_TD, x.weight_VD, x.ids_TK, x.grad_T is not None), x)

    return run


def liger() -> Callable[[LossInputs], None] | None:
    """Return Liger's fused linear JSD against a teacher of the same size; None where Liger or a GPU is missing."""
    if not torch.cuda.is_available():
        return None
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError:
        return None
    module = LigerFusedLinearJSD(jsd_beta=0.5)

    def run(x: LossInputs) -> None:
        teacher_hidden, teacher_weight = x.hidden_TD.detach() * 0.9, x.weight_VD.detach()
        module(x.hidden_TD, x.weight_VD, teacher_hidden, teacher_weight).backward()

    return run


def measure(variants: dict[str, Callable[[LossInputs], None]], x: LossInputs, *, repeats: int) -> list[Measurement]:
    """Time the variants in turn, then measure each one's memory."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run(x)  # warm-up, compilation
        _clear(x)
    for _ in range(repeats):
        for name, run in variants.items():
            _clear(x)
            seconds[name].append(_seconds(run, x))
    _clear(x)
    return [
        Measurement(name=name, seconds=statistics.median(seconds[name]), extra_bytes=_peak_extra(run, x))
        for name, run in variants.items()
    ]


def _clear(x: LossInputs) -> None:
    x.hidden_TD.grad = x.weight_VD.grad = None


def _seconds(run: Callable[[LossInputs], None], x: LossInputs) -> float:
    """Return the seconds of one call: between two events in the GPU's own queue, or by the clock."""
    if not x.hidden_TD.is_cuda:
        started = time.perf_counter()
        run(x)
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run(x)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


class _Collectives(TorchDispatchMode):
    """Add up what collectives are given, by pass."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # of a gather the first argument is what is received, from one rank here, so of the same size
            given = [x for x in tree_leaves(args[:1]) if isinstance(x, Tensor)]
            self.found.append((func._schema.name.split("::")[1], sum(x.numel() * x.element_size() for x in given)))
        return func(*args, **(kwargs or {}))


def traffic(shape: Shape, *, entropy: bool) -> dict[str, list[tuple[str, float]]]:
    """List (collective, bytes per token that a rank hands in) of every collective of the loss, forward and backward."""
    x = make_inputs(shape, dtype=torch.float32, device=torch.device("cpu"), entropy=entropy)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            with _Collectives() as forward:
                out = linear_logprobs(
                    x.hidden_TD, x.weight_VD, x.ids_TK, vocab_size=shape.vocab, group=dist.group.WORLD
                )
            with _Collectives() as backward:
                _backward([out.logprob_TK, out.entropy_T], x)
        finally:
            dist.destroy_process_group()
    return {
        name: [(what, size / shape.tokens) for what, size in watch.found]
        for name, watch in (("forward", forward), ("backward", backward))
    }


def _peak_extra(run: Callable[[LossInputs], None], x: LossInputs) -> int:
    """Return the most bytes held at once beyond the inputs and the two gradients every variant must leave behind."""
    _clear(x)
    results = sum(leaf.numel() * leaf.element_size() for leaf in (x.hidden_TD, x.weight_VD))
    if x.hidden_TD.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(x)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = _cpu_peak(run, x)
    _clear(x)
    return max(0, peak - results)


def _cpu_peak(run: Callable[[LossInputs], None], x: LossInputs) -> int:
    """Return the peak from the profiler's record of every allocation and release."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(x)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


def main(
    tokens: int = 2048,
    hidden: int = 256,
    vocab: int = 32_000,
    candidates: int = 64,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    repeats: int = 7,
    entropy: Annotated[bool, typer.Option("--entropy", help="Differentiate the entropy too.")] = False,
    compile_plain: Annotated[
        bool, typer.Option("--compile", help="Also time torch.compile of the plain loss.")
    ] = False,
    keep_gb: Annotated[float, typer.Option(help="Also time the loss with so many GiB of its logits kept.")] = 0.0,
    traffic_only: Annotated[
        bool, typer.Option("--traffic", help="Count the bytes of the collectives per token, on a CPU, and stop.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Print the table. The GPU budget's shape: --tokens 16384 --hidden 4096 --vocab 151936 --dtype bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape(tokens=tokens, hidden=hidden, vocab=vocab, candidates=candidates)
    if traffic_only:
        small = Shape(tokens=16, hidden=8, vocab=max(64, candidates), candidates=candidates)
        for name, found_in in traffic(small, entropy=entropy).items():
            listed = ", ".join(f"{what} of {size:,.0f} bytes" for what, size in found_in) or "none"
            Console().print(f"{name}: {listed} (K={candidates}, per token and rank)", highlight=False, soft_wrap=True)
        return
    variants: dict[str, Callable[[LossInputs], None]] = {"fused": fused, "plain": plain, "products": products}
    if keep_gb:
        variants["kept"] = partial(fused, cache_bytes=int(keep_gb * 2**30))
    if device.type == "cuda":
        variants["no kernels"] = without_kernels
    if compile_plain:
        variants["compiled"] = compiled()
    if (other := liger()) is not None:
        variants["liger"] = other
    found = measure(variants, make_inputs(shape, dtype=_DTYPES[dtype], device=device, entropy=entropy), repeats=repeats)
    Console().print(_table(found, shape, dtype, device))
    if json_path is not None:
        rows = [{"name": m.name, "seconds": m.seconds, "extra_bytes": m.extra_bytes} for m in found]
        sizes = {name: getattr(shape, name) for name in Shape.__slots__}
        settings = sizes | {
            "dtype": dtype,
            "device": str(device),
            "entropy": entropy,
            "threads": torch.get_num_threads(),
            "kernels": kernels.serve(device, _DTYPES[dtype]),
            "torch": torch.__version__,
        }
        json_path.write_text(json.dumps({"settings": settings, "results": rows}, indent=2))


def _table(found: list[Measurement], shape: Shape, dtype: str, device: torch.device) -> Table:
    by_name = {m.name: m for m in found}
    table = Table(
        title=f"T={shape.tokens} D={shape.hidden} V={shape.vocab} K={shape.candidates} {dtype} on {device}, "
        f"{torch.get_num_threads()} thread(s)",
        title_justify="left",
    )
    for column in ("", "ms", "x plain", "x products", "extra MiB", "x plain's"):
        table.add_column(column, justify="left" if not column else "right")
    plain_, floor = by_name["plain"], by_name["products"]
    for m in found:
        table.add_row(
            m.name,
            f"{m.seconds * 1e3:.1f}",
            f"{m.seconds / plain_.seconds:.2f}",
            f"{m.seconds / floor.seconds:.2f}",
            f"{m.extra_bytes / 2**20:.1f}",
            f"{m.extra_bytes / plain_.extra_bytes:.3f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
