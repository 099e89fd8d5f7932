"""The command line: ``tropd train | generate | evaluate | check | report | demo``, alone or under ``torchrun``."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_tropd.errors import ConfigError, TropdError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="On-policy distillation of large language models on Megatron-Core.",
)

# how long a rank that failed waits for the first one to have said why
_PATIENCE_S = 3.0

Config = Annotated[Path, typer.Argument(help="YAML file; relative paths are relative to the current directory.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as train.steps=10.")]
Prompts = Annotated[Path, typer.Argument(help="JSONL file with one prompt per line.")]
Dtype = Annotated[str, typer.Option(help="fp32 or bf16.")]


def main() -> None:
    """Entry point. Errors made on purpose are one message and exit status 2; anything else keeps its traceback."""
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    # Megatron's checkpoints use it; there is nothing for a user to do
    warnings.filterwarnings("ignore", message=r".*deprecating ShardedTensor")
    first = os.environ.get("RANK", "0") == "0"
    warnings.showwarning = _show_warning if first else _show_nothing
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING if first else logging.ERROR)
    try:
        app()
    except TropdError as error:
        _report(error, first)
        # other ranks may wait in a collective for this one: leave without joining them
        os._exit(2)


def _report(error: TropdError, first: bool) -> None:
    """One message for all ranks, whichever of them failed."""
    rank = ""
    if not first:
        # what goes wrong everywhere is told by the first rank, whose end also ends this one under torchrun
        time.sleep(_PATIENCE_S)
        rank = f" on rank {os.environ['RANK']}"
    Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]{rank}: ", end="")
    print(error, file=sys.stderr, flush=True)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    # our own are for who runs the program, to whom the place in the code says nothing
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    place = "" if ours else f"{filename}:{lineno}: {category.__name__}: "
    print(f"WARNING: {place}{message}", file=sys.stderr, flush=True)


def _show_nothing(*_: object, **__: object) -> None:
    """What other ranks would say is what the first one says."""


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _leave() -> None:
    """Ends the process group, so that no rank is torn down while another still talks to it."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Distil the student from the teacher."""
    from megatron_tropd.config import load_config

    settings = load_config(config, overrides or [], world_size=_world_size())
    from megatron_tropd.session import run_training

    run_training(settings)
    _leave()


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """Validate a configuration, print the plan it resolves to, and run the teacher == student self check."""
    from megatron_tropd.config import load_config

    settings = load_config(config, overrides or [])
    from megatron_tropd.plan import check_plan

    check_plan(settings)
    _leave()


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory of the model that answers.")],
    prompts: Prompts,
    out: Annotated[Path, typer.Argument(help="JSONL file to write: every row of PROMPTS plus its responses.")],
    samples: Annotated[int, typer.Option(help="Responses per prompt; more than one adds rows.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: Dtype = "bf16",
    prompt_column: str = "prompt",
    response_column: str = "response",
) -> None:
    """Write one or more responses of a model to every prompt: the teacher's, to guide a student."""
    from megatron_tropd.generate import generate_responses
    from megatron_tropd.types import SamplingParams

    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    generate_responses(
        model,
        prompts,
        out,
        params=params,
        samples=samples,
        seed=seed,
        dtype=dtype,
        columns=(prompt_column, response_column),
    )
    _leave()


@app.command()
def evaluate(config: Config, overrides: Overrides = None) -> None:
    """Grade student and teacher of a configuration on its evaluation problems, without training."""
    from megatron_tropd.config import load_config

    settings = load_config(config, overrides or [], world_size=_world_size())
    if settings.evaluate.prompts is None:
        raise ConfigError("evaluate.prompts is null: there is nothing to evaluate on. Give a JSONL file of problems.")
    from megatron_tropd.generate import evaluate_models

    evaluate_models(settings)
    _leave()


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Directory of a run.")]) -> None:
    """Write RUN/report.html from what a run has left on disk."""
    from megatron_tropd.report.html import write_report

    print(write_report(run_dir))


@app.command()
def demo(
    method: Annotated[str, typer.Option(help="Preset to distil with.")] = "tropd",
    processes: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 2,
    overrides: Overrides = None,
) -> None:
    """Train the demo's student: a few minutes on two CPU cores."""
    root = Path(__file__).resolve().parent.parent
    config = root / "examples" / "demo" / "demo.yaml"
    if not config.exists():
        raise ConfigError(f"{config} is not there: the demo needs a clone of the repository, not only the package.")
    changes = [f"method.name={method}", "checkpoint.resume=never"]
    changes += [f"{role}.parallel.tensor={processes}" for role in ("student", "teacher")]
    changes += overrides or []
    _check_early(config, changes, processes)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
        *("-m", "megatron_tropd", "train", str(config), *changes),
    ]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, cwd=root, env=environment, stdin=subprocess.DEVNULL, check=False)
    raise typer.Exit(done.returncode)


def _check_early(config: Path, changes: list[str], processes: int) -> None:
    """Finds a mistake in the settings here, where it is not buried under what the launcher says of its ranks."""
    from megatron_tropd.config import load_config
    from megatron_tropd.methods import build_method

    # paths are relative to the root of the repository, where the ranks will be
    settings = load_config(config, changes, world_size=processes, check_paths=False)
    build_method(settings.method.name, **settings.method.options)
