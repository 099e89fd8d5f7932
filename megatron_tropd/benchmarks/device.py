"""Figures of a device that no run shows by itself: products, kernels, copies and layers, each beside what bounds it.

``python -m megatron_tropd.benchmarks.device products kernels copies layers --json FILE``

On a GPU sizes are those of the budgets (16,384 tokens, 151,936 ids); without one they are small, and the figures say
only that the probes run. Times are medians, between CUDA events on a GPU. ``tools/gpu_first_day.py`` runs it.
"""

from __future__ import annotations

import collections
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from megatron_tropd.config.sections import Layout, OptimizerConfig
from megatron_tropd.data.packing import pack
from megatron_tropd.engine.forward import run_packs
from megatron_tropd.engine.model import Model, build_model
from megatron_tropd.engine.offload import wait_for_device
from megatron_tropd.engine.optimizer import optimize
from megatron_tropd.engine.score import score_packs
from megatron_tropd.losses.vocab_parallel import linear_topk
from megatron_tropd.losses.vocab_parallel.backends.triton import kernels
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from megatron_tropd.rollout.engines.megatron import MegatronSampler
from megatron_tropd.types import Architecture, Pack, Rollout, RolloutRequest, SamplingParams, single_turn

Figures = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSizes:
    """Sizes of the probes on one kind of device."""

    tokens: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    slice: int  # columns of the vocabulary in a tile
    top_k: int
    layers: int
    batch: int  # sequences decoded together
    new_tokens: int
    copy_mib: int


SIZES = MappingProxyType(
    {
        "cuda": ProbeSizes(
            tokens=16_384,
            hidden=4096,
            ffn=12_288,
            heads=32,
            kv_heads=8,
            vocab=151_936,
            slice=8192,
            top_k=64,
            layers=4,
            batch=64,
            new_tokens=65,
            copy_mib=4096,
        ),
        "cpu": ProbeSizes(
            tokens=96,
            hidden=32,
            ffn=48,
            heads=4,
            kv_heads=2,
            vocab=128,
            slice=64,
            top_k=4,
            layers=2,
            batch=2,
            new_tokens=3,
            copy_mib=1,
        ),
    }
)


