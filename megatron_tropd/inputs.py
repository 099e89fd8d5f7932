"""What a run is made from, read and checked against each other: everything a user can have wrong is found here,
before a model is built or a rank waits for another."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.config import ParallelConfig, RunConfig
from megatron_tropd.convert.hf import read_architecture
from megatron_tropd.data.prompts import Columns, read_prompts
from megatron_tropd.data.tokenizer import Tokenizer, check_same_vocabulary, load_tokenizer
from megatron_tropd.engine.model import check_divisible
from megatron_tropd.errors import CheckpointError, ConfigError, DataError, TokenizerError
from megatron_tropd.losses.terms import NONE
from megatron_tropd.methods import Method, build_method
from megatron_tropd.parallel.groups import Layout
from megatron_tropd.rollout.recorded import check_recorded
from megatron_tropd.types import Architecture, Prompt

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A method, two models' sizes, their tokenizer, and data that fits them."""

    method: Method
    student: Architecture
    teacher: Architecture
    tokenizer: Tokenizer
    vocab_size: int  # ids both models know
    prompts: tuple[Prompt, ...]
    problems: tuple[Prompt, ...]  # held out, for evaluation; empty when there are none


def read_inputs(config: RunConfig) -> Inputs:
    """Reads and checks everything that training starts from.

    Raises:
        TropdError: whatever method, models, layouts, tokenizers or data have wrong, in that order.
    """
    method = check_method(config)
    check_available(config)
    check_sequences(config, method)
    if config.rollout.recorded_from is not None:
        check_recorded(config.rollout.recorded_from, range(config.train.steps))
    student, teacher = read_architectures(config)
    check_layouts(config, student, teacher)
    tokenizer = read_tokenizer(config)
    inputs = Inputs(
        method=method,
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        vocab_size=min(student.vocab_size, teacher.vocab_size),
        prompts=read_training_prompts(config, tokenizer, method),
        problems=read_problems(config, tokenizer),
    )
    check_support(method, inputs.vocab_size)
    sizes = {"student": student.vocab_size, "teacher": teacher.vocab_size}
    check_ids({"prompt": inputs.prompts, "problem": inputs.problems}, tokenizer, vocab_sizes=sizes)
    check_training_lengths(config, inputs)
    check_problem_lengths(config, inputs.problems, {"student": student, "teacher": teacher})
    return inputs


# --------------------------------------------------------------------------- the configuration alone


def check_method(config: RunConfig) -> Method:
    """The method; ConfigError for an unknown name or option, or a need this version cannot serve."""
    method = build_method(config.method.name, **config.method.options)
    if method.needs.base_model:
        raise ConfigError(f"method.name={config.method.name!r} needs a base model, which is not available yet.")
    if method.needs.support not in ("teacher", "teacher_and_sampled"):
        raise ConfigError(
            f"method support={method.needs.support!r} is not available yet; use 'teacher' or 'teacher_and_sampled'."
        )
    return method


def check_available(config: RunConfig) -> None:
    """Refuses what the configuration knows and this version does not run yet, and sinks that are not installed."""
    if config.rollout.engine in ("vllm", "vllm_server"):
        raise ConfigError(f"rollout.engine={config.rollout.engine} is not available yet; use megatron or recorded.")
    if config.rollout.ahead:
        raise ConfigError(f"rollout.ahead={config.rollout.ahead} is not available yet; use 0.")
    for role, parallel in (("student", config.student.parallel), ("teacher", config.teacher.parallel)):
        for axis in ("context", "expert", "virtual_pipeline"):
            if getattr(parallel, axis) > 1:
                raise ConfigError(f"{role}.parallel.{axis}={getattr(parallel, axis)} is not available yet; use 1.")
    for role, section in (("student", config.student), ("teacher", config.teacher)):
        if section.attention == "te":
            raise ConfigError(f"{role}.attention=te is not available yet; use sdpa or auto.")
    for name, wanted in (("tensorboard", config.report.tensorboard), ("wandb", config.report.wandb is not None)):
        if wanted and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"report.{name} needs the package {name}, which is not installed. "
                f"Run `pip install {name}`, or take report.{name} out of the config."
            )


def guided_per_prompt(config: RunConfig, method: Method) -> int:
    """Sequences per prompt that begin with a teacher prefix."""
    return config.rollout.guided_per_prompt if method.guided else 0


def sequences_per_step(config: RunConfig, method: Method) -> int:
    """Sequences of one training step, over all ranks."""
    return config.train.prompts_per_step * (config.rollout.samples_per_prompt + guided_per_prompt(config, method))


