"""A task small enough to train in a second, and a way of running the program's commands as a user does, quickly.

``make_task`` writes two tiny random Qwen3 directories of different sizes (the demo's tokenizer), prompts with answers
and teacher responses, held-out problems, and a configuration.

``Commands`` starts one Python process that imports the program once, and forks it for every command: the import costs
seconds, a fork milliseconds. A command then runs as ``python -m megatron_tropd ...`` would (own processes, own output
file, real exit status), on one rank or on several that meet as under torchrun.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]

# sizes that tensor parallelism over 2 ranks divides, and nothing else by accident
STUDENT = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
}
TEACHER = {
    "hidden_size": 44,
    "intermediate_size": 62,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 14,
}
POSITIONS = 96

# what a command imports, by itself or when it is first used
PRELOADED = (
    "megatron_tropd.cli",
    "megatron_tropd.commands.check",
    "megatron_tropd.commands.evaluate",
    "megatron_tropd.train.session",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "megatron.core.dist_checkpointing.strategies.torch",
    "pandas",  # pyarrow's wish
    "pyarrow.compute",
    "rich.progress",
    "torch._dynamo",  # every optimizer's step
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.tokenization_utils_tokenizers",
)


# --------------------------------------------------------------------------- the task


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a user brings: two models, prompts, problems and a configuration."""

    directory: Path

    @property
    def student(self) -> Path:
        return self.directory / "student"

    @property
    def teacher(self) -> Path:
        return self.directory / "teacher"

    @property
    def prompts(self) -> Path:
        return self.directory / "train.jsonl"

    @property
    def config(self) -> Path:
        return self.directory / "config.yaml"


def make_task(directory: Path, *, student: Mapping[str, int] = STUDENT, teacher: Mapping[str, int] = TEACHER) -> Task:
    """Writes the task into ``directory``, with models of these sizes."""
    from megatron_tropd.data.synthetic import distinct_problems, solution, write_prompts

    task = Task(directory=directory)
    save_model(task.student, student, tied=True, seed=1)
    save_model(task.teacher, teacher, tied=False, seed=2)
    train, held_out = distinct_problems(5, False, 11), distinct_problems(6, True, 5)
    rng = random.Random(0)
    write_prompts(task.prompts, train, responses=[solution(problem, rng) for problem in train])
    write_prompts(directory / "heldout.jsonl", held_out)
    task.config.write_text(_config(task))
    return task


def split_prompts(task: Task, *, first: int) -> None:
    """Its prompts in two files beside it, for runs of two sources: ``first.jsonl`` with so many, ``second.jsonl``."""
    rows = task.prompts.read_text().splitlines(keepends=True)
    (task.directory / "first.jsonl").write_text("".join(rows[:first]))
    (task.directory / "second.jsonl").write_text("".join(rows[first:]))