def median_seconds(run: Callable[[], Any], device: torch.device, *, repeats: int = 5) -> float:
    """Return the median time of a call, after one that warms up."""
    run()
    found = []
    for _ in range(repeats if device.type == "cuda" else 1):
        wait_for_device(device)
        started = time.perf_counter()
        run()
        wait_for_device(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def products(device: torch.device, sizes: ProbeSizes) -> Figures:
    """Measure the TFLOP/s of the loss's products of one tile, and of the one that adds up in fp32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden_TD = torch.randn(sizes.tokens, sizes.hidden, device=device, dtype=dtype)
    weight_WD = torch.randn(sizes.slice, sizes.hidden, device=device, dtype=dtype)
    grad_TW = torch.randn(sizes.tokens, sizes.slice, device=device, dtype=dtype)
    sum_TD = torch.zeros(sizes.tokens, sizes.hidden, device=device)
    runs: dict[str, Callable[[], Any]] = {
        "logits": lambda: hidden_TD @ weight_WD.T,
        "hidden gradient": lambda: grad_TW @ weight_WD,
        "hidden gradient, added up in fp32": lambda: _add_product(sum_TD, grad_TW, weight_WD),
        "weight gradient": lambda: grad_TW.T @ hidden_TD,
    }
    flops = 2 * sizes.tokens * sizes.hidden * sizes.slice
    return {f"{name}, TFLOP/s": flops / median_seconds(run, device) / 1e12 for name, run in runs.items()}


def _add_product(sum_TD: Tensor, grad_TW: Tensor, weight_WD: Tensor) -> None:
    if sum_TD.is_cuda:
        torch.addmm(sum_TD, grad_TW, weight_WD, out_dtype=torch.float32, out=sum_TD)
    else:
        sum_TD.addmm_(grad_TW, weight_WD)


def top_k(device: torch.device, sizes: ProbeSizes) -> Figures:
    """Measure the search for candidates over the vocabulary beside its product alone; random rows, and rows whose mean
    falls with the id as real ones do.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found: Figures = {"kernels": float(kernels.serve(device, dtype))}
    weight_VD = torch.randn(sizes.vocab, sizes.hidden, device=device, dtype=dtype) / sizes.hidden**0.5
    hidden_TD = torch.randn(sizes.tokens, sizes.hidden, device=device, dtype=dtype)
    product = median_seconds(lambda: _product_in_slices(hidden_TD, weight_VD, sizes.slice), device, repeats=3)
    sloped_TD = hidden_TD.clone()
    sloped_TD[:, 0] = 1.0
    slope_V = -2.0 * torch.log1p(torch.arange(sizes.vocab, device=device) / 50.0)
    for name, hidden, first in (("random", hidden_TD, weight_VD[:, 0].clone()), ("sloped", sloped_TD, slope_V)):
        weight_VD[:, 0] = first
        search = partial(linear_topk, hidden, weight_VD, sizes.top_k, vocab_size=sizes.vocab)
        seconds = median_seconds(search, device, repeats=3)
        found[f"{name} rows, ms"], found[f"{name} rows, x product"] = seconds * 1e3, seconds / product
    return found


def _product_in_slices(hidden_TD: Tensor, weight_VD: Tensor, width: int) -> None:
    for start in range(0, len(weight_VD), width):
        hidden_TD @ weight_VD[start : start + width].T


def copies(device: torch.device, sizes: ProbeSizes) -> Figures:
    """Measure GB/s: on the device, to pinned host memory and back, and to a file in memory as publishing writes it."""
    size = sizes.copy_mib * 2**20
    x, y = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        runs: dict[str, Callable[[], Any]] = {
            "device to device": lambda: y.copy_(x),
            "device to host": lambda: host.copy_(x),
            "host to device": lambda: x.copy_(host),
            "device to a file in memory": lambda: save_file({"x": x.cpu()}, Path(folder) / "x.safetensors"),
        }
        return {f"{name}, GB/s": size / median_seconds(run, device, repeats=3) / 1e9 for name, run in runs.items()}


def _architecture(sizes: ProbeSizes) -> Architecture:
    return Architecture(
        family="Qwen3ForCausalLM",
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        ffn_size=sizes.ffn,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.hidden // sizes.heads,
        vocab_size=sizes.vocab,
        max_positions=40_960,
        norm_eps=1e-6,
        rope_theta=1e6,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
    )


def _pack_of(sizes: ProbeSizes) -> Pack:
    """Fill a pack with sequences of a long-tailed length, as answers have."""
    rng, lengths = np.random.default_rng(0), list[int]()
    while (left := sizes.tokens - sum(lengths)) >= 4:
        lengths.append(int(min(max(rng.lognormal(6.5, 0.9), 4), left)))
    nothing = np.empty(0, np.float32)
    rollouts = [
        Rollout(
            sequence_id=number,
            prompt_index=number,
            token_ids=rng.integers(0, sizes.vocab, length),
            region_L=single_turn(prompt=1, prefix=length - 1),
            sampling_logprob=nothing,
            model_logprob=nothing,
            finished=True,
        )
        for number, length in enumerate(lengths)
    ]
    (found,) = pack(rollouts, max_tokens=sizes.tokens, multiple_of=2)[0]
    return found


def layers(device: torch.device, sizes: ProbeSizes) -> Figures:
    """Measure a few layers of an 8B's shape: forward and backward of a pack, its waits for the host, decoding."""
    initialize_distributed()
    groups = GroupBuilder().build(Layout())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(_architecture(sizes), groups, dtype=dtype, device=device)
    own = _pack_of(sizes)
    run = _training_pass(model, own)
    seconds = median_seconds(run, device, repeats=3)
    matrices = sum(p.numel() for name, p in model.chunks[0].named_parameters() if name.startswith("decoder."))
    found = {
        "forward and backward, ms": seconds * 1e3,
        "of the layers' matrices alone, TFLOP/s": 6 * matrices * len(own.token_T) / seconds / 1e12,
    }
    with _host_waits(device) as waits:
        run()
    found["waits for the host"] = float(sum(waits.values()))
    found |= {f"waits at {place}": float(count) for place, count in waits.most_common(8)}
    scoring = median_seconds(lambda: score_packs(model, [own], vocab_size=sizes.vocab), device, repeats=3)
    return found | {"scoring, ms": scoring * 1e3} | _decoding(model, sizes)


def _training_pass(model: Model, own: Pack) -> Callable[[], None]:
    optimization = optimize(model, OptimizerConfig(lr=1e-3), steps=1)
    model.config.finalize_model_grads_func = lambda *args, **kwargs: None

    def run() -> None:
        for module in optimization.wrapped:
            module.zero_grad_buffer()
        with optimization.training():
            run_packs(
                model,
                [own],
                lambda number, hidden_ND, weight_vD: (hidden_ND.float().sum(), None),
                wrapped=optimization.wrapped,
                backward=True,
            )

    return run


@contextmanager
def _host_waits(device: torch.device) -> Iterator[collections.Counter[str]]:
    """Count, by place in the code, where the host waits for the device within the block."""
    found: collections.Counter[str] = collections.Counter()
    if device.type != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(f"{one.filename.split('site-packages/')[-1]}:{one.lineno}" for one in seen)


def _decoding(model: Model, sizes: ProbeSizes) -> Figures:
    sampler = MegatronSampler(
        model.architecture, model.groups, dtype=model.dtype, device=model.device, batch_size=sizes.batch
    )
    sampler.model.chunks[0].load_state_dict(model.chunks[0].state_dict(), strict=False)
    prompt, nothing = np.arange(5), np.empty(0, np.int64)

    def seconds(new_tokens: int) -> float:
        requests = [
            RolloutRequest(
                sequence_id=n, prompt_index=n, prompt_ids=prompt, prefix_ids=nothing, max_new_tokens=new_tokens
            )
            for n in range(sizes.batch)
        ]
        params = SamplingParams(max_new_tokens=new_tokens)
        return median_seconds(lambda: sampler.generate(requests, params, seed=0, step=0), model.device, repeats=2)

    token = (seconds(sizes.new_tokens) - seconds(1)) / (sizes.new_tokens - 1)
    return {"decoding, ms per token of a batch": token * 1e3}


PROBES: Mapping[str, Callable[[torch.device, ProbeSizes], Figures]] = MappingProxyType(
    {"products": products, "top_k": top_k, "copies": copies, "layers": layers}
)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Probes; default: all.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Print the figures of the probes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {}
    for name in names or PROBES:
        if name not in PROBES:
            raise typer.BadParameter(f"{name} is none of {', '.join(PROBES)}")
        found[name] = PROBES[name](device, SIZES[device.type])
        for what, value in found[name].items():
            Console().print(f"{name}: {what} {value:,.3g}", highlight=False, soft_wrap=True)
    if json_path is not None:
        json_path.write_text(
            json.dumps({"device": str(device), "torch": torch.__version__, "figures": found}, indent=2)
        )


if __name__ == "__main__":
    typer.run(main)
