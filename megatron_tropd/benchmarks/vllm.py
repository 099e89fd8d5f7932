"""vLLM and the trainer: rollouts, teacher scores and new weights per second, against this machine's memory copy.

    python -m megatron_tropd.benchmarks.vllm --megabytes 300 --json figures.json

Makes a checkpoint of random weights, starts a server of it and an engine in this process, and measures both. Every set
of weights that is published differs from the one before, and is verified. Copying memory (one thread, tensors that no
cache holds) is the rate that no way of publishing on one host can beat. Needs vLLM.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from megatron_tropd.config.sections import Layout, StudentServersConfig
from megatron_tropd.convert.hf import read_architecture
from megatron_tropd.convert.writer import HFWriter
from megatron_tropd.engine.model import Model
from megatron_tropd.errors import ServingError
from megatron_tropd.models.name_table import hf_shapes
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from megatron_tropd.rollout.engines.vllm import VLLMSampler
from megatron_tropd.rollout.engines.vllm_server import ServerSampler
from megatron_tropd.rollout.protocol import Sampler
from megatron_tropd.setup.build import load_model
from megatron_tropd.types import Int64Array, RolloutRequest, SamplingParams
from megatron_tropd.vllm_bridge.client import Server
from megatron_tropd.vllm_bridge.jobs import Job
from megatron_tropd.vllm_bridge.launch import server_command
from megatron_tropd.vllm_bridge.local_engine import check_installed, prepare
from megatron_tropd.vllm_bridge.pool import Pool
from megatron_tropd.weight_sync.interface import ProbeableSampler
from megatron_tropd.weight_sync.publishers import BroadcastPublisher, FilePublisher, WeightStream
from megatron_tropd.weight_sync.verify import verify_publish

_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": 32000,
}
_OPTIONS = {"kv_cache_memory_bytes": 512 << 20, "max_num_seqs": 64, "enforce_eager": True}
_TOP_K = 64
_STARTS_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measurement: the median of its repetitions."""

    what: str
    seconds: float
    amount: float  # tokens or bytes
    unit: str

    @property
    def rate(self) -> float:
        return self.amount / self.seconds