def check_sequences(config: RunConfig, method: Method) -> None:
    """ConfigError when the method leaves nothing to train on."""
    name, rollout = config.method.name, config.rollout
    sequences = sequences_per_step(config, method)
    if sequences == 0:
        raise ConfigError(
            f"method.name={name} is not guided, so rollout.guided_per_prompt={rollout.guided_per_prompt} does not "
            "count, and rollout.samples_per_prompt=0: nothing would be sampled. Raise rollout.samples_per_prompt."
        )
    if method.trusted is NONE and method.outlier is NONE and method.extra is NONE and rollout.guided_per_prompt == 0:
        raise ConfigError(
            f"method.name={name} learns from the teacher's responses alone, but rollout.guided_per_prompt=0 asks for "
            "none. Set rollout.guided_per_prompt=1."
        )
    if config.train.minibatches > sequences:
        raise ConfigError(
            f"train.minibatches={config.train.minibatches} is more than the {sequences} sequences of a step. "
            "Lower it, or raise train.prompts_per_step."
        )


def check_writable(config: RunConfig) -> None:
    """Makes the directories a run writes to; ConfigError when one cannot be made or written."""
    export = config.export.hf
    for key, path in (
        ("run_dir", config.run_dir),
        ("rollout.record", config.rollout.record),
        ("teacher.record", config.teacher.record),
        ("export.hf", None if export is None else export.parent),
    ):
        if path is None:
            continue
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError("no permission to write")
        except OSError as error:
            raise ConfigError(
                f"{key}: cannot write to {path.absolute()} ({why_not_written(error)}). Name another directory."
            ) from error


