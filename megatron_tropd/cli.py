"""The command line: ``tropd train | generate | score | evaluate | convert | check | health | serve | report | ...``."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
import yaml
from rich.console import Console

from megatron_tropd.errors import EXIT_ERROR, ConfigError, TropdError, printable
from megatron_tropd.parallel import torchrun
from megatron_tropd.parallel.launch import check_launcher, check_variables
from megatron_tropd.parallel.leaving import leave
from megatron_tropd.parallel.stopping import Stopped, stoppable
from megatron_tropd.progress.phases import Heartbeat, Phase

if TYPE_CHECKING:
    from megatron_tropd.commands.generate import Sampling
    from megatron_tropd.commands.locate import Parts
    from megatron_tropd.train.preemption import Preempted

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# what is left of a command that a signal has stopped, and how it is taken up
_KEPT = {
    "generate": "What was written is in OUT.partial: start the same command again to continue from there.",
    "score": "What was scored is kept: start the same command again for the rest.",
    "convert": "The target is as it was: start the same command again to continue.",
    "evaluate": "What was answered is not kept: start the same command again.",
    "report": "The report is as it was before.",
    "demo": "Start it again for a new run; the results of this one are kept aside.",
}
# how long a rank that failed waits for the first one to have said why
_PATIENCE_S = 3.0
# verbs that end by themselves, but may take long
_LONG = ("train", "init", "generate", "score", "evaluate", "check", "convert", "report")

Config = Annotated[Path, typer.Argument(help="YAML file; relative paths are relative to the current directory.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [key=value]...",
        help="A YAML file, which --student, --teacher and --prompts can stand in for, and overrides such as "
        "train.steps=10. Relative paths are relative to the current directory.",
    ),
]
Student = Annotated[
    str | None, typer.Option(help="Model that learns (student.model): a Hugging Face directory, or a name on the hub.")
]
Teacher = Annotated[str | None, typer.Option(help="Model that scores (teacher.model).")]
Prompts = Annotated[list[str] | None, typer.Option(help="File of prompts (data.prompts); may be given several times.")]
MethodName = Annotated[str | None, typer.Option("--method", help="Preset to distill with (method.name).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as train.steps=10.")]
Like = Annotated[
    Path | None,
    typer.Option(help="Hugging Face directory with config and tokenizer, of a Megatron checkpoint's model."),
]
Dtype = Annotated[str, typer.Option(help="fp32 or bf16.")]
convert = typer.Typer(no_args_is_help=True, help="Checkpoints between Hugging Face and Megatron.")
app.add_typer(convert, name="convert")
Tensor = Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks of the conversion.")]
Pipeline = Annotated[int, typer.Option(min=1, help="Pipeline stages of the conversion.")]
Expert = Annotated[int, typer.Option(min=1, help="Expert-parallel ranks of the conversion.")]
ConvertDtype = Annotated[Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="auto keeps the source's.")]
Verify = Annotated[
    list[str] | None, typer.Option(help="A text on which to compare logits with transformers; may be given often.")
]


def main() -> None:
    """Run the command line. Errors made on purpose are one message and exit status 2; others keep their traceback.

    A signal that asks to stop is one message, and the exit status 128 and its number. ``errors.EXIT_STATUSES`` has all.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    # Megatron's checkpoints use it; there is nothing for a user to do
    warnings.filterwarnings("ignore", message=r".*deprecating ShardedTensor")
    first = _is_first()
    warnings.showwarning = _show_warning if first else _show_nothing
    logs = logging.StreamHandler()
    logs.setFormatter(_PrintableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[logs], level=logging.WARNING if first else logging.ERROR)
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    _say_repeated(sys.argv[1:])
    try:
        check_variables(os.environ)
        phase = Phase(f"tropd {verb}") if verb in _LONG else contextlib.nullcontext()
        with stoppable(_stop_word, spoken=first), Heartbeat(enabled=first), phase:
            app()
    except Stopped as stopped:
        if first:
            print(_stop_word(stopped.number), file=sys.stderr, flush=True)
        leave(128 + stopped.number)
    except (TropdError, OSError) as error:
        if not isinstance(error, TropdError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _report(error, first)
        # other ranks may wait in a collective for this one: leave without joining them
        leave(EXIT_ERROR)


def _say_repeated(arguments: list[str]) -> None:
    """Warn of keys that are given twice, with different values: the last one counts."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, found, value = argument.partition("=")
        if not found or key.startswith("-"):
            continue
        if given.setdefault(key, value) != value:
            warnings.warn(f"{key} is given twice: {value} counts, {given[key]} does not.", stacklevel=2)
            given[key] = value


class _PrintableFormatter(logging.Formatter):
    """Write records whose quotations, of servers, models and paths, cannot move the cursor of a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _stop_word(number: int) -> str:
    verb = next((argument for argument in sys.argv[1:] if argument in _KEPT), "")
    return f"stopped by {signal.Signals(number).name}. {_KEPT.get(verb, '')}".rstrip()


def _report(error: TropdError | OSError, first: bool) -> None:
    """Print one message for all ranks, whichever of them failed."""
    rank = ""
    if not first:
        # what goes wrong everywhere is reported by the first rank, whose end also ends this one under torchrun
        time.sleep(_PATIENCE_S)
        rank = f" on rank {os.environ['RANK']}"
    Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]{rank}: ", end="")
    print(printable(str(error)), file=sys.stderr, flush=True)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    # our own are for who runs the program, to whom the place in the code says nothing
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    place = "" if ours else f"{filename}:{lineno}: {category.__name__}: "
    print(printable(f"WARNING: {place}{message}"), file=sys.stderr, flush=True)