def main(
    megabytes: Annotated[int, typer.Option(help="Size of the model, fp32.", min=180)] = 300,
    repeats: Annotated[int, typer.Option(help="Times that everything is measured.", min=1)] = 3,
    sequences: Annotated[int, typer.Option(help="Sequences sampled, and scored.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each.", min=8, max=512)] = 64,
    bucket_mib: Annotated[int, typer.Option(help="Weights sent at a time.", min=1)] = 64,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure and print a table."""
    check_installed()
    with tempfile.TemporaryDirectory(prefix="tropd-vllm-") as folder:
        directory = make_checkpoint(Path(folder) / "model", megabytes=megabytes)
        figures = [copy_rate(megabytes << 20, repeats)]
        measure = Measure(directory, repeats=repeats, sequences=sequences, new_tokens=new_tokens, bucket_mib=bucket_mib)
        with serving(directory, Path(folder) / "server.log") as (url, key):
            figures += measure.servers(url, key, Path(folder))
        figures += measure.in_process()
    Console().print(table(figures))
    if json_path is not None:
        rows = [asdict(figure) | {"rate": figure.rate} for figure in figures]
        json_path.write_text(json.dumps({"figures": rows, "threads": torch.get_num_threads()}, indent=1) + "\n")


def make_checkpoint(directory: Path, *, megabytes: int) -> Path:
    """Write random weights in fp32, of about that size."""
    scratch = directory.with_name(directory.name + ".config")
    scratch.mkdir(parents=True)

    def shapes(layers: int) -> dict[str, tuple[int, ...]]:
        (scratch / "config.json").write_text(json.dumps(_CONFIG | {"num_hidden_layers": layers}))
        return dict(hf_shapes(read_architecture(scratch)))

    def size(layers: int) -> float:
        return sum(4e-6 * float(np.prod(shape)) for shape in shapes(layers).values())

    layers = max(1, round((megabytes - size(1)) / (size(2) - size(1))) + 1)
    wanted = shapes(layers)
    writer = HFWriter(directory, companions_from=scratch, tensors=wanted, dtype=torch.float32)
    torch.manual_seed(0)
    writer.write(
        (name, torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape)) for name, shape in wanted.items()
    )
    return writer.finish()


def copy_rate(nbytes: int, repeats: int) -> Figure:
    """Copy memory to memory, of as many bytes as the model has."""
    source = torch.ones(nbytes, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return Figure(
        what="memory copy", seconds=_median(lambda: target.copy_(source), repeats), amount=nbytes, unit="bytes"
    )


@contextmanager
def serving(directory: Path, log: Path) -> Iterator[tuple[str, str]]:
    """Start a server in a session of its own; yield its address and key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    options = {**_OPTIONS, "dtype": "float32"}
    limits = {"max_tokens": 1000, "top_k": _TOP_K}
    command = server_command(directory, options, host="127.0.0.1", port=port, takes_weights=True, **limits)
    key = secrets.token_hex(16)
    prepare(in_process=False)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "TROPD_SERVER_KEY": key},
        )
    try:
        yield f"http://127.0.0.1:{port}", key
    except ServingError as error:
        raise SystemExit(f"{error}\n{log.read_text(errors='replace')[-3000:]}") from error
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Measure:
    """Measurements of an engine, wherever it is."""

    def __init__(self, directory: Path, *, repeats: int, sequences: int, new_tokens: int, bucket_mib: int) -> None:
        self._device = initialize_distributed()
        self._directory = directory
        self._architecture = read_architecture(directory)
        self._groups = GroupBuilder().build(Layout())
        self._model: Model = load_model(directory, self._groups, dtype=torch.float32, device=self._device)
        self._bytes = sum(tensor.nbytes for _, tensor in WeightStream(self._model))
        self._repeats, self._sequences, self._new_tokens = repeats, sequences, new_tokens
        self._bucket_bytes = bucket_mib << 20
        self._version = 0

    def servers(self, url: str, key: str, folder: Path) -> list[Figure]:
        """Measure one server: rollouts, scores, and both ways of publishing."""
        section = StudentServersConfig(urls=(url,), patience_s=_STARTS_S)
        pool, transfer_s = Pool(section, key=key), section.transfer_s
        pool.infos()
        memory = Path("/dev/shm")
        place = Path(tempfile.mkdtemp(prefix="tropd-", dir=memory)) if memory.is_dir() else folder / "weights"
        files = FilePublisher(pool, place / "weights", bucket_bytes=self._bucket_bytes, transfer_s=transfer_s)
        broadcast = BroadcastPublisher(
            pool,
            address="127.0.0.1",
            bucket_bytes=self._bucket_bytes,
            transfer_s=transfer_s,
            device=self._device,
        )
        found = []
        for way, publisher in (("files in memory", files), ("broadcast", broadcast)):
            sampler = ServerSampler(pool, publisher, self._architecture, max_tokens=1000, timeout_s=_STARTS_S)
            found.append(self._publish(f"publish, {way}", sampler))
        found.append(self._rollouts("rollouts, server", sampler))
        found.append(self._scores("teacher scores, server", lambda texts: _graded(pool, texts)))
        files.close()
        sampler.close()
        place.rmdir()
        return found

    def in_process(self) -> list[Figure]:
        """Measure the same of an engine in this process."""
        sampler = VLLMSampler(
            self._directory,
            self._architecture,
            self._groups,
            dtype=torch.float32,
            device=self._device,
            max_tokens=1000,
            options={**_OPTIONS, "max_logprobs": _TOP_K},
        )
        engine = sampler._engine  # a second one would take its share of the cores
        found = [
            self._publish("publish, in process", sampler),
            self._rollouts("rollouts, in process", sampler),
            self._scores("teacher scores, in process", lambda texts: engine.score(texts, top_k=_TOP_K)),
        ]
        sampler.close()
        return found

    def _publish(self, what: str, sampler: Sampler) -> Figure:
        def once() -> float:
            self._version += 1
            with torch.no_grad():
                for chunk in self._model.chunks:
                    for weight in chunk.parameters():
                        weight.mul_(1.001)
            started = time.perf_counter()
            sampler.update_weights(WeightStream(self._model), version=self._version)
            seconds = time.perf_counter() - started
            assert isinstance(sampler, ProbeableSampler)
            verify_publish(self._model, sampler, np.arange(1, 100), 1e-3)
            return seconds

        once()  # groups meet, memory is found
        seconds = statistics.median(once() for _ in range(self._repeats))
        return Figure(what=what, seconds=seconds, amount=self._bytes, unit="bytes")

    def _rollouts(self, what: str, sampler: Sampler) -> Figure:
        empty = np.empty(0, dtype=np.int64)
        requests = [
            RolloutRequest(
                sequence_id=number,
                prompt_index=number,
                prompt_ids=text[:32],
                prefix_ids=empty,
                max_new_tokens=self._new_tokens,
            )
            for number, text in enumerate(self._texts())
        ]
        params = SamplingParams(max_new_tokens=self._new_tokens)
        steps = iter(range(1 + self._repeats))
        seconds = _median(lambda: sampler.generate(requests, params, seed=0, step=next(steps)), self._repeats)
        return Figure(what=what, seconds=seconds, amount=self._sequences * self._new_tokens, unit="tokens")

    def _scores(self, what: str, score: Callable[[Sequence[Int64Array]], object]) -> Figure:
        texts = self._texts()
        amount = sum(len(text) for text in texts)
        return Figure(what=what, seconds=_median(lambda: score(texts), self._repeats), amount=amount, unit="tokens")

    def _texts(self) -> list[Int64Array]:
        """Draw random texts: nothing of one is in the cache for another. (Scores never come from the cache.)"""
        draw = np.random.default_rng(self._version)
        return [draw.integers(1, 32000, 32 + self._new_tokens) for _ in range(self._sequences)]


def _graded(pool: Pool, texts: Sequence[Int64Array]) -> None:
    async def score(server: Server, text: Int64Array) -> object:
        return await server.score(text, top_k=_TOP_K, timeout_s=_STARTS_S)

    def job(text: Int64Array) -> Job:
        return Job(call=lambda server: score(server, text), cost=len(text))

    batch = pool.submit([job(text) for text in texts])
    while not batch.wait(1.0):
        pass


def _median(work: Callable[[], object], repeats: int) -> float:
    """Return the median seconds, after one time that does not count."""
    found = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def table(figures: Sequence[Figure]) -> Table:
    """Tabulate the rates; those of bytes also as a share of the first figure's, the memory copy."""
    copy = figures[0].rate
    shown = Table("", "s", "amount", "per second", "of memory copy")
    for figure in figures:
        scale, unit = (1e6, "MB") if figure.unit == "bytes" else (1.0, "tokens")
        share = f"{figure.rate / copy:.1%}" if figure.unit == "bytes" else "-"
        amount, rate = f"{figure.amount / scale:,.0f} {unit}", f"{figure.rate / scale:,.0f} {unit}"
        shown.add_row(figure.what, f"{figure.seconds:.3f}", amount, rate, share)
    return shown


if __name__ == "__main__":
    typer.run(main)
