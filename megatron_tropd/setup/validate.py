"""Read the inputs of a run and check them against each other: everything a user can have wrong is found here,
before a model is built or a rank waits for another."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import Layout
from megatron_tropd.convert.source import source_architecture, source_fingerprint
from megatron_tropd.data.table import PromptTable
from megatron_tropd.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megatron_tropd.engine.model import check_divisible, check_trainable
from megatron_tropd.engine.te import te_refusal
from megatron_tropd.errors import CheckpointError, ConfigError
from megatron_tropd.losses.multipliers import WHOLE_SEQUENCE
from megatron_tropd.losses.terms import NONE
from megatron_tropd.methods import Method, method_of
from megatron_tropd.report.terminal import say
from megatron_tropd.report.trackers import TRACKERS
from megatron_tropd.rollout.engines.checks import check_logprobs
from megatron_tropd.rollout.engines.recorded import check_recorded
from megatron_tropd.rollout.engines.registry import ROLLOUT_ENGINES
from megatron_tropd.setup.adapters import adapter_identity, check_adapters
from megatron_tropd.setup.chat_templates import warn_of_differences, warn_of_unread_options
from megatron_tropd.setup.checkpoints import check_checkpoints
from megatron_tropd.setup.claims import exports_of
from megatron_tropd.setup.datasets import (
    check_ids,
    check_problem_lengths,
    check_training_lengths,
    data_identity,
    read_problems,
    read_tokenizers,
    read_training_prompts,
    suites_of,
)
from megatron_tropd.setup.ends import STUDENT, ResponseEnds, response_ends, stopping_at
from megatron_tropd.setup.findings import Check, Findings
from megatron_tropd.setup.references import check_training_answers
from megatron_tropd.setup.rewards import check_answers, check_rewards, reward_function
from megatron_tropd.storage.owned import check_target
from megatron_tropd.storage.write_aside import sync_directory, why_not_written
from megatron_tropd.teacher.engines.checks import check_reported
from megatron_tropd.teacher.engines.registry import TEACHER_ENGINES, scoring_engine
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.types import Architecture, ModelSource

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A method, its models' sizes, their tokenizer, and data that fits them."""

    method: Method
    student: Architecture
    teacher: Architecture
    teachers: Mapping[str, Architecture]  # those beside it, by name
    base: Architecture | None  # None unless the method needs a base model
    tokenizer: Tokenizer  # the student's, which ends a response wherever the method has one end
    ends: ResponseEnds
    vocab_size: int  # ids all models know
    prompts: PromptTable
    problems: Mapping[str, PromptTable]  # held out, by suite; empty when nothing is evaluated


def read_inputs(config: RunConfig, *, may_lack_responses: bool = False) -> Inputs:
    """Read and check everything that training starts from.

    Args:
        may_lack_responses: whether prompts may lack responses that the teacher can write (``data.responses: auto``).

    Raises:
        TropdError: whatever method, models, layouts, tokenizers or data have wrong, in that order.
    """
    found = Findings(CHECKS)
    method = check_method(config)
    found.learn(config=config, method=method)
    student, teacher = read_architectures(config)
    teachers = {
        one.name: read_architecture(f"teachers[{i}].model", one.source) for i, one in enumerate(config.teachers)
    }
    base = read_architecture("base.model", config.base_source) if method.needs.base_model else None
    found.learn(student=student, teacher=teacher, teachers=teachers, base=base)
    models = {"student": student, "teacher": teacher}
    models |= {f"teacher {name!r}": architecture for name, architecture in teachers.items()}
    models |= {} if base is None else {"base model": base}
    vocab_size = min(model.vocab_size for model in models.values())
    tokenizers = read_tokenizers(config, base=base is not None)
    ends = response_ends(tokenizers, method.settings.end_tokens, vocab_size=vocab_size)
    tokenizer = stopping_at(tokenizers[STUDENT], ends.ids)
    inputs = Inputs(
        method=replace(method, end_ids=ends.ids),
        student=student,
        teacher=teacher,
        teachers=teachers,
        base=base,
        tokenizer=tokenizer,
        ends=ends,
        vocab_size=vocab_size,
        prompts=read_training_prompts(
            config, tokenizer, guided=guided_per_prompt(config, method) > 0, may_lack=may_lack_responses
        ),
        problems=read_problems(suites_of(config), config.data, tokenizer, allow_code=config.evaluate.code_execution),
    )
    found.learn(models=models, inputs=inputs)
    found.finish()
    if config.rollout.samples_per_prompt:
        check_training_answers(config.data, inputs.prompts, allow_code=config.evaluate.code_execution)
    return inputs