def _show_nothing(*_: object, **__: object) -> None:
    """Show nothing: what other ranks would say is what the first one says."""


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _settings(
    config: Path | None, overrides: list[str], *, parts: Parts = "all", told: bool = False, **options: Any
) -> Any:
    """Load the configuration, fetch what it names on the hub (``parts`` of models), decide on the device before
    anything else looks for one, and choose what is open; ``told``: whether that is printed.
    """
    from megatron_tropd.commands.locate import locate
    from megatron_tropd.config.loading import load_config

    settings = locate(load_config(config, overrides, check_paths=False, fitted_later=True, **options), parts=parts)
    settings.check_paths()
    from megatron_tropd.parallel.device import use_device

    use_device(settings.device)
    from megatron_tropd.commands.fitting import fit

    fitted = fit(settings)
    if told and _is_first():
        for line in fitted.lines():
            print(printable(line), flush=True)
    if fitted.warning is not None:
        warnings.warn(fitted.warning, stacklevel=2)
    return fitted.config


def _file_and_overrides(words: list[str] | None) -> tuple[Path | None, list[str]]:
    """Divide what stands on the command line: a file comes first, and has no ``=`` unless it is there."""
    first, *others = words or [""]
    if not first or first.startswith("-") or ("=" in first and not Path(first).exists()):
        return None, [*(words or [])]
    return Path(first), others


def _named(student: str | None, teacher: str | None, prompts: list[str] | None, method: str | None) -> dict[str, Any]:
    """Return what the options for the most important keys say, by key."""
    from megatron_tropd.config.messages import Named

    given: dict[str, tuple[str, str | list[str] | None]] = {
        "student.model": ("--student", student),
        "teacher.model": ("--teacher", teacher),
        "data.prompts": ("--prompts", prompts),
        "method.name": ("--method", method),
    }
    return {key: Named(option, value) for key, (option, value) in given.items() if value}


def _check_named(verb: str, config: Path | None, overrides: list[str], named: dict[str, Any]) -> None:
    """Raise ConfigError when there is neither a file nor enough of the options."""
    if config is not None:
        return
    keys = {change.partition("=")[0] for change in overrides}
    wanted = {"student.model": "--student", "teacher.model": "--teacher", "data.prompts": "--prompts"}
    lacking = [option for key, option in wanted.items() if key not in named and key not in keys]
    if "data.sources" in {key.partition("[")[0] for key in keys}:
        lacking = [option for option in lacking if option != "--prompts"]
    if lacking:
        raise ConfigError(
            f"tropd {verb} takes a CONFIG.yaml, or --student MODEL --teacher MODEL --prompts FILE; without a file "
            f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing. `tropd init` writes a file."
        )