def save_model(directory: Path, sizes: Mapping[str, int], *, tied: bool, seed: int, **changes: Any) -> Path:
    """A random model in a Hugging Face directory, with the demo's tokenizer."""
    import torch
    from safetensors.torch import save_file

    save_tokenizer(directory)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "vocab_size": len(json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]),
        **sizes,
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    # spread wide enough that no two logits are close to a tie
    tensors = {
        name: 1.0 + 0.2 * torch.randn(shape, generator=generator)
        if len(shape) == 1
        else 0.25 * torch.randn(shape, generator=generator)
        for name, shape in _shapes(config).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def save_nudged(directory: Path, model: Path, *, seed: int) -> Path:
    """The model with every weight a step of its format away, up or down: what rounding alone may make of a run."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, directory)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        # whole-number draws are the same on every machine
        name: x * (1 + torch.finfo(x.dtype).eps * (2 * torch.randint(2, x.shape, generator=generator) - 1))
        for name, x in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def save_tokenizer(directory: Path) -> None:
    """The demo's own tokenizer."""
    demo = str(ROOT / "examples" / "demo")
    sys.path.insert(0, demo)
    try:
        importlib.import_module("make_data").save_tokenizer(directory)
    finally:
        sys.path.remove(demo)


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        parts = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _config(task: Task) -> str:
    # eps: Adam's first steps are otherwise as large for a rounding error as for a gradient; html: its charts take
    # longer than the training, and those who read the page ask for it
    return f"""\
run_dir: {task.directory}/run
seed: 7
dtype: fp32
student:
  model: {task.student}
teacher:
  model: {task.teacher}
data:
  prompts: {task.prompts}
  max_prompt_tokens: 64
rollout:
  samples_per_prompt: 2
  guided_per_prompt: 1
  max_new_tokens: 11
  batch_size: 4
method:
  name: tropd
  k: 7
  beta: 0.3
train:
  steps: 6
  prompts_per_step: 3
  pack_tokens: 160
optimizer:
  lr: 2.0e-3
  schedule: linear
  warmup_steps: 1
  eps: 1.0e-5
checkpoint:
  every: 2
evaluate:
  prompts: {task.directory}/heldout.jsonl
  suites:
    - {{name: greedy}}
    - {{name: sampled, samples: 2, temperature: 0.6, top_p: 0.95}}
report:
  samples: 2
  html: false
"""


# --------------------------------------------------------------------------- reading what a run left


def steady_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what depends on the clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time_") and k != "tokens_per_second"} for row in rows]


def assert_metrics_agree(found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> None:
    """Names, steps, and values to 1e-5: what another layout may change of a run is rounding."""
    import pytest

    # means of terms of either sign: what is left in a step where they cancel has the rounding of what cancelled
    size = {name: max(abs(row[name]) for row in expected) for name in ("loss", "reverse_kl") if name in expected[0]}
    # a mean of |log-prob gaps|, each of which is rounding itself, says nothing relative
    rounding = {"logprob_gap_mean": 1e-5, "logprob_gap_max": 1e-4}
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            if name == "rows_fraction":  # what other packs, on other ranks, share
                continue
            tolerance = max(rounding.get(name.split("/")[0], 1e-6), 1e-5 * size.get(name, 0.0))
            assert a[name] == pytest.approx(value, rel=1e-5, abs=tolerance), f"step {b['step']}: {name}"


def weights_of(directory: Path) -> dict[str, Any]:
    """Every tensor of a Hugging Face directory."""
    from safetensors.torch import load_file

    return dict(load_file(directory / "model.safetensors"))


def assert_weights_agree(found: Path, expected: Path) -> None:
    """Two exported models, tensor by tensor in norm: Adam makes much of a rounding error in an element or two."""
    a, b = weights_of(found), weights_of(expected)
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        error = float((a[name] - tensor).norm() / tensor.norm())
        assert error < 1e-4, f"{name}: {error:.1e}"


# --------------------------------------------------------------------------- running commands


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended: exit status (minus the signal that killed it) and output of every rank."""

    statuses: tuple[int, ...]
    outputs: tuple[str, ...]

    @property
    def status(self) -> int:
        return self.statuses[0]

    @property
    def output(self) -> str:
        """Of the first rank."""
        return self.outputs[0]

    def expect_success(self) -> Outcome:
        assert not any(self.statuses), f"exit statuses {self.statuses}\n" + "\n---\n".join(self.outputs)
        return self


@dataclass(kw_only=True)
class Job:
    """A command under way."""

    commands: Commands
    pids: tuple[int, ...]
    files: tuple[Path, ...]
    started: float = field(default_factory=time.monotonic)

    def kill(self) -> Outcome:
        """SIGKILL to every rank and what they have started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pids[0], signal.SIGKILL)
        return self.wait()

    def signal(self, pid: int, number: signal.Signals) -> None:
        """To one rank, which may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def wait(self, timeout_s: float = 400) -> Outcome:
        """Waits for every rank; what still runs when the time is over is killed, which is an error."""
        statuses = self.commands.ask(what="wait", pids=self.pids, timeout_s=timeout_s)
        outputs = tuple(file.read_text(errors="replace") for file in self.files)
        assert statuses is not None, f"still running after {timeout_s} s:\n" + "\n---\n".join(outputs)
        return Outcome(statuses=tuple(statuses), outputs=outputs)

    def running(self) -> bool:
        """Whether the first rank is still there (a rank that ended is not, though nobody has waited for it)."""
        state = Path(f"/proc/{self.pids[0]}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z"

    def until(self, reached: Callable[[], bool], timeout_s: float = 400) -> None:
        """Returns as soon as ``reached()``; a job that ends or takes longer first is an error."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            if not self.running() or time.monotonic() > deadline:
                outcome = self.kill()
                raise AssertionError(f"the moment never came: {outcome.statuses}\n{outcome.output}")
            time.sleep(0.0005)


class Commands:
    """The process that forks for every command. Use :func:`commands`, which keeps one for all tests."""

    def __init__(self, scratch: Path, preload: Sequence[str] = ()) -> None:
        """``preload``: more modules for the server to have imported before it forks."""
        self._scratch = scratch
        self._count = 0
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
        environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        self._server = subprocess.Popen(
            [sys.executable, __file__, *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=scratch,
        )

    def ask(self, **request: Any) -> Any:
        """One request to the server, and its answer."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, f"the command server has ended with status {self._server.poll()}"
        return json.loads(answer)

    def start(
        self, *argv: object, ranks: int = 0, function: str = "", cwd: Path | None = None, **environment: str
    ) -> Job:
        """Starts ``tropd ARGV``, alone (``ranks=0``) or as torchrun would; ``function``: called in its place."""
        self._count += 1
        files = tuple(self._scratch / f"command-{self._count}-{rank}.txt" for rank in range(max(ranks, 1)))
        pids = self.ask(
            what="start",
            argv=[str(argument) for argument in argv],
            function=function,
            files=[str(file) for file in files],
            world=ranks,
            port=_free_port(),
            cwd=str(cwd or self._scratch),
            environment=environment,
        )
        return Job(commands=self, pids=tuple(pids), files=files)

    def run(self, *argv: object, ranks: int = 0, timeout_s: float = 400, **options: Any) -> Outcome:
        """Runs ``tropd ARGV`` to its end."""
        return self.start(*argv, ranks=ranks, **options).wait(timeout_s)

    def call(self, function: Callable[..., None], *arguments: object, ranks: int = 0, timeout_s: float = 400) -> None:
        """Runs a module-level function with JSON-able arguments on every rank; what fails there fails here."""
        self.start_call(function, *arguments, ranks=ranks).wait(timeout_s).expect_success()

    def start_call(self, function: Callable[..., None], *arguments: object, ranks: int = 0) -> Job:
        """Starts it only, so that several run side by side."""
        name = f"{function.__module__}:{function.__qualname__}"
        return self.start(json.dumps(arguments, default=str), ranks=ranks, function=name)

    def close(self) -> None:
        """Ends the server, which ends what it has started."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=400)


@functools.cache
def commands(*preload: str) -> Commands:
    """The one server of this process (for what is to be preloaded), ended at exit."""
    import tempfile

    scratch = Path(tempfile.mkdtemp(prefix="tropd-commands-"))
    server = Commands(scratch, preload)
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    atexit.register(server.close)
    return server


def train_each(config: str, directory: str, cases: dict[str, list[str]]) -> None:
    """On the ranks: one training per case in the same processes."""
    from megatron_tropd.config.loading import load_config
    from megatron_tropd.train.session import run_training

    for name, changes in cases.items():
        print(f"{name}:", flush=True)
        run_training(load_config(config, [*changes, f"run_dir={directory}/{name}"]))


def torchrun(*argv: object, ranks: int, output: Path) -> subprocess.Popen[bytes]:
    """Starts the program exactly as the README says, in a session of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "megatron_tropd", *map(str, argv)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    with output.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --------------------------------------------------------------------------- the server


def _serve() -> None:
    """Answers requests on standard input until it closes."""
    for module in (*PRELOADED, *sys.argv[1:]):
        importlib.import_module(module)
    gc.freeze()  # what all commands share need not be looked through, and so copied, by each
    alive: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("what") == "start":
            answer: Any = _start(**request)
            alive |= set(answer)
        else:
            answer = _wait(**request)
            alive -= set(request["pids"])
        print(json.dumps(answer), flush=True)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _start(
    *, argv: list[str], function: str, files: list[str], world: int, port: int, cwd: str, environment: dict[str, str]
) -> list[int]:
    pids: list[int] = []
    for rank, file in enumerate(files):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = environment | ({name: str(value) for name, value in ranks.items()} if world else {})
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            _become(argv, function, file, cwd, variables)
        with contextlib.suppress(PermissionError, ProcessLookupError):  # whichever of the two comes first
            os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def _become(argv: list[str], function: str, file: str, cwd: str, variables: dict[str, str]) -> NoReturn:
    """Turns this fork into ``python -m megatron_tropd ARGV``, up to the interpreter's own end."""
    status = 0
    try:
        nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.environ.update(variables)
        os.chdir(cwd)
        sys.argv = ["tropd", *argv]
        faulthandler.dump_traceback_later(380)  # shorter than a test's patience: what hangs says where
        if function:
            _call(function, argv)
        else:
            runpy.run_module("megatron_tropd", run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        assert ending.code is None or isinstance(ending.code, int), ending.code
        status = ending.code or 0
    except Exception:
        traceback.print_exc()
        status = 1
    # what the interpreter does at its end, but for taking every imported module apart, which takes half a second
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _call(function: str, argv: list[str]) -> None:
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)(*json.loads(argv[0]))


def _wait(*, pids: list[int], timeout_s: float) -> list[int] | None:
    """Exit statuses; None when the time was over. As under torchrun, ranks that outlive a failed one are ended."""
    statuses: dict[int, int] = {}
    deadline, late, failed_at = time.monotonic() + timeout_s, False, float("inf")
    while len(statuses) < len(pids):
        running = [pid for pid in pids if pid not in statuses]
        for pid in running:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if any(statuses.values()):
            failed_at = min(failed_at, now)
        late = late or now > deadline
        if late or now > failed_at + 1.0:
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):  # what they have left running
        os.killpg(pids[0], signal.SIGKILL)
    return None if late else [statuses[pid] for pid in pids]


if __name__ == "__main__":
    _serve()