# --------------------------------------------------------------------------- the configuration alone


def check_method(config: RunConfig) -> Method:
    """Build the method; ConfigError for an unknown name or option."""
    return method_of(config.method)


def check_available(config: RunConfig) -> None:
    """Refuse what the configuration knows and this version does not run yet, with what is missing for it."""
    wanted = {
        "student.attention": (config.student.attention == "te", "te", "sdpa or auto"),
        "teacher.attention": (config.teacher.attention == "te", "te", "sdpa or auto"),
        "student.layers": (config.student.layers == "te", "te", "local"),
        "student.fp8": (config.student.fp8 != "none", config.student.fp8, "none"),
    }
    for key, (refused, value, others) in wanted.items():
        if refused:
            raise ConfigError(f"{key}={value} is not available yet: {te_refusal()} Use {others}.")


def check_ahead(config: RunConfig, method: Method) -> None:
    """Raise ConfigError when the method cannot learn from rollouts of older weights; warn if nothing would overlap."""
    ahead, engine = config.rollout.ahead, config.rollout.engine
    if not ahead:
        return
    if method.on_policy_terms:
        raise ConfigError(
            f"rollout.ahead={ahead} has method.name={config.method.name} learn from tokens that older weights sampled, "
            f"but its {' and '.join(method.on_policy_terms)} has no importance ratio and would be biased by that. "
            f"{_clips(method)}take another term, or set rollout.ahead=0."
        )
    if ROLLOUT_ENGINES[engine].colocated and not config.teacher.ranks:
        warnings.warn(
            f"rollout.ahead={ahead} with rollout.engine={engine}: the trainer's own processes sample, so nothing "
            "overlaps and rollouts are only older. Use servers (rollout.engine=vllm_server), give the teacher ranks of "
            "its own (teacher.ranks), or set rollout.ahead=0.",
            stacklevel=2,
        )


def _clips(method: Method) -> str:
    """Say which options give the terms that lack one an importance ratio."""
    advice = {"reward_pg": "method.reward_clip=0.2", "reference_pg": "method.reward_clip=0.2"}
    advice["reference_k3"] = "method.reference=pg with method.reward_clip=0.2"
    other = "method.ppo_clip=0.2 where the method has it"
    return f"Set {', '.join(dict.fromkeys(advice.get(name, other) for name in method.on_policy_terms))}, "


def warn_of_biased_sampling(config: RunConfig, method: Method) -> None:
    """Say when what the student writes is not drawn from the distribution that the objective takes it for."""
    rollout, tempered = config.rollout, config.rollout.temperature != method.temperature
    changed = [f"rollout.temperature={rollout.temperature:g}"] if tempered else []
    changed += [f"rollout.top_p={rollout.top_p:g}"] if rollout.top_p < 1.0 else []
    changed += [f"rollout.top_k={rollout.top_k}"] if rollout.top_k else []
    if changed and method.sampled_terms:
        logger.warning(
            "%s: tokens are not drawn from the student's own distribution (temperature %g, nothing left out), but "
            "method.name=%s takes them for such draws: the gradient of %s is biased. Set temperature %g, top_p 1 and "
            "top_k 0 in rollout, or take terms that compare distributions, as fkl_topk and rkl_topk do.",
            *(" and ".join(changed), method.temperature, config.method.name),
            *(" and ".join(method.sampled_terms), method.temperature),
        )


def check_multiplier(config: RunConfig, method: Method) -> None:
    """Refuse a weight that looks at a whole sequence where context parallelism cuts sequences."""
    context, multiplier = config.student.parallel.context, method.settings.multiplier
    if context > 1 and multiplier in WHOLE_SEQUENCE:
        raise ConfigError(
            f"method.multiplier={multiplier} weighs a token by others of its sequence, and student.parallel.context="
            f"{context} leaves each rank a part of it. Set student.parallel.context=1, or method.multiplier=none."
        )