def _leave() -> None:
    """End the process group, so that no rank is torn down while another still talks to it."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        # a barrier on the CPU: on GPUs one may first have to meet at a store that has left with the launch's first rank
        dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()


def _leave_preempted(stop: Preempted) -> NoReturn:
    from megatron_tropd.train.preemption import SIGNALS

    # a launcher that sees the first rank go ends the others, who are on their way out with the same status
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if _is_first():
        print(printable(str(stop)), flush=True)
    _leave()
    leave(stop.status)


def _print_versions(asked: bool) -> None:
    """Print the versions of this package and of what its numbers depend on, without importing any of it."""
    if not asked:
        return
    from importlib.metadata import version

    from megatron_tropd import __version__

    print(f"megatron-tropd {__version__}")
    for package in ("torch", "megatron-core", "transformers"):
        print(f"{package} {version(package)}")
    print(f"Python {sys.version.split()[0]}")
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the versions, and exit."),
    ] = False,
) -> None:
    """On-policy distillation of large language models on Megatron-Core."""


# an option that is not ours arrives as an override: of Megatron's, the answer names the key that stands for it
_FLAGS_TOO = {"ignore_unknown_options": True}


@app.command(context_settings=_FLAGS_TOO)
def train(
    words: Words = None,
    student: Student = None,
    teacher: Teacher = None,
    prompts: Prompts = None,
    method: MethodName = None,
) -> None:
    """Distill the student from the teacher: tropd train --student A --teacher B --prompts train.jsonl.

    SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ask it to stop: it writes a checkpoint and exits with status 75 (130 on Ctrl-C;
    a second Ctrl-C ends it at once). Start it again to resume.
    """
    check_launcher(os.environ)
    config, overrides = _file_and_overrides(words)
    named = _named(student, teacher, prompts, method)
    _check_named("train", config, overrides, named)
    settings = _settings(config, overrides, named=named, world_size=_world_size(), told=True)
    from megatron_tropd.commands import train as training
    from megatron_tropd.train.preemption import Preempted

    try:
        training.train(settings)
    except Preempted as stop:
        _leave_preempted(stop)
    _leave()


@app.command(context_settings=_FLAGS_TOO)
def check(
    words: Words = None,
    student: Student = None,
    teacher: Teacher = None,
    prompts: Prompts = None,
    method: MethodName = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of a cluster: print memory, traffic and time there, and the best layouts; needs "
            "nothing of the models but config.json."
        ),
    ] = None,
) -> None:
    """Validate a configuration, print the plan it resolves to, and run the teacher == student self check."""
    config, overrides = _file_and_overrides(words)
    named = _named(student, teacher, prompts, method)
    _check_named("check", config, overrides, named)
    if cluster is not None:
        from megatron_tropd.commands.cluster_plan import print_cluster_plan
        from megatron_tropd.commands.locate import locate
        from megatron_tropd.config.loading import load_config

        found = load_config(config, overrides, named=named, check_paths=False, fitted_later=True)
        print_cluster_plan(locate(found, parts="config"), cluster)
        return
    settings = _settings(config, overrides, named=named, told=True, parts="tokenizer")
    from megatron_tropd.commands.check import check_plan

    check_plan(settings)
    _leave()


@app.command()
def init(
    student: Annotated[str, typer.Option(help="Model that learns: a Hugging Face directory, or a name on the hub.")],
    teacher: Annotated[str, typer.Option(help="Model that scores, with the student's tokens.")],
    prompts: Annotated[list[str], typer.Option(help="File of prompts; may be given several times.")],
    method: MethodName = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write; one that is there stays.")] = Path(
        "tropd.yaml"
    ),
) -> None:
    """Write a commented configuration for models and prompts, after a look at both."""
    from megatron_tropd.commands.init import write_configuration
    from megatron_tropd.commands.locate import locate
    from megatron_tropd.config.loading import load_config
    from megatron_tropd.parallel.device import use_device

    named = _named(student, teacher, prompts, method)
    settings = locate(load_config(None, named=named, check_paths=False, fitted_later=True), parts="tokenizer")
    settings.check_paths()
    use_device(settings.device)
    write_configuration(settings, out)
    print(printable(f"{out}: look through it, then `tropd check {out}`"))


@app.command()
def generate(
    target: Annotated[Path, typer.Argument(help="Configuration (YAML), or directory of one model.")],
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[PROMPTS] OUT [key=value]...",
            help="With a configuration: the JSONL file to write (with data.sources a directory of them), then "
            "overrides. With a model: a file of prompts, and the file to write.",
        ),
    ],
    samples: Annotated[int, typer.Option(help="Responses per prompt; more than one adds rows.")] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest response; 1024, or the configuration's.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; 1, or the configuration's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1, or the configuration's.")] = None,
    seed: Annotated[int | None, typer.Option(help="0, or the configuration's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; bf16, or the configuration's.")] = None,
    tensor: Annotated[int | None, typer.Option(help="Tensor-parallel ranks; 1, or the teacher's.")] = None,
    engine: Annotated[str | None, typer.Option(help="megatron or vllm; megatron, or the teacher's.")] = None,
    limit: Annotated[int | None, typer.Option(help="Answer the first so many prompts (of every source).")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="With a model: column with the prompt.")] = None,
    response_column: Annotated[str | None, typer.Option(help="With a model: column to write.")] = None,
    system: Annotated[str | None, typer.Option(help="With a model: system message.")] = None,
    template: Annotated[str | None, typer.Option(help="With a model: Jinja over the row's columns.")] = None,
    template_option: Annotated[
        list[str] | None, typer.Option(help="With a model: name=value for the chat template; may be given often.")
    ] = None,
    like: Like = None,
) -> None:
    """Write one or more responses of a model to every prompt: the teacher's, to guide a student.

    With a configuration, the teacher answers the very prompts of training. Killed, it resumes where it was.
    """
    check_launcher(os.environ)
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "samples": samples,
        "seed": seed,
        "dtype": dtype,
        "tensor": tensor,
        "engine": engine,
        "limit": limit,
    }
    alone: dict[str, Any] = {
        "--prompt-column": prompt_column,
        "--response-column": response_column,
        "--system": system,
        "--template": template,
        "--template-option": template_option,
        "--like": like,
    }
    if target.suffix in (".yaml", ".yml"):
        _generate_from_config(target, arguments, given, [name for name, value in alone.items() if value is not None])
    else:
        _generate_of_model(target, arguments, given, alone)
    _leave()


def _generate_from_config(target: Path, arguments: list[str], given: dict[str, Any], alone: list[str]) -> None:
    from megatron_tropd.commands.generate import generate_from_config

    if alone:
        raise ConfigError(f"{alone[0]} is for a model; with a configuration set data.* instead, as in data.system=...")
    out, *overrides = arguments
    if "=" in out:
        raise ConfigError(f"{out} stands where the file to write is expected: tropd generate CONFIG OUT [key=value]...")
    config = _settings(target, overrides)
    rollout, teacher = config.rollout, config.teacher
    defaults = {
        "max_new_tokens": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "seed": config.seed,
        "dtype": config.dtype,
        "tensor": teacher.parallel.tensor,
        "engine": teacher.engine,
    }
    sampling = replace(_sampling(given, defaults), vllm=teacher.vllm)
    generate_from_config(config, Path(out), sampling=sampling)


def _generate_of_model(target: Path, arguments: list[str], given: dict[str, Any], alone: dict[str, Any]) -> None:
    from megatron_tropd.commands.generate import generate_responses
    from megatron_tropd.commands.locate import locate_data, locate_model
    from megatron_tropd.config.sections import ColumnsConfig
    from megatron_tropd.data.rows import Source
    from megatron_tropd.types import ModelSource

    if len(arguments) != 2:
        raise ConfigError(f"tropd generate MODEL takes PROMPTS and OUT, got {len(arguments)}: {' '.join(arguments)}.")
    columns = ColumnsConfig(
        prompt=alone["--prompt-column"] or "prompt", response=alone["--response-column"] or "response"
    )
    source = Source(
        paths=locate_data(Path(arguments[0])), columns=columns, template=alone["--template"], system=alone["--system"]
    )
    options: dict[str, Any] = {}
    for text in alone["--template-option"] or ():
        name, found, value = text.partition("=")
        if not found:
            raise ConfigError(f"--template-option is {text}: give name=value, such as enable_thinking=false.")
        options[name] = yaml.safe_load(value)
    defaults = {"max_new_tokens": 1024, "temperature": 1.0, "top_p": 1.0, "seed": 0, "dtype": "bf16", "tensor": 1}
    generate_responses(
        ModelSource(locate_model(target), alone["--like"]),
        source,
        Path(arguments[1]),
        sampling=_sampling(given, defaults),
        options=options,
    )


def _sampling(given: dict[str, Any], defaults: dict[str, Any]) -> Sampling:
    from megatron_tropd.commands.generate import Sampling
    from megatron_tropd.types import SamplingParams

    values = defaults | {name: value for name, value in given.items() if value is not None}
    drawn = {name: values.pop(name) for name in ("max_new_tokens", "temperature", "top_p", "top_k") if name in values}
    return Sampling(params=SamplingParams(**drawn), **values)


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(help="Configuration (YAML), or directory of one model.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of the configuration; with a model, of every suite.")
    ] = None,
    suite: Annotated[list[Path] | None, typer.Option(help="YAML file of a suite; may be given several times.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="With a model: directory for evaluation.json and every answer.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first so many problems of every suite.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="With a model: longest answer where a suite does not say.")
    ] = 1024,
    dtype: Annotated[str, typer.Option(help="With a model: fp32 or bf16.")] = "bf16",
    tensor: Annotated[int, typer.Option(help="With a model: tensor-parallel ranks.")] = 1,
    seed: Annotated[int, typer.Option(help="With a model: seed of the answers.")] = 0,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let the grader `code` run programs that the model wrote.")
    ] = False,
    sandbox: Annotated[
        Literal["required", "none"],
        typer.Option(help="none: run them also where they cannot be kept from this machine's files and network."),
    ] = "required",
    like: Like = None,
) -> None:
    """Grade student and teacher of a configuration, or one model, on suites of problems, without training."""
    check_launcher(os.environ)
    if target.suffix not in (".yaml", ".yml"):
        if not suite:
            raise ConfigError("a model is graded on suites: give --suite FILE.yaml, such as one of examples/suites.")
        from megatron_tropd.commands.locate import locate_model, locate_suite
        from megatron_tropd.config.loading import load_suite

        suites = [locate_suite(load_suite(file, overrides or [], check_paths=False)) for file in suite]
        from megatron_tropd.commands.evaluate import evaluate_model, limited
        from megatron_tropd.types import ModelSource

        evaluate_model(
            ModelSource(locate_model(target), like),
            limited(suites, limit),
            seed=seed,
            dtype=dtype,
            tensor=tensor,
            max_new_tokens=max_new_tokens,
            out=out,
            allow_code="unconfined" if allow_code_execution and sandbox == "none" else allow_code_execution,
        )
        _leave()
        return
    if like is not None:
        raise ConfigError("--like is for a model; in a configuration set student.like and teacher.like.")
    changes = [*(overrides or []), "teacher.ranks=0"]  # all ranks answer
    if suite:
        changes.append(f"evaluate.suites=[{', '.join(f'{{file: {json.dumps(str(file))}}}' for file in suite)}]")
    if allow_code_execution:
        changes.append("evaluate.allow_code_execution=true")
    if sandbox != "required":
        changes.append(f"evaluate.sandbox={sandbox}")
    settings = _settings(target, changes, world_size=_world_size())
    if not settings.evaluate.prompts and not any(suite.prompts for suite in settings.evaluate.suites):
        raise ConfigError("evaluate.prompts is null: there is nothing to evaluate on. Give a file of problems.")
    from megatron_tropd.commands.evaluate import evaluate_models

    evaluate_models(settings, limit=limit)
    _leave()


@convert.command("hf-to-megatron")
def hf_to_megatron(
    source: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    target: Annotated[Path, typer.Argument(help="Megatron checkpoint to write.")],
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    expert: Expert = 1,
    dtype: ConvertDtype = "auto",
    verify: Verify = None,
    layout: Annotated[
        Literal["own", "megatron-lm", "bridge"],
        typer.Option(help="Whose directory: ours, or what Megatron-LM (--load DIR --finetune) or Bridge loads."),
    ] = "own",
) -> None:
    """Write a Hugging Face directory as a Megatron checkpoint, for any layout to load. Killed, it starts over."""
    _convert("hf_to_megatron", source, target, (tensor, pipeline, expert), dtype, verify, form=layout)


@convert.command("megatron-to-hf")
def megatron_to_hf(
    source: Annotated[
        Path,
        typer.Argument(
            help="Megatron checkpoint: RUN, RUN/checkpoints/step-..., a converted one, or a directory of Megatron-LM, "
            "Megatron-Bridge or NeMo 2 (format torch_dist)."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Hugging Face directory to write.")],
    like: Annotated[Path | None, typer.Option(help="Model directory to take config and tokenizer from.")] = None,
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    expert: Expert = 1,
    dtype: ConvertDtype = "auto",
    verify: Verify = None,
) -> None:
    """Write a Megatron checkpoint as a Hugging Face directory. Killed, it resumes where it was."""
    _convert("megatron_to_hf", source, target, (tensor, pipeline, expert), dtype, verify, like=like)


@convert.command("recording")
def recording(
    old: Annotated[Path, typer.Argument(help="Directory of a teacher's scores, written by an earlier version.")],
    new: Annotated[Path, typer.Argument(help="Directory to write: the same scores as Parquet files.")],
) -> None:
    """Write an old recording of a teacher's scores as Parquet. The old one stays as it is."""
    from megatron_tropd.teacher.old_recordings import convert_recording

    print(printable(f"{convert_recording(old, new):,} scored sequences: {new}"))


