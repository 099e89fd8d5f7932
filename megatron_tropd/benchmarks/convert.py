"""Import and export of a checkpoint of random weights: time, memory and bytes read, against ``cp`` of the same files.

    python -m megatron_tropd.benchmarks.convert            # 1 GB, at TP=2 and PP=2; prints a Markdown table

Needs Linux: peaks are those the kernel counts per process (``VmHWM``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config.sections import Layout
from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.convert.writer import HFWriter
from megatron_tropd.engine.weights import hf_rows
from megatron_tropd.models.name_table import hf_shapes
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from megatron_tropd.setup.build import load_model

_MB = 1e6
# 0.97 GB in bf16
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 8,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
_LAYOUTS: dict[str, dict[str, Any]] = {"TP=2": {"tensor": 2}, "PP=2": {"pipeline": 2}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Cost of one rank, in megabytes and seconds."""

    shard_mb: float  # parameters it holds
    import_mb: float  # peak over what the process held before the model was built
    read_mb: float  # bytes it requested of the kernel
    import_s: float
    export_mb: float  # peak over what it held with the model loaded
    export_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=_CONFIG["num_hidden_layers"], help="layers of 0.09 GB each")
    parser.add_argument("--vocab", type=int, default=_CONFIG["vocab_size"], help="ids: two matrices of 4 kB for each")
    parser.add_argument("--worker", nargs=3, metavar=("LAYOUT", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments.worker[0], Path(arguments.worker[1]), Path(arguments.worker[2]))
        return
    with tempfile.TemporaryDirectory(prefix="tropd-convert-") as folder:
        source = make_checkpoint(Path(folder) / "source", layers=arguments.layers, vocab=arguments.vocab)
        print(_table(source, {name: _launch(name, source, Path(folder)) for name in _LAYOUTS}, _copy_seconds(source)))


def make_checkpoint(directory: Path, *, layers: int, vocab: int) -> Path:
    """Make random weights in bf16, written as they are drawn."""
    scratch = directory.with_name(directory.name + ".config")
    scratch.mkdir(parents=True)
    (scratch / "config.json").write_text(json.dumps(_CONFIG | {"num_hidden_layers": layers, "vocab_size": vocab}))
    shapes = hf_shapes(read_architecture(scratch))
    writer = HFWriter(directory, companions_from=scratch, tensors=shapes, dtype=torch.bfloat16)
    torch.manual_seed(0)
    writer.write((name, torch.randn(shape, dtype=torch.bfloat16)) for name, shape in shapes.items())
    return writer.finish()


def _copy_seconds(source: Path) -> float:
    target = source.with_name("copy")
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    with (target / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())  # the export's files are on disk, too, before it ends
    return time.perf_counter() - started


def _launch(layout: str, source: Path, folder: Path) -> list[Cost]:
    """Run one layout in processes of its own and read what each rank noted."""
    out = folder / layout
    out.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", __spec__.name]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, *launcher, "--worker", layout, str(source), str(out)]
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=True)
    return [Cost(**json.loads(path.read_text())) for path in sorted(out.glob("rank-*.json"))]


def _work(layout: str, source: Path, out: Path) -> None:
    device = initialize_distributed()
    groups = GroupBuilder().build(Layout(**_LAYOUTS[layout]))
    warm = torch.zeros(1)
    dist.all_reduce(warm)
    before, read, started = _restart_peak(), _bytes_read(), time.perf_counter()
    model = load_model(source, groups, dtype=torch.bfloat16, device=device)
    import_s, read_mb, import_mb = time.perf_counter() - started, _bytes_read() - read, _peak() - before
    dist.barrier()
    before, started = _restart_peak(), time.perf_counter()
    _export(hf_rows(model), source, out / "exported", hf_shapes(model.architecture))
    dist.barrier()
    cost = Cost(
        shard_mb=sum(p.nbytes for chunk in model.chunks for p in chunk.parameters()) / _MB,
        import_mb=import_mb,
        read_mb=read_mb,
        import_s=import_s,
        export_mb=_peak() - before,
        export_s=time.perf_counter() - started,
    )
    if dist.get_rank() == 0:
        _compare(source, out / "exported")
    (out / f"rank-{dist.get_rank()}.json").write_text(json.dumps(asdict(cost)))
    dist.barrier()
    dist.destroy_process_group()


def _export(stream: Iterator[tuple[str, int, Tensor]], source: Path, target: Path, shapes: dict[str, Any]) -> None:
    writer = None
    if dist.get_rank() == 0:
        writer = HFWriter(target, companions_from=source, tensors=shapes, dtype=torch.bfloat16)
    for name, first, rows in stream:
        if writer is not None:
            writer.write_rows(name, first, rows)
    if writer is not None:
        writer.finish()


def _compare(source: Path, exported: Path) -> None:
    before, after = HFWeights(source), HFWeights(exported)
    different = [name for name in before if not before[name][:].equal(after[name][:])]
    if different or before.keys() != after.keys():
        raise SystemExit(f"the export differs from the source: {different[:3]}")


def _status(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) * 1024 / _MB for line in file if line.startswith(key + ":"))


def _peak() -> float:
    return _status("VmHWM")


def _restart_peak() -> float:
    """Forget the peak so far; return what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _bytes_read() -> float:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(float(line.split()[1]) / _MB for line in lines if line.startswith("rchar"))


def _table(source: Path, found: dict[str, list[Cost]], copy_s: float) -> str:
    size = (source / "model.safetensors").stat().st_size / _MB
    lines = [
        f"{size:,.0f} MB of weights in bf16, 2 processes; `cp` of them: {copy_s:.1f} s.",
        "",
        "| layout, rank | shard | import: peak | / shard | read | time | export: peak above the model | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layout, costs in found.items():
        for rank, cost in enumerate(costs):
            lines.append(
                f"| {layout}, {rank} | {cost.shard_mb:,.0f} MB | {cost.import_mb:,.0f} MB "
                f"| {cost.import_mb / cost.shard_mb:.2f} | {cost.read_mb:,.0f} MB | {cost.import_s:.1f} s "
                f"| {cost.export_mb:,.0f} MB | {cost.export_s:.1f} s |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