def check_packages(config: RunConfig) -> None:
    """Raise ConfigError when something that the configuration requests is not installed."""
    samples, scores = ROLLOUT_ENGINES[config.rollout.engine], scoring_engine(config.teacher)
    samples.check()
    scores.check()
    sleeping = config.rollout.vllm.sleep and config.teacher.vllm.sleep and torch.cuda.is_available()
    if samples.sleeps and scores.sleeps and sleeping:
        raise ConfigError(
            f"rollout.engine={config.rollout.engine} and teacher.engine={config.teacher.engine}: of the engines in one "
            "process only one can leave the GPU while it has nothing to do. Set teacher.vllm.sleep=false, or have "
            "servers for one of them."
        )
    clients = {name: (row.package, row.install) for name, row in TRACKERS.items()}
    for name, (package, install) in {"tensorboard": ("tensorboard", "tensorboard"), **clients}.items():
        if getattr(config.report, name) and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"report.{name} needs the package {install}, which is not installed. "
                f"Run `pip install {install}`, or take report.{name} out of the config."
            )


def guided_per_prompt(config: RunConfig, method: Method) -> int:
    """Count the sequences per prompt that begin with a teacher prefix."""
    return config.rollout.guided_per_prompt if method.guided else 0


def sequences_per_step(config: RunConfig, method: Method) -> int:
    """Count the sequences of one training step, over all ranks."""
    return config.train.prompts_per_step * (config.rollout.samples_per_prompt + guided_per_prompt(config, method))


def check_sequences(config: RunConfig, method: Method) -> None:
    """Raise ConfigError when the method leaves nothing to train on."""
    name, rollout = config.method.name, config.rollout
    sequences = sequences_per_step(config, method)
    if sequences == 0:
        raise ConfigError(
            f"method.name={name} is not guided, so rollout.guided_per_prompt={rollout.guided_per_prompt} does not "
            "count, and rollout.samples_per_prompt=0: nothing would be sampled. Raise rollout.samples_per_prompt."
        )
    learns = method.distills or method.reward is not NONE or method.reference is not NONE
    if not learns and rollout.guided_per_prompt == 0:
        raise ConfigError(
            f"method.name={name} learns from the teacher's responses alone, but rollout.guided_per_prompt=0 asks for "
            "none. Set rollout.guided_per_prompt=1."
        )
    if config.train.minibatches > sequences:
        raise ConfigError(
            f"train.minibatches={config.train.minibatches} is more than the {sequences} sequences of a step. "
            "Lower it, or raise train.prompts_per_step."
        )


def check_one_teacher(config: RunConfig, method: Method) -> None:
    """Raise ConfigError for several teachers of an engine that can only be alone, or where the loss multiplies by the
    output weight of one."""
    if config.teachers and not scoring_engine(config.teacher).among_several:
        able = ", ".join(name for name, engine in TEACHER_ENGINES.items() if engine.among_several)
        raise ConfigError(
            f"teacher.engine={config.teacher.engine} is for runs with one teacher, and teachers holds "
            f"{len(config.teachers)} more. Set it to {able}."
        )
    if config.teachers and method.needs.hidden_states:
        raise ConfigError(
            f"method.name={config.method.name} compares full vocabularies with the hidden states of one teacher, but "
            f"teachers holds {len(config.teachers)} more. Take them out, or use a method that needs log-probs or "
            "for top-k candidates."
        )


def _check_teachers(config: RunConfig, architectures: Mapping[str, Architecture]) -> None:
    for i, one in enumerate(config.teachers):
        try:
            check_divisible(architectures[one.name], one.parallel)
        except ConfigError as error:
            raise ConfigError(f"teachers[{i}].parallel: {error}") from None


def check_writable(config: RunConfig) -> None:
    """Make the directories a run writes to; ConfigError when one cannot be made or written."""
    for key, path in (
        ("run_dir", config.run_dir),
        ("rollout.record", config.rollout.record),
        ("teacher.record", config.teacher.record),
        *((key, path.parent) for key, path in exports_of(config.export).items()),
    ):
        if path is None:
            continue
        try:
            path.mkdir(parents=True, exist_ok=True)
            sync_directory(path.parent)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError("no permission to write")
        except OSError as error:
            raise ConfigError(
                f"{key}: cannot write to {path.absolute()} ({why_not_written(error)}). Name another directory."
            ) from error