def _convert(
    name: str,
    source: Path,
    target: Path,
    sizes: tuple[int, int, int],
    dtype: str,
    texts: list[str] | None,
    **options: Any,
) -> None:
    """Convert here when there are as many ranks as the layout needs, else in as many new processes."""
    check_launcher(os.environ)
    tensor, pipeline, expert = sizes
    ranks = tensor * pipeline * expert
    if ranks > 1 and "RANK" not in os.environ:
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        command = ("-m", "megatron_tropd", *sys.argv[1:])
        where = ("--standalone", f"--nproc-per-node={ranks}")
        raise typer.Exit(torchrun.run_ranks(where, command, environment=environment, cwd=Path()))
    from megatron_tropd.commands import convert as conversion
    from megatron_tropd.commands.locate import locate_model
    from megatron_tropd.config.sections import Layout

    if name == "hf_to_megatron":
        source = locate_model(source, key="SOURCE")
    if options.get("like") is not None:
        options["like"] = locate_model(options["like"], key="--like", parts="tokenizer")
    layout = Layout(tensor=tensor, pipeline=pipeline, expert=expert)
    plan = conversion.ConversionPlan(layout=layout, dtype=dtype, texts=tuple(texts or ()))
    getattr(conversion, name)(source, target, plan, **options)
    _leave()