def why_not_written(error: OSError) -> str:
    """The operating system's reason, in words that fit a directory to be made."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "a file is in the way"
    return error.strerror or str(error)


# --------------------------------------------------------------------------- models and tokenizers


def read_architectures(config: RunConfig) -> tuple[Architecture, Architecture]:
    """Sizes of student and teacher; CheckpointError that says whose ``config.json`` cannot be used."""
    found = []
    for key, path in (("student.model", config.student.model), ("teacher.model", config.teacher.model)):
        try:
            found.append(read_architecture(path))
        except CheckpointError as error:
            raise CheckpointError(f"{key} = '{path}': {error}") from error
    return found[0], found[1]


def layout_of(parallel: ParallelConfig) -> Layout:
    """The layout a config section asks for."""
    return Layout(**parallel.model_dump())


def check_layouts(config: RunConfig, student: Architecture, teacher: Architecture) -> None:
    """ConfigError when a model cannot be cut the way its section asks for."""
    sampler = Layout(tensor=config.rollout.parallel.tensor)
    asked = [
        ("student.parallel", student, layout_of(config.student.parallel)),
        ("teacher.parallel", teacher, layout_of(config.teacher.parallel)),
        ("rollout.parallel", student, sampler),
    ]
    if config.evaluate.prompts is not None and config.evaluate.teacher:
        asked.append(("rollout.parallel (evaluating the teacher)", teacher, sampler))
    for key, architecture, layout in asked:
        try:
            check_divisible(architecture, layout)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None


def read_tokenizer(config: RunConfig) -> Tokenizer:
    """The student's tokenizer; TokenizerError unless the teacher's gives its ids to the same tokens."""
    tokenizer = load_tokenizer(config.student.model, chat_template=config.data.chat_template)
    teacher = load_tokenizer(config.teacher.model, chat_template=config.data.chat_template)
    check_same_vocabulary(tokenizer, teacher)
    return tokenizer


def check_support(method: Method, vocab_size: int) -> None:
    """ConfigError when the method asks for more candidates than there are ids."""
    if method.needs.top_k > vocab_size:
        raise ConfigError(
            f"method.k={method.needs.top_k} candidates per token, but the models share {vocab_size} ids. "
            "Lower method.k."
        )


def check_ids(rows: Mapping[str, Sequence[Prompt]], tokenizer: Tokenizer, *, vocab_sizes: Mapping[str, int]) -> None:
    """TokenizerError when the tokenizer writes ids that a model has no embedding for.

    Args:
        rows: by what they are called in a message.
        vocab_sizes: embeddings of each model, by its role.
    """
    role, size = min(vocab_sizes.items(), key=lambda item: item[1])
    rule = (
        f"the {role} has embeddings for {size} ids only (vocab_size in its config.json). "
        "Give every model the tokenizer it was trained with."
    )
    if tokenizer.eos_ids[0] >= size:
        raise TokenizerError(f"the end-of-sequence id is {tokenizer.eos_ids[0]}, but {rule}")
    for what, prompts in rows.items():
        for prompt in prompts:
            for ids in (prompt.token_ids, prompt.response_ids):
                if ids is not None and ids.size and int(ids.max()) >= size:
                    raise TokenizerError(
                        f"the {what} on line {prompt.index + 1} holds token id {int(ids.max())}, but {rule}"
                    )


# --------------------------------------------------------------------------- data


def read_training_prompts(config: RunConfig, tokenizer: Tokenizer, method: Method) -> tuple[Prompt, ...]:
    """Training prompts, with teacher responses when the method is guided."""
    data, guided = config.data, guided_per_prompt(config, method) > 0
    prompts = read_prompts(
        data.prompts,
        tokenizer,
        columns=Columns(**data.columns.model_dump()),
        max_prompt_tokens=data.max_prompt_tokens,
        require_response=guided and data.on_bad_row == "skip",
        on_bad_row=data.on_bad_row,
    ).prompts
    bare = [prompt.index + 1 for prompt in prompts if prompt.response_ids is None]
    if guided and bare:
        raise DataError(
            f"{data.prompts}: {len(bare)} of {len(prompts)} prompts have no teacher response in column "
            f"{data.columns.response!r} (the first is on line {bare[0]}), and method.name={config.method.name} starts "
            "some sequences with one. Let the teacher write them (`tropd generate TEACHER PROMPTS OUT`), or set "
            "rollout.guided_per_prompt=0 to train without."
        )
    return prompts


def read_problems(config: RunConfig, tokenizer: Tokenizer) -> tuple[Prompt, ...]:
    """The evaluation problems, none when ``evaluate.prompts`` is null; DataError when one has no answer to grade by."""
    data, path = config.data, config.evaluate.prompts
    if path is None:
        return ()
    problems = read_prompts(
        path,
        tokenizer,
        columns=Columns(**data.columns.model_dump()),
        max_prompt_tokens=data.max_prompt_tokens,
        on_bad_row=data.on_bad_row,
    ).prompts[: config.evaluate.max_problems]
    bare = [problem.index + 1 for problem in problems if problem.answer is None]
    if bare:
        raise DataError(
            f"{path}: {len(bare)} of {len(problems)} problems have no reference answer in column "
            f"{data.columns.answer!r} (the first is on line {bare[0]}). Name the column that holds it with "
            "data.columns.answer, or set evaluate.prompts=null."
        )
    return problems


def check_training_lengths(config: RunConfig, inputs: Inputs) -> None:
    """ConfigError when a prompt and a response of full length have more tokens than a model has positions."""
    for role, architecture in (("student", inputs.student), ("teacher", inputs.teacher)):
        _check_length(
            inputs.prompts, config.rollout.max_new_tokens, architecture, role=role, key="rollout.max_new_tokens"
        )


def check_problem_lengths(config: RunConfig, problems: Sequence[Prompt], models: Mapping[str, Architecture]) -> None:
    """The same for the evaluation problems and every suite. ``models`` by role."""
    for role, architecture in models.items():
        if role == "teacher" and not config.evaluate.teacher:
            continue
        for suite in config.evaluate.suites:
            key = f"max_new_tokens of the suite {suite.name!r}" if suite.max_new_tokens else "rollout.max_new_tokens"
            budget = suite.max_new_tokens or config.rollout.max_new_tokens
            _check_length(problems, budget, architecture, role=role, key=key)


def _check_length(prompts: Sequence[Prompt], budget: int, architecture: Architecture, *, role: str, key: str) -> None:
    limit = architecture.max_positions
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids), default=None)
    if longest is None or len(longest.token_ids) + budget <= limit:
        return
    length = len(longest.token_ids)
    raise ConfigError(
        f"the prompt on line {longest.index + 1} has {length} tokens; with {key} = {budget} a sequence may have "
        f"{length + budget}, but the {role} has {limit} positions (max_position_embeddings). "
        + (f"Lower {key} to {limit - length} or less." if length < limit else "Lower data.max_prompt_tokens.")
    )


# --------------------------------------------------------------------------- what a resumed run must share


def identity(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """What shapes the numbers of a run, by config key: a checkpoint of a run with other values is of another run.

    Layouts, packing, evaluation and reporting are not in it: they may change when a run goes on.
    """
    data: Path = config.data.prompts
    return {
        "seed": config.seed,
        "dtype": config.dtype,
        "student.model": asdict(inputs.student),
        "teacher.model": asdict(inputs.teacher),
        "data.prompts": f"{len(inputs.prompts)} prompts, {data.stat().st_size} bytes",
        **{f"method.{key}": value for key, value in config.method.model_dump().items()},
        **{
            f"rollout.{key}": getattr(config.rollout, key)
            for key in ("samples_per_prompt", "guided_per_prompt", "max_new_tokens", "temperature", "top_p", "top_k")
        },
        **{f"train.{key}": getattr(config.train, key) for key in ("steps", "prompts_per_step", "minibatches")},
        **{f"optimizer.{key}": value for key, value in config.optimizer.model_dump().items()},
    }