def check_export(config: RunConfig) -> None:
    """Raise ConfigError when an export would replace what the run reads or writes, or what is somebody else's."""
    if not exports_of(config.export):
        return
    protected: dict[str, Path | None] = {
        "run_dir": config.run_dir,
        "the current directory": Path(),
        "student.model": config.student.model,
        "student.lora.path": config.student.lora_path,
        "teacher.model": config.teacher.model,
        **{f"teachers[{i}].model": one.model for i, one in enumerate(config.teachers)},
        "base.model": config.base_model,
        **{f"data.prompts[{i}]": path for i, path in enumerate(config.data.prompts)},
        **{
            f"data.sources[{i}].prompts": path
            for i, source in enumerate(config.data.sources)
            for path in source.prompts
        },
        **{f"evaluate.prompts[{i}]": path for i, path in enumerate(config.evaluate.prompts)},
        "rollout.record": config.rollout.record,
        "rollout.recorded_from": config.rollout.recorded_from,
        "rollout.vllm_server.publish_dir": config.rollout.vllm_server.publish_dir,
        "teacher.record": config.teacher.record,
        "teacher.recorded_from": config.teacher.recorded_from,
        **{f"{name} of the run": config.run_dir / name for name in ("checkpoints", "tensorboard", "publish")},
    }
    given = {name: path for name, path in protected.items() if path is not None}
    for key, target in exports_of(config.export).items():
        others = {name: path for name, path in exports_of(config.export).items() if name != key}
        check_target(target, name=key, protected=given | others)


# --------------------------------------------------------------------------- models and tokenizers


def read_architectures(config: RunConfig) -> tuple[Architecture, Architecture]:
    """Read the sizes of student and teacher; CheckpointError that says whose ``config.json`` cannot be used."""
    return (
        read_architecture("student.model", config.student.source),
        read_architecture("teacher.model", config.teacher.source),
    )


def read_architecture(key: str, source: ModelSource) -> Architecture:
    """Read the sizes of the model that ``key`` names; CheckpointError that says so."""
    try:
        return source_architecture(source)
    except CheckpointError as error:
        raise CheckpointError(f"{key} = '{source.weights}': {error}") from error


def check_layouts(
    config: RunConfig, student: Architecture, teacher: Architecture, base: Architecture | None = None
) -> None:
    """Raise ConfigError when a model cannot be cut the way its section requests."""
    sampler = Layout(tensor=config.rollout.parallel.tensor)
    requested = [
        ("student.parallel", student, config.student.parallel),
        ("teacher.parallel", teacher, config.teacher.parallel),
        ("rollout.parallel", student, sampler),
    ]
    if base is not None:
        requested.append(("base.parallel", base, config.base_parallel))
    if suites_of(config) and config.evaluate.teacher:
        requested.append(("rollout.parallel (evaluating the teacher)", teacher, sampler))
    for key, architecture, layout in requested:
        try:
            check_divisible(architecture, layout)
            if key == "student.parallel":
                check_trainable(architecture, layout)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
    if config.student.router_aux_loss and not student.num_experts:
        raise ConfigError(
            f"student.router_aux_loss={config.student.router_aux_loss}, but the student has no experts. Set it to 0."
        )


def longest_sequence(config: RunConfig) -> int:
    """Count the tokens of the longest sequence that training or evaluation may require of the student."""
    budgets = [config.rollout.max_new_tokens, *(suite.max_new_tokens or 0 for suite in suites_of(config))]
    return config.data.max_prompt_tokens + max(budgets)


def longest_training_sequence(config: RunConfig) -> int:
    """Count the tokens of the longest sequence that the teacher may have to score."""
    return config.data.longest_teacher_prompt + config.rollout.max_new_tokens


def most_alternatives(config: RunConfig, method: Method, teacher: Architecture) -> int:
    """Return how many alternatives of a token may be requested of a vLLM teacher."""
    return teacher.vocab_size if config.teacher.whole_vocabulary else TeacherRequest.of(method.needs).top_k


def check_own_prompts(config: RunConfig, inputs: Inputs) -> None:
    """Raise ConfigError where the student would be compared with itself; say of how many prompts the teacher reads
    others than the student.
    """
    rows, own = len(inputs.prompts), len(inputs.prompts.with_own_teacher_prompt())
    if config.teacher.update == "live" and not own:
        raise ConfigError(
            "teacher.update=live compares the student with itself, and there is nothing to learn while both read the "
            "same prompts. Give the teacher prompts of its own (data.teacher_template, data.teacher_system or "
            "data.columns.teacher_prompt), or set teacher.update to ema or frozen."
        )
    if config.data.own_teacher_prompts and not (dist.is_initialized() and dist.get_rank()):
        say(f"the teacher reads prompts of its own: {own:,} of {rows:,} differ from the student's")