@app.command()
def health(
    gpus: Annotated[
        int | None,
        typer.Option(min=0, help="GPUs that the ranks of every machine must have, each its own; default: any number."),
    ] = None,
    shared: Annotated[
        Path | None, typer.Option(help="A directory that all ranks should see, such as that of the runs.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds that ranks wait for one another.")] = 120.0,
) -> None:
    """Check devices, versions, collectives and the shared file system, under the launcher of the training."""
    from megatron_tropd.commands.health import check_health
    from megatron_tropd.errors import HealthError

    problems = check_health(gpus=gpus, shared=shared, timeout_s=timeout_s)
    if problems and _is_first():
        raise HealthError(f"{len(problems)} problem(s):\n" + "\n".join(f"  {problem}" for problem in problems))
    if problems:
        raise typer.Exit(EXIT_ERROR)


@app.command()
def serve(
    role: Annotated[
        Literal["student", "teacher"],
        typer.Argument(help="student: samples, and takes new weights; teacher: scores."),
    ],
    config: Config,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address; beyond loopback only with an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8100,
) -> None:
    """Start a vLLM server that this configuration can train with, on GPUs or on CPU."""
    settings = _settings(config, overrides or [])
    from megatron_tropd.commands import serve as serving

    serving.serve(settings, role, host=host, port=port)