def _check_answers(config: RunConfig, inputs: Inputs) -> None:
    check_answers(config, inputs.method, inputs.prompts)


def check_support(inputs: Inputs) -> None:
    """Raise ConfigError when the method requests more candidates than there are ids."""
    if inputs.method.needs.top_k > inputs.vocab_size:
        raise ConfigError(
            f"method.k={inputs.method.needs.top_k} candidates per token, but the models share {inputs.vocab_size} ids. "
            "Lower method.k."
        )


def check_sampling(config: RunConfig, inputs: Inputs) -> None:
    """Raise ConfigError when vLLM could not say what the model itself thinks of what it drew."""
    check_logprobs(
        config.rollout,
        shared_ids=inputs.vocab_size,
        student_ids=inputs.student.vocab_size,
        teacher_ids=inputs.teacher.vocab_size,
    )


def teacher_request(config: RunConfig, method: Method) -> TeacherRequest:
    """Return what is requested of the teacher, which is what its engine can report."""
    spec = TeacherRequest.of(method.needs)
    if scoring_engine(config.teacher).exact_distribution or config.teacher.whole_vocabulary:
        return spec
    return replace(spec, entropy=False, entropy_bound=spec.top_k > 0)


def check_teacher(config: RunConfig, inputs: Inputs) -> None:
    """Raise ConfigError when vLLM cannot report of the teacher what the method needs."""
    check_reported(config.teacher, inputs.method, shared_ids=inputs.vocab_size, teacher_ids=inputs.teacher.vocab_size)


# --------------------------------------------------------------------------- data


def check_data_ids(inputs: Inputs, models: Mapping[str, Architecture]) -> None:
    """Raise TokenizerError when prompts or problems hold ids that one of the models has no embedding for."""
    sizes = {role: model.vocab_size for role, model in models.items()}
    rows = {"prompt": [inputs.prompts], "problem": inputs.problems.values()}
    check_ids(rows, inputs.tokenizer, vocab_sizes=sizes)


def check_data_lengths(config: RunConfig, inputs: Inputs, models: Mapping[str, Architecture]) -> None:
    """Raise ConfigError when a sequence of training, or an answer to a problem, can exceed a model's positions."""
    check_training_lengths(config, inputs.prompts, models)
    answering = {"student": inputs.student} | ({"teacher": inputs.teacher} if config.evaluate.teacher else {})
    check_problem_lengths(suites_of(config), inputs.problems, answering)


def warn_of_few_prompts(config: RunConfig, inputs: Inputs) -> None:
    """Say when a step asks prompts more than once."""
    wanted, there = config.train.prompts_per_step, len(inputs.prompts)
    if wanted > there:
        logger.warning(
            "train.prompts_per_step=%d is more than the %d prompts there are: every step asks each of them %.3g times. "
            "Give more prompts, or lower it.",
            *(wanted, there, wanted / there),
        )


def check_recording(config: RunConfig) -> None:
    """Raise DataError when a recording of rollouts lacks a step of the run."""
    if config.rollout.recorded_from is not None:
        check_recorded(config.rollout.recorded_from, range(config.train.steps))


# --------------------------------------------------------------------------- all of them


def check_templates(config: RunConfig, inputs: Inputs) -> None:
    """Say where teachers write conversations otherwise than the student, and which options no template reads."""
    warn_of_unread_options(config, inputs.tokenizer)
    warn_of_differences(config, inputs.tokenizer)


CHECKS = (
    Check("attention kernels", ("config",), check_available),
    Check("engines and packages", ("config",), check_packages),
    Check("learning from rollouts of older weights", ("config", "method"), check_ahead),
    Check("draws of the sampler", ("config", "method"), warn_of_biased_sampling),
    Check("checkpoints of Megatron", ("config",), check_checkpoints),
    Check("weights of tokens", ("config", "method"), check_multiplier),
    Check("sequences of a step", ("config", "method"), check_sequences),
    Check("rewards", ("config", "method"), check_rewards),
    Check("recorded rollouts", ("config",), check_recording),
    Check("several teachers", ("config", "method"), check_one_teacher),
    Check("layouts", ("config", "student", "teacher", "base"), check_layouts),
    Check("adapters of the student", ("config", "student"), check_adapters),
    Check("layouts of more teachers", ("config", "teachers"), _check_teachers),
    Check("candidates per token", ("inputs",), check_support),
    Check("prompts of the teacher's own", ("config", "inputs"), check_own_prompts),
    Check("answers to reward", ("config", "inputs"), _check_answers),
    Check("log-probs of the sampler", ("config", "inputs"), check_sampling),
    Check("scores of the teacher", ("config", "inputs"), check_teacher),
    Check("token ids of the data", ("inputs", "models"), check_data_ids),
    Check("lengths of the data", ("config", "inputs", "models"), check_data_lengths),
    Check("prompts of a step", ("config", "inputs"), warn_of_few_prompts),
    Check("chat templates", ("config", "inputs"), check_templates),
)