@app.command()
def score(config: Config, overrides: Overrides = None) -> None:
    """Write the teacher's scores of recorded rollouts, or of the responses in the data, to teacher.record.

    A run with teacher.recorded_from then needs no teacher.
    """
    check_launcher(os.environ)
    settings = _settings(config, overrides or [])
    from megatron_tropd.commands import score as scoring

    scoring.score(settings)
    _leave()


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directory of a run, or of several.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Page that compares several runs; comparison.html in the current directory."),
    ] = None,
    live: Annotated[
        bool, typer.Option("--watch", help="Write it again whenever a run has gone on, until Ctrl-C; browsers reload.")
    ] = False,
    every: Annotated[int, typer.Option(min=1, help="With --watch: seconds between two looks.")] = 10,
) -> None:
    """Write RUN/report.html from what a run has left on disk, or a page that compares several runs."""
    from megatron_tropd.report.comparison import write_comparison
    from megatron_tropd.report.html import write_report
    from megatron_tropd.report.watch import watch

    if len(run_dirs) == 1 and out is not None:
        raise ConfigError(f"--out = {out} is for several runs: the page of one is RUN/report.html. Leave it out.")

    def write(refresh_s: int | None) -> Path:
        if len(run_dirs) == 1:
            return write_report(run_dirs[0], refresh_s=refresh_s)
        return write_comparison(run_dirs, out or Path("comparison.html"), refresh_s=refresh_s)

    if live:
        watch(
            run_dirs,
            write,
            every_s=every,
            told=lambda page: print(printable(f"{page}: live, until Ctrl-C"), flush=True),
        )
    else:
        print(printable(str(write(None))))