# --------------------------------------------------------------------------- what a resumed run must share


def identity(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """Return what shapes the numbers of a run, by config key: a checkpoint with other values is of another run.

    Models and tokenizer are in it twice: by their sizes, and by fingerprints of their content (``FINGERPRINTS``).
    Layouts, packing, where things are kept, evaluation and reporting are not in it: they may change when a run resumes.
    """
    optimizer = config.optimizer.model_dump(exclude={"offload", "overlap"})
    return {
        "seed": config.seed,
        "dtype": config.dtype,
        "student.model": asdict(inputs.student),
        "student.router_aux_loss": config.student.router_aux_loss,
        "teacher.model": asdict(inputs.teacher),
        **_movement(config),
        **{f"teachers.{name}": asdict(architecture) for name, architecture in inputs.teachers.items()},
        **({} if inputs.base is None else {"base.model": asdict(inputs.base)}),
        **adapter_identity(config, inputs.student),
        **_fingerprints(config, inputs),
        **data_identity(config.data, inputs.prompts),
        # what end_tokens requests is in the ends themselves
        **{f"method.{key}": value for key, value in config.method.model_dump().items() if key != "end_tokens"},
        **({"method.end_ids": list(inputs.method.end_ids)} if inputs.method.end_ids else {}),
        **_reward(config, inputs.method),
        **{
            f"rollout.{key}": getattr(config.rollout, key)
            for key in (
                *("samples_per_prompt", "guided_per_prompt", "max_new_tokens"),
                *("temperature", "top_p", "top_k", "ahead"),
            )
        },
        **{f"train.{key}": getattr(config.train, key) for key in ("steps", "prompts_per_step", "minibatches")},
        **{f"optimizer.{key}": value for key, value in optimizer.items()},
    }


def _movement(config: RunConfig) -> dict[str, Any]:
    """Say how the teacher's weights follow the student's; nothing where they do not, as before that could be."""
    section = config.teacher
    if not section.moves:
        return {}
    rates = {"teacher.ema_decay": section.ema_decay, "teacher.ema_every": section.ema_every}
    return {"teacher.update": section.update, **(rates if section.update == "ema" else {})}


def _reward(config: RunConfig, method: Method) -> dict[str, Any]:
    """Say what answers are rewarded by; nothing where the method looks at no rewards, as before that could be."""
    if not method.needs.reward:
        return {}
    function = reward_function(config.reward.function)
    rewards = {"reward.advantage": config.reward.advantage, "reward.function": None}
    if function is None:
        return rewards
    return rewards | {
        "reward.function": function.written.rpartition(":")[2],
        "reward.function.program": function.fingerprint,
    }


# how the keys end that stand for content, which checkpoints of earlier versions do not have
FINGERPRINTS = (".weights", ".vocabulary", ".chat_template", ".end_tokens", ".program")


def _fingerprints(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    models = {"student": config.student.source, "teacher": config.teacher.source}
    models |= {f"teachers.{one.name}": one.source for one in config.teachers}
    models |= {} if inputs.base is None else {"base": config.base_source}
    found: dict[ModelSource, str | None] = {source: source_fingerprint(source) for source in set(models.values())}
    template = inputs.tokenizer.chat_template if isinstance(inputs.tokenizer, HuggingFaceTokenizer) else None
    settings = [config.data.chat_template and template, config.data.template_options]
    return {
        **{f"{role}.weights": found[source] for role, source in models.items()},
        "tokenizer.vocabulary": inputs.tokenizer.fingerprint(),
        "tokenizer.chat_template": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "tokenizer.end_tokens": list(inputs.tokenizer.eos_ids),
    }