@app.command()
def demo(
    method: Annotated[str, typer.Option(help="Preset to distill with.")] = "tropd",
    student: Annotated[
        str,
        typer.Option(
            help="direct: answers off the top of its head, far from the teacher; mistaken: shows its work, with wrong "
            "beliefs, near it."
        ),
    ] = "direct",
    processes: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 2,
    engine: Annotated[
        str | None,
        typer.Option(help="rollout.engine, who samples: the trainer's own model (default), vllm, or vllm_server."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train the demo's student: a few minutes on two CPU cores."""
    check_launcher(os.environ)
    from megatron_tropd.commands import demo as demonstration
    from megatron_tropd.config.loading import load_config

    files = demonstration.find_demo(student)
    config = files.config
    processes = demonstration.ranks_for(processes, overrides or [])
    changes = [*files.overrides, *_of_preset(files.root, method), "checkpoint.resume=never"]
    changes += [f"{role}.parallel.tensor={processes}" for role in ("student", "teacher")]
    added, needs_servers = demonstration.of_engine(engine)
    changes += [*added, *(overrides or [])]
    with contextlib.ExitStack() as beside:
        if needs_servers:
            demonstration.check_settings(config, changes, processes)
            url, key = beside.enter_context(demonstration.student_server(config, changes, root=files.cwd))
            changes.append(f"rollout.vllm_server.urls=[{url}]")
        else:
            key = {}
        if engine is not None:
            changes.append(f"rollout.engine={engine}")
        demonstration.check_settings(config, changes, processes)
        options = ("--standalone", f"--nproc-per-node={processes}")
        # what a preset sets and the user sets otherwise is given once
        changes = list({change.partition("=")[0]: change for change in changes}.values())
        command = ("-m", "megatron_tropd", "train", str(config), *changes)
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **key}
        status = torchrun.run_ranks(options, command, environment=environment, cwd=files.cwd)
    if status == 0:
        words = demonstration.last_words(files.cwd / load_config(config, changes, check_paths=False).run_dir)
        print(printable(words), end="\n" if words else "")
    raise typer.Exit(status)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def launch(
    context: typer.Context,
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="[OPTIONS OF TORCHRUN] VERB ...", help="As in: --nproc-per-node=8 train CONFIG.yaml."),
    ],
) -> None:
    """Run a command of this program on several ranks: torchrun, without its traceback when a rank ends with an error.

    The exit status is that of the rank that failed first.
    """
    words = [*arguments, *context.args]
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    place = next((place for place, word in enumerate(words) if word in verbs | {"convert"}), None)
    if place is None:
        raise ConfigError(f"{' '.join(words)} names no command to run: give one of {', '.join(sorted(verbs))}.")
    raise typer.Exit(torchrun.main([*words[:place], "-m", "megatron_tropd", *words[place:]]))


def _of_preset(root: Path, method: str) -> list[str]:
    """List the overrides that ``examples/methods`` has for a preset: its options and the rollouts it wants."""
    from megatron_tropd.config.loading import read_overrides

    file = root / "examples" / "methods" / f"{method}.yaml"
    # an unknown one is refused later, with the names there are
    return read_overrides(file) if file.exists() else [f"method.name={method}"]
