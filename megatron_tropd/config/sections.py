"""The sections of a run's configuration, each a frozen pydantic model. Public names are re-exported by ``config``.

Rules inside one section are checked here; rules between sections by ``config.RunConfig``. The ``description`` of a key
is its reference documentation: ``config.config_reference`` prints it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from megatron_tropd.errors import ConfigError
from megatron_tropd.types import ModelSource


def _not_bool(value: object) -> object:
    # YAML's `true` would otherwise pass for the number 1
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _path(value: object) -> object:
    if value == "":
        raise ValueError("must not be empty")
    try:
        return Path(value).expanduser() if isinstance(value, str) else value
    except RuntimeError:  # pathlib's answer to ~name without such a user
        raise ValueError("names a home directory that does not exist") from None


def _paths(value: object) -> object:
    """Make a list of one of a single path, an empty one of null."""
    if value is None:
        return ()
    return tuple(_path(item) for item in value) if isinstance(value, list | tuple) else (_path(value),)


def _bool_to_project(value: object) -> object:
    return {True: "megatron_tropd", False: None}[value] if isinstance(value, bool) else value


def _off(value: object) -> object:
    """Take YAML's reading of a bare ``off``, false, for the word."""
    return "off" if value is False else value


Project = Annotated[str | None, BeforeValidator(_bool_to_project)]
Whole = Annotated[int, BeforeValidator(_not_bool)]
Real = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
UserPath = Annotated[Path, BeforeValidator(_path)]
UserPaths = Annotated[tuple[Path, ...], BeforeValidator(_paths)]  # a path, a glob, a directory, or a list of them
Dtype = Literal["fp32", "bf16"]
Device = Literal["auto", "cuda", "cpu"]
Grader = Literal["final_number", "exact", "math", "choice", "regex", "code"]
CodeExecution = bool | Literal["unconfined"]  # may programs of a model be run; also where nothing confines them
RolloutEngine = Literal["megatron", "vllm", "vllm_server", "recorded"]
TeacherEngine = Literal["megatron", "vllm", "vllm_server"]
MegatronLayout = Literal["megatron-lm", "bridge"]


def key(default: Any, meaning: str, **bounds: Any) -> Any:
    """Declare an optional key: its default, its line in the reference and pydantic's bounds (``ge``, ``lt``, ...)."""
    return Field(default=default, description=meaning, **bounds)


def chosen(default: Any, meaning: str, **bounds: Any) -> Any:
    """Declare a key that is chosen for the models and ranks at hand where it is ``auto`` or left out.

    ``default``: its value until somebody has chosen.
    """
    return Field(default=default, description=meaning, json_schema_extra={"chosen": AUTO}, **bounds)


AUTO = "auto"
FITTED_LATER = "fitted later"  # context of a validation, after which ``auto`` becomes numbers


def is_chosen(field: FieldInfo) -> bool:
    """Say whether a key was declared by :func:`chosen`."""
    return isinstance(field.json_schema_extra, dict) and "chosen" in field.json_schema_extra


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _auto_is_left_out(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        open_keys = {name for name, field in cls.model_fields.items() if is_chosen(field) and data.get(name) == AUTO}
        return {name: value for name, value in data.items() if name not in open_keys}


MODEL = (
    "a Hugging Face directory, a name on the hub (`Qwen/Qwen3-8B`, `Qwen/Qwen3-8B@revision`), or a checkpoint of "
    "Megatron-LM, Megatron-Bridge, NeMo 2 or of a run"
)
LIKE = (
    "With a checkpoint of Megatron as `model`: the Hugging Face directory with its config.json and tokenizer; null: "
    "the checkpoint's own (`hf/` or `tokenizer/` in it)."
)


class Layout(Section):
    """The layout of one model over the ranks. Data parallelism is what is left of the world."""

    tensor: Whole = key(1, "Tensor-parallel ranks: each holds a slice of every matrix.", ge=1)
    pipeline: Whole = key(1, "Pipeline stages: each holds a run of consecutive layers.", ge=1)
    virtual_pipeline: Whole = key(1, "Model chunks per pipeline stage (interleaved schedule).", ge=1)
    context: Whole = key(1, "Context-parallel ranks: each holds a slice of every sequence.", ge=1)
    expert: Whole = key(
        1, "Expert-parallel ranks among the data- and context-parallel ones: each holds some experts.", ge=1
    )
    sequence: bool = key(False, "Sequence parallelism: split activations between tensor-parallel regions.")

    @model_validator(mode="after")
    def _axes_fit_each_other(self) -> Self:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline = {self.virtual_pipeline} needs pipeline > 1, got pipeline = 1. "
                "Set virtual_pipeline to 1, or pipeline to 2 or more."
            )
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "sequence = true needs tensor > 1, got tensor = 1. Set sequence to false, or tensor to 2 or more."
            )
        return self

    @property
    def model_ranks(self) -> int:
        """Return the number of ranks that together hold one copy of the model: tensor * pipeline * context."""
        return self.tensor * self.pipeline * self.context

    @property
    def smallest_world(self) -> int:
        """Return the fewest ranks this layout runs on: experts are sharded over the data- and context-parallel
        ranks.
        """
        return self.tensor * self.pipeline * math.lcm(self.context, self.expert)

    def data_size(self, world_size: int) -> int:
        """Return the number of data-parallel replicas. Raises ConfigError when the axes do not divide
        ``world_size``.
        """
        if world_size % self.model_ranks:
            raise ConfigError(
                f"world size {world_size} is not a multiple of tensor*pipeline*context = "
                f"{self.tensor}*{self.pipeline}*{self.context} = {self.model_ranks}. "
                f"Launch {self.model_ranks} ranks (or a multiple), as in `torchrun --nproc-per-node {self.model_ranks} "
                "-m megatron_tropd ...`, or lower one axis."
            )
        data = world_size // self.model_ranks
        if data * self.context % self.expert:
            raise ConfigError(
                f"expert = {self.expert} does not divide data*context = {data}*{self.context} = {data * self.context}, "
                f"over whose ranks experts are sharded. Launch {self.smallest_world} ranks (or a multiple), or lower "
                "expert."
            )
        return data

    def rank_at(self, *, replica: int, replicas: int, stage: int, tensor: int = 0, context: int = 0) -> int:
        """Return the rank at the given coordinates of a world that holds so many replicas."""
        return ((stage * replicas + replica) * self.context + context) * self.tensor + tensor


LAYOUT = (
    "Its layout; `auto` takes, of those that divide the ranks, its heads and its layers, the fastest that the memory "
    "is estimated to hold (docs/scaling.md)."
)


class NamedTeacherConfig(Section):
    """A teacher in addition to `teacher`, for the data sources that name it. Never trained."""

    name: str = Field(min_length=1, description="Name of the teacher, which `data.sources[i].teacher` gives.")
    model: UserPath = Field(description=f"With the student's vocabulary: {MODEL}.")
    like: UserPath | None = key(None, LIKE)
    parallel: Layout = chosen(Layout(), LAYOUT)

    @property
    def source(self) -> ModelSource:
        """Return where its weights come from, and its config and tokenizer."""
        return ModelSource(self.model, self.like)


class BaseConfig(Section):
    """A third model, which only methods need that measure the teacher against one (`exopd`). Never trained."""

    model: UserPath | None = key(
        None,
        f"Base model of `exopd`, such as what the teacher was trained from: {MODEL}; null: "
        "the student's own weights before training. Without base.parallel it is laid out as the student where it is "
        "the student's, else as the teacher.",
    )
    like: UserPath | None = key(None, LIKE)
    parallel: Layout | None = None

    @model_validator(mode="after")
    def _like_is_for_a_model_of_its_own(self) -> Self:
        if self.like is not None and self.model is None:
            raise ValueError(
                f"like = '{self.like}' belongs to base.model, which is null. Give the model, or take it out."
            )
        return self


class LoraConfig(Section):
    """Low-rank adapters beside the student's frozen weights, which alone are trained (docs/adapters.md)."""

    rank: Whole | None = key(None, "Columns of B and rows of A; null: 16, or what `path` has.", ge=1)
    alpha: Real | None = key(None, "The update is alpha / rank * B A; null: twice the rank, or what `path` has.", gt=0)
    dropout: Real = key(0.0, "Share of an adapter's inputs that is dropped while it is trained.", ge=0, lt=1)
    targets: tuple[str, ...] | None = key(
        None,
        "Matrices of every layer that get an adapter, a list such as `[q_proj, v_proj]`; null: those of attention and "
        "MLP (of a mixture of experts those of attention), or what `path` has.",
    )
    path: UserPath | None = key(
        None, "Directory of an adapter of `peft` to start from, for `student.model`; null starts from none."
    )
    dora: bool = key(False, "Weight-decomposed adapters (DoRA): refused with what is missing for them.")

    @model_validator(mode="after")
    def _is_lora(self) -> Self:
        if self.dora:
            raise ValueError(
                "dora = true is not supported: the norm of every row of the merged weights would have to be taken anew "
                "in each pass, over tensor ranks where they cut its columns. Set it to false, for LoRA."
            )
        if self.targets is not None and len(set(self.targets)) < max(len(self.targets), 1):
            raise ValueError(
                f"targets = {list(self.targets)} names {'a matrix twice' if self.targets else 'no matrix'}. "
                "Name each one once, or leave it out for all."
            )
        return self


class StudentConfig(Section):
    """The model that writes and learns."""

    model: UserPath = Field(description=f"Student: {MODEL}.")
    like: UserPath | None = key(None, LIKE)
    lora: LoraConfig | None = None
    parallel: Layout = chosen(Layout(), LAYOUT)
    recompute: Literal["none", "selective", "full"] = key(
        "none", "Activations computed again in backward instead of kept: nothing, attention, whole layers."
    )
    attention: Literal["auto", "sdpa", "te"] = key(
        "auto", "Attention kernels: `te` (Transformer Engine), `sdpa` (ours), `auto` picks by device."
    )
    layers: Literal["local", "te"] = key(
        "local", "Layers: Megatron's own, or `te` (Transformer Engine), which is refused with what is missing for it."
    )
    fp8: Literal["none", "tensorwise", "blockwise", "mxfp8"] = key(
        "none", "Recipe of products in FP8, which needs Transformer Engine's layers: refused like them."
    )
    router_aux_loss: Real = key(
        0.0,
        "Coefficient of the load-balancing loss of a mixture of experts, a mean over response tokens; 0 is none.",
        ge=0,
    )

    @property
    def source(self) -> ModelSource:
        """Return where its weights come from, and its config and tokenizer."""
        return ModelSource(self.model, self.like)

    @property
    def lora_path(self) -> Path | None:
        """Return the adapter that its own start from, if there is one."""
        return None if self.lora is None else self.lora.path


class ColumnsConfig(Section):
    """Which column of a data row holds what; `a.b` is the field `b` of the column `a`."""

    prompt: str = key("prompt", "Column with the prompt, as text or as a list of chat messages.", min_length=1)
    messages: str = key("messages", "Column with chat messages, read where a row has no prompt column.", min_length=1)
    response: str = key("response", "Column with one teacher response, for guidance.", min_length=1)
    answer: str = key("answer", "Column with the reference answer, for grading.", min_length=1)
    tools: str = key("tools", "Column with the tools that the chat template writes, a list or its JSON.", min_length=1)
    teacher_prompt: str | None = key(
        None,
        "Column with the prompt that the teacher reads in place of the student's, as text or chat messages; null: no. "
        "Of a row without it the teacher reads the student's, which is counted.",
        min_length=1,
    )

    @property
    def finished(self) -> str:
        """Name the column that says whether the response ended by itself."""
        return self._beside("finished")

    @property
    def generated(self) -> str:
        """Name the column with what ``tropd generate`` keeps beside the response."""
        return self._beside("generated")

    def _beside(self, what: str) -> str:
        return what if self.response == "response" else f"{self.response}_{what}"


class CodeConfig(Section):
    """Settings of the grader `code` besides the tests."""

    entry_point: str | None = key(
        None, "Column with the name of the tested function, for tests that define `check(candidate)` (HumanEval)."
    )
    prelude: str | None = key(
        None,
        "Column with code to run before an answer's own: imports, or the signature that a base model continues.",
    )
    blocks: Literal["definitions", "last", "first", "all", "response"] = key(
        "definitions",
        "Which blocks of an answer are its program: those that define what the tests use, the last, the first, all; or "
        "the whole response as it stands.",
    )


def _pattern(value: object) -> object:
    try:
        re.compile(str(value or ""))
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    return value


Pattern = Annotated[str | None, BeforeValidator(_pattern)]


class SourceConfig(Section):
    """One of several sources of prompts."""

    name: str = Field(min_length=1, description="Name of the source: in metrics, and of what a prompt remembers.")
    prompts: UserPaths = Field(description="Its files, as `data.prompts`.")
    weight: Real | None = key(
        None,
        "Its share of the prompts, relative to the others'; null, for all or none: the number of its prompts.",
        gt=0,
    )
    columns: ColumnsConfig | None = key(None, "Columns, where they differ from data.columns.")
    template: str | None = key(None, "Jinja over the row's columns that makes the prompt; null takes data.template.")
    answer_template: str | None = key(None, "The same for the reference answer; null takes data.answer_template.")
    system: str | None = key(None, "System message; null takes data.system.")
    teacher_template: str | None = key(None, "The same for the teacher's own prompt; null takes data.teacher_template.")
    teacher_system: str | None = key(None, "The teacher's own system message; null takes data.teacher_system.")
    grader: Grader | None = key(None, "Rule that grades its responses; null takes data.grader.")
    extract: Pattern = key(None, "Regular expression, as of a suite; null takes data.extract.")
    code: CodeConfig | None = key(None, "For the grader `code`; null takes data.code.")
    teacher: str | None = key(None, "Name of the one of `teachers` that scores its sequences; null is `teacher`.")


class DataConfig(Section):
    """The prompts to train on: `data.prompts`, or several `data.sources` that are mixed."""

    prompts: UserPaths = key(
        (),
        "Files of prompts (JSONL, Parquet, Arrow): a path, a glob, a directory, a data set on the hub "
        "(`openai/gsm8k:main:train`), or a list of them.",
    )
    sources: tuple[SourceConfig, ...] = key((), "Several sources instead of `prompts`, mixed by weight; a list.")
    shuffle: bool = key(True, "Visit prompts in an order of its own in every epoch; false: in file order.")
    columns: ColumnsConfig = ColumnsConfig()
    template: str | None = key(
        None, "Jinja over the row's columns that makes the prompt, such as `{{ prompt }} Answer:`; null: as it stands."
    )
    answer_template: str | None = key(None, "Jinja that makes the reference answer; null: the answer column.")
    system: str | None = key(None, "System message of every conversation without one; needs a chat template.")
    teacher_template: str | None = key(
        None,
        "Jinja over the row's columns that makes a prompt of the teacher's own, behind which it scores the student's "
        "responses; `{{ prompt }}` is the student's. Null: it reads what the student reads.",
    )
    teacher_system: str | None = key(
        None, "System message of the teacher's own prompt, in place of any other; needs a chat template."
    )
    chat_template: bool = key(
        True, "Wrap prompts in the tokenizer's chat template where it has one; false: plain text."
    )
    template_options: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the chat template, such as `{enable_thinking: false}`."
    )
    responses: Literal["auto", "required", "none"] = key(
        "auto",
        "The teacher's responses, of which a guided method starts some sequences with the first tokens. `auto`: those "
        "in the data; where it has none, the teacher writes them when a run starts, once, into RUN/responses. "
        "`required`: those in the data, or an error. `none`: no sequence is guided.",
    )
    max_prompt_tokens: Whole = chosen(
        1024,
        "Longest prompt, in tokens; longer rows are left out and counted. `auto`: 1024, or half of the models' "
        "positions where that is less, or what rollout.max_new_tokens leaves of them.",
        ge=1,
    )
    max_response_tokens: Whole | None = key(
        None, "Longest response in the data, in tokens; longer rows are left out and counted. null: any.", ge=1
    )
    max_teacher_prompt_tokens: Whole | None = key(
        None,
        "Longest prompt of the teacher's own, in tokens; longer rows are left out, counted. null: max_prompt_tokens.",
        ge=1,
    )
    on_bad_row: Literal["error", "skip"] = key("error", "Stop at a bad row, or skip and count it.")
    cache_dir: UserPath | None = key(
        None,
        "Directory for tokenized rows, which one process of a host makes and all map into memory; null: "
        "`$MEGATRON_TROPD_CACHE`, or `megatron_tropd` in `$XDG_CACHE_HOME` or `~/.cache`.",
    )
    max_left_out: Real = key(
        0.9,
        "Largest share of a source's rows that may be left out, bad or too long; more is an error. 1: any number.",
        ge=0,
        le=1,
    )
    grader: Grader = key("final_number", "Rule that grades a response against the reference answer.")
    extract: Pattern = key(
        None, "Regular expression; its last match in a response (the first group that took part) is graded."
    )
    code: CodeConfig = CodeConfig()

    @model_validator(mode="after")
    def _one_way_of_naming_the_data(self) -> Self:
        if bool(self.prompts) == bool(self.sources):
            both = "both are set" if self.prompts else "neither is set"
            raise ValueError(f"prompts or sources names the data to train on: {both}. Set exactly one of them.")
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources holds {names.count(name)} sources named {name!r}. Give each its own name.")
        if self.max_teacher_prompt_tokens is not None and not self.own_teacher_prompts:
            raise ValueError(
                f"max_teacher_prompt_tokens = {self.max_teacher_prompt_tokens}, but the teacher has no prompts of its "
                "own. Set teacher_template, teacher_system or columns.teacher_prompt, or take it out."
            )
        weighed = [source.weight is not None for source in self.sources]
        if any(weighed) and not all(weighed):
            bare = names[weighed.index(False)]
            raise ValueError(f"sources gives a weight to some, but not to {bare!r}. Weigh all of them, or none.")
        return self

    @property
    def own_teacher_prompts(self) -> bool:
        """Say whether some prompts are other ones for the teacher than for the student."""
        makers = [self.teacher_template, self.teacher_system, self.columns.teacher_prompt]
        for source in self.sources:
            columns = source.columns or self.columns
            makers += [source.teacher_template, source.teacher_system, columns.teacher_prompt]
        return any(maker is not None for maker in makers)

    @property
    def longest_teacher_prompt(self) -> int:
        """Return the most tokens of a prompt that the teacher reads."""
        own = self.max_teacher_prompt_tokens or self.max_prompt_tokens
        return max(self.max_prompt_tokens, own) if self.own_teacher_prompts else self.max_prompt_tokens


class RolloutParallelConfig(Section):
    """The layout of the sampler's own copy of the student."""

    tensor: Whole = chosen(
        1,
        "Tensor-parallel ranks of the sampler. `auto`: as few as leave three quarters of a rank's memory to others.",
        ge=1,
    )


class VLLMConfig(Section):
    """Settings of a vLLM engine: in the trainer's processes, or by `tropd serve`."""

    max_sequences: Whole = key(256, "Sequences worked on at a time.", ge=1)
    memory_fraction: Real = key(0.4, "Share of the GPU's memory for its weights and cache.", gt=0, lt=1)
    cache_mib: Whole | None = key(
        None, "Key-value cache in MiB, instead of what memory_fraction leaves; null is 1024 without a GPU.", ge=1
    )
    sleep: bool = key(True, "In process, on GPU: leave the memory to the trainer while nothing is sampled.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="More arguments of vLLM's `LLM`, or of its server, by their Python names."
    )

    @model_validator(mode="after")
    def _leaves_ours_alone(self) -> Self:
        for name, fix in _VLLM_OURS.items():
            if name in self.options:
                raise ValueError(f"options.{name} is set by this program. {fix}")
        return self


# arguments of vLLM that other keys decide, or that must be as they are
_VLLM_OURS = {
    "model": "Use student.model or teacher.model.",
    "dtype": "Use dtype.",
    "seed": "Use seed.",
    "tensor_parallel_size": "Use rollout.parallel.tensor or teacher.parallel.tensor.",
    "max_model_len": "It follows from data.max_prompt_tokens and rollout.max_new_tokens.",
    "max_num_seqs": "Use max_sequences.",
    "gpu_memory_utilization": "Use memory_fraction.",
    "kv_cache_memory_bytes": "Use cache_mib.",
    "enable_sleep_mode": "Use sleep.",
    "trust_remote_code": "Code of a checkpoint is never run.",
    **dict.fromkeys(
        ("load_format", "skip_tokenizer_init", "generation_config", "logprobs_mode", "max_logprobs"),
        "Other values would give wrong tokens or log-probs.",
    ),
}


class ServersConfig(Section):
    """vLLM servers, each started by `tropd serve`, and the limits of requests to them."""

    urls: tuple[str, ...] = key((), "Addresses, a list, such as `[http://127.0.0.1:8100]`.")
    key_variable: str = key(
        "TROPD_API_KEY",
        "Environment variable with the servers' API key; when it is not set no key is used.",
        min_length=1,
    )
    tensor: Whole = key(1, "Tensor-parallel workers of each server.", ge=1)
    requests: Whole = key(256, "Requests under way per server; others wait in the trainer.", ge=1)
    timeout_s: Real = key(1800.0, "Longest time for one answer; a server that takes longer is left out.", gt=0)
    heartbeat_s: Real = key(30.0, "Longest time for a sign of life.", gt=0)
    attempts: Whole = key(5, "Wrong answers to one request before the run ends.", ge=1)
    patience_s: Real = key(600.0, "Longest time without any server before the run ends.", gt=0)

    @model_validator(mode="after")
    def _addresses_are_plain(self) -> Self:
        for url in self.urls:
            parts = urlsplit(url)
            # a name or password in it would be another key, a path or query is ours to add
            plain = not (parts.username or parts.password or parts.path.strip("/") or parts.query or parts.fragment)
            if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
                raise ValueError(f"urls holds {url!r}: give scheme, host and port alone, as in http://127.0.0.1:8100.")
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError("urls names a server twice. List each one once.")
        return self


class TeacherConfig(Section):
    """The model that scores. Never trained."""

    model: UserPath = Field(
        description=f"Teacher: {MODEL}. `student`: the student itself (a directory of that name has a `/` in its path)."
    )
    like: UserPath | None = key(None, LIKE)
    update: Literal["frozen", "live", "ema"] = key(
        "frozen",
        "Of a student that is its own teacher: the weights it starts from (`frozen`), its present ones at every step "
        "(`live`), or their moving average (`ema`).",
    )
    ema_decay: Real = key(0.99, "update=ema: average = decay * average + (1 - decay) * student, in fp32.", gt=0, lt=1)
    ema_every: Whole = key(1, "update=ema: steps between updates of the average.", ge=1)
    engine: TeacherEngine = key(
        "megatron", "Who runs it: Megatron or vLLM in the trainer's processes, or vLLM servers (`tropd serve teacher`)."
    )
    chat_template: Literal["student", "own"] = key(
        "student",
        "Under whose chat template the teacher scores, and answers in `tropd generate CONFIG`: the "
        "student's, so that it sees the very prompts the student sees, or its `own` (`tropd generate` alone so far). "
        "It is always evaluated under its own template and end tokens.",
    )
    parallel: Layout = chosen(Layout(), LAYOUT)
    ranks: Whole = key(
        0,
        "Ranks that are the teacher's alone: the last ones of the launch, the others are the student's. 0: the teacher "
        "shares the student's. With rollout.ahead it scores a batch while the student learns from an earlier one.",
        ge=0,
    )
    attention: Literal["auto", "sdpa", "te"] = key(
        "auto", "Attention kernels: `te` (Transformer Engine), `sdpa` (ours), `auto` picks by device."
    )
    whole_vocabulary: bool = key(
        False,
        "With vLLM: report the log-probs of all ids, not only the likeliest. For methods that need exact entropies, "
        "ids that the student names, a temperature, or models of different vocabulary sizes; for small vocabularies.",
    )
    offload: bool = key(
        False,
        "Keep the teacher's weights in host memory, pinned on a GPU, and on the device only while it scores; those of "
        "`teachers` and of the base model likewise. A teacher on ranks of its own stays on the device, and vLLM's has "
        "teacher.vllm.sleep.",
    )
    vllm: VLLMConfig = VLLMConfig()
    vllm_server: ServersConfig = ServersConfig()
    record: UserPath | None = key(None, "Directory to record every score in; null records nothing.")
    record_values: Literal["fp16", "fp32"] = key(
        "fp16", "How recorded log-probs are stored: rounded to 16 bits, or as they are, for replays to the last digit."
    )
    recorded_from: UserPath | None = key(
        None, "Directory of recorded scores to use instead of the model, of the same sequences in packs of any kind."
    )

    @property
    def source(self) -> ModelSource:
        """Return where its weights come from, and its config and tokenizer."""
        return ModelSource(self.model, self.like)

    @property
    def moves(self) -> bool:
        """Say whether its weights are the student's, or follow them, as these learn."""
        return self.update != "frozen"

    @model_validator(mode="after")
    def _moves_in_the_trainer_alone(self) -> Self:
        for name in ("ema_decay", "ema_every"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default and self.update != "ema":
                raise ValueError(
                    f"{name} = {value} is not read with update = {self.update}. Leave it out, or set update to ema."
                )
        if not self.moves:
            return self
        frozen: dict[str, Any] = {"engine": "megatron", "ranks": 0, "record": None, "recorded_from": None}
        frozen |= {"offload": False} if self.update == "live" else {}
        for name, wanted in frozen.items():
            value = getattr(self, name)
            if value != wanted:
                raise ValueError(
                    f"{name} = {value!r} does not go with update = {self.update}: weights that move are the trainer's "
                    f"own, on its own ranks, and what they said of a sequence holds for one step. Set {name} to "
                    f"{'null' if wanted is None else wanted}, or update to frozen."
                )
        return self

    @model_validator(mode="after")
    def _records_or_replays(self) -> Self:
        if self.record is not None and self.recorded_from is not None:
            raise ValueError(
                f"record = '{self.record}' has nothing to record while the scores come from recorded_from = "
                f"'{self.recorded_from}'. Set one of the two to null."
            )
        return self

    @model_validator(mode="after")
    def _own_ranks_are_for_a_live_megatron_teacher(self) -> Self:
        if self.ranks and self.engine != "megatron":
            raise ValueError(
                f"ranks = {self.ranks} gives ranks of their own to a teacher that Megatron runs, got engine = "
                f"{self.engine!r}. Set ranks to 0, or engine to megatron."
            )
        if self.ranks:
            try:
                self.parallel.data_size(self.ranks)
            except ConfigError:
                least = self.parallel.smallest_world
                raise ValueError(
                    f"ranks = {self.ranks} cannot be divided as parallel says, which takes {least} or a multiple. "
                    f"Set ranks to {-(-self.ranks // least) * least}, or lower an axis of teacher.parallel."
                ) from None
        if self.ranks and self.recorded_from is not None:
            raise ValueError(
                f"ranks = {self.ranks} would have nothing to do: scores come from recorded_from = "
                f"'{self.recorded_from}'. Set one of the two to its default."
            )
        return self

    @model_validator(mode="after")
    def _engine_has_what_it_needs(self) -> Self:
        if self.engine == "vllm_server" and not self.vllm_server.urls:
            raise ValueError(
                "engine = 'vllm_server' needs vllm_server.urls, addresses of servers started by `tropd serve teacher`."
            )
        if self.engine != "megatron":
            usable = Layout(tensor=self.parallel.tensor if self.engine == "vllm" else 1)
            fix = (
                "vLLM's engines are cut by parallel.tensor alone"
                if self.engine == "vllm"
                else "servers are laid out by vllm_server.tensor"
            )
            for name, value in self.parallel.model_dump().items():
                if value != getattr(usable, name):
                    raise ValueError(
                        f"parallel.{name} = {value} does not go with engine = {self.engine!r}: {fix}. "
                        f"Set it to {getattr(usable, name)!r}."
                    )
            if self.offload:
                raise ValueError(
                    f"offload = true moves the weights of Megatron's teacher, got engine = {self.engine!r}. "
                    "Set it to false; vLLM in process leaves the GPU by itself (vllm.sleep)."
                )
        elif self.whole_vocabulary:
            raise ValueError(
                "whole_vocabulary = true is for engine vllm or vllm_server: Megatron's teacher knows all ids anyway. "
                "Set it to false."
            )
        return self


class StudentServersConfig(ServersConfig):
    """Servers that sample, and how they get new weights."""

    publish: Literal["files", "broadcast"] = key(
        "files", "`files` that servers on this host read, or `broadcast` by NCCL or gloo to servers anywhere."
    )
    publish_dir: UserPath | None = key(
        None,
        "Directory in which a run makes one of its own for those files; null: /dev/shm where there is one, RUN/publish "
        "elsewhere.",
    )
    publish_address: str = key(
        "127.0.0.1", "Address of the first rank's host, as servers reach it, for `broadcast`.", min_length=1
    )
    bucket_mib: Whole = key(256, "Weights sent at a time, in MiB.", ge=1)
    transfer_s: Real = key(
        120.0,
        "Longest time for a bucket to arrive: a server that hangs within a broadcast holds the others so long.",
        gt=0,
    )


class RolloutConfig(Section):
    """Generation by the student."""

    engine: RolloutEngine = key("megatron", "Who samples: the trainer's own model, vLLM, or a recording.")
    samples_per_prompt: Whole = key(4, "Sequences per prompt written by the student alone.", ge=0)
    guided_per_prompt: Whole = key(1, "Sequences per prompt that start with a teacher prefix.", ge=0)
    max_new_tokens: Whole = chosen(
        8192,
        "Longest response (prefix and continuation), in tokens. `auto`: 8192, or what data.max_prompt_tokens leaves of "
        "the models' positions.",
        ge=1,
    )
    temperature: Real = key(
        1.0,
        "Sampling temperature. Terms that take tokens for the student's draws are derived for 1 (method.temperature), "
        "and top_p 1, top_k 0; a run says once where they are biased.",
        gt=0,
    )
    top_p: Real = key(1.0, "Nucleus sampling: keep the smallest set with this probability.", gt=0, le=1)
    top_k: Whole = key(0, "Sample among the k likeliest tokens; 0 is off.", ge=0)
    ahead: Whole = key(0, "Steps that generation runs ahead of training (docs/vllm.md); 0 is synchronous.", ge=0)
    batch_size: Whole = key(64, "Sequences generated together by the embedded sampler.", ge=1)
    record: UserPath | None = key(None, "Directory to record every rollout in; null records nothing.")
    recorded_from: UserPath | None = key(None, "Directory to replay, for engine `recorded`.")
    parallel: RolloutParallelConfig = RolloutParallelConfig()
    verify: bool = key(
        True,
        "After new weights, compare a vLLM engine's log-probs of a probe with the trainer's, and stop if they differ.",
    )
    verify_tolerance: Real | None = key(
        None, "Largest mean difference allowed there, nats; null is 1e-4 for fp32, 0.1 for bf16.", gt=0
    )
    gap_warning: Real | None = key(
        None,
        "Mean gap between the sampler's and the trainer's log-probs, nats per token, past which a warning names likely "
        "causes; null is 1e-3 for fp32, 0.1 for bf16.",
        gt=0,
    )
    vllm: VLLMConfig = VLLMConfig()
    vllm_server: StudentServersConfig = StudentServersConfig()

    @model_validator(mode="after")
    def _something_is_sampled_and_recordings_fit(self) -> Self:
        if self.samples_per_prompt + self.guided_per_prompt == 0:
            raise ValueError(
                "samples_per_prompt and guided_per_prompt are both 0: nothing would be trained on. Raise one."
            )
        if self.engine == "recorded" and self.recorded_from is None:
            raise ValueError("engine = 'recorded' needs recorded_from, the directory that a run with record=DIR wrote.")
        if self.engine != "recorded" and self.recorded_from is not None:
            raise ValueError(
                f"recorded_from = '{self.recorded_from}' is only read by engine 'recorded', got engine = "
                f"{self.engine!r}. Set engine to recorded, or recorded_from to null."
            )
        if self.engine == "vllm_server" and not self.vllm_server.urls:
            raise ValueError(
                "engine = 'vllm_server' needs vllm_server.urls, addresses of servers started by `tropd serve student`."
            )
        if self.record is not None and self.record == self.recorded_from:
            raise ValueError(
                f"record and recorded_from are both '{self.record}': the recording would overwrite itself."
            )
        return self


@dataclass(frozen=True, slots=True)
class WrittenAt:
    """The file and overrides that a section was read from, for messages; two sections are equal wherever from."""

    source: str = ""
    text: str = ""
    overrides: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WrittenAt)

    def __hash__(self) -> int:
        return 0


class MethodConfig(Section):
    """The objective. Keys besides ``name`` are the method's own options, collected in ``options``."""

    name: str = key("tropd", "Preset: `tropd`, `opd`, ... Its options are further keys.", min_length=1)
    options: dict[str, Any] = Field(
        default_factory=dict, description="Not written: every key of `method` but `name` is an option of the preset."
    )
    _written: WrittenAt = PrivateAttr(default_factory=WrittenAt)

    @property
    def written(self) -> WrittenAt:
        """Say where the section was read."""
        return self._written

    def note_where(self, written: WrittenAt) -> None:
        """Remember where the section was read; its options are checked later, by their method."""
        self._written = written

    @model_validator(mode="before")
    @classmethod
    def _collect_options(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or isinstance(data.get("options"), Mapping):
            return data
        options = {key: value for key, value in data.items() if key != "name"}
        return {key: value for key, value in data.items() if key == "name"} | {"options": options}

    @model_serializer
    def _flatten_options(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}


class RewardConfig(Section):
    """Rewards of whole answers, for methods with `reward_weight` and for the gate `correct`."""

    function: str | None = key(
        None,
        "`PATH.py:NAME` of a function of yours that rewards the responses to a prompt; it runs in the trainer's "
        "processes (docs/rewards.md). null: the grader of the data, 1 for a right answer and 0 for a wrong one.",
    )
    advantage: Literal["group_mean", "leave_one_out", "normalized", "raw"] = key(
        "group_mean",
        "What a reward is measured against: the mean over the prompt's samples, the mean of the others, the mean and "
        "then divided by the standard deviation (GRPO), or nothing.",
    )

    @model_validator(mode="after")
    def _function_has_a_file_and_a_name(self) -> Self:
        if self.function is not None:
            path, colon, name = self.function.rpartition(":")
            if not (colon and path.endswith(".py") and name.isidentifier()):
                raise ValueError(f"function = {self.function!r} is not PATH.py:NAME, as in rewards.py:short_answers.")
        return self


class TrainConfig(Section):
    """The amounts of data per step."""

    steps: Whole = key(200, "Training steps: one batch of prompts sampled, scored and learned from.", ge=1)
    prompts_per_step: Whole = key(128, "Prompts per step, over all ranks.", ge=1)
    pack_tokens: Whole = chosen(
        16384,
        "Token budget of a pack, the micro-batch of teacher and student. `auto`: 16384, halved until the memory is "
        "estimated to hold it, but never less than the longest sequence.",
        ge=1,
    )
    share_prefixes: Annotated[Literal["auto", "off"], BeforeValidator(_off)] = key(
        "auto",
        "Compute what sequences of a pack begin with alike once, and budget packs by what is computed; off: every "
        "sequence by itself. The losses are the same.",
    )
    stop_after_no_gain: Whole = key(
        0,
        "End the run when so many evaluations in a row (evaluate.every) were no better than the best before them, by "
        "evaluate.best_by; 0 trains all steps.",
        ge=0,
    )
    minibatches: Whole = key(1, "Optimizer updates per step; above 1 the later ones are off-policy.", ge=1)
    keep_logits_gb: Real = key(
        0.0, "GiB per rank in which a pack's logits (fp32) wait for the backward, which else makes them again.", ge=0
    )


class OptimizerConfig(Section):
    """The optimizer and its schedule."""

    name: Literal["adam", "sgd"] = key("adam", "AdamW, or plain SGD (for comparing layouts).")
    lr: Real = key(5e-6, "Peak learning rate.", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = key("constant", "Decay from lr to min_lr.")
    warmup_steps: Whole = key(0, "Steps of linear warm-up from 0 to lr.", ge=0)
    min_lr: Real = key(0.0, "Learning rate at the end of a linear or cosine schedule.", ge=0)
    weight_decay: Real = key(0.0, "Decoupled weight decay, of either optimizer; norms and biases are exempt.", ge=0)
    beta1: Real = key(0.9, "Adam: decay of the mean of gradients.", ge=0, lt=1)
    beta2: Real = key(0.999, "Adam: decay of the mean of squared gradients.", ge=0, lt=1)
    # the smallest normal number of fp32: of less nothing is left, and Adam divides 0 by 0
    eps: Real = key(1e-8, "Adam: added to the root of the mean square.", ge=2**-126)
    momentum: Real = key(0.0, "SGD: momentum.", ge=0, lt=1)
    clip_grad: Real = key(1.0, "Largest global gradient norm; 0 is off.", ge=0)
    distributed: bool = key(False, "Shard optimizer states over data-parallel ranks.")
    overlap: bool = key(
        False,
        "Reduce gradients over data-parallel ranks as backward produces them, and with `distributed` gather weights "
        "during the forward of the step's next minibatch.",
    )
    offload: bool = key(
        False,
        "Keep the optimizer's states and fp32 weights in host memory, pinned on a GPU, and on the device only in the "
        "update; gradients leave it while rollouts are written and scored.",
    )

    @model_validator(mode="after")
    def _decays_downward(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr} is above lr = {self.lr}. Lower min_lr, or raise lr.")
        return self

    @model_validator(mode="after")
    def _every_key_that_is_set_is_read(self) -> Self:
        unread = ["momentum"] if self.name == "adam" else ["beta1", "beta2", "eps"]
        for name in unread:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(
                    f"{name} = {value} is not read with name = {self.name}. Leave it out, or name the other."
                )
        if self.schedule == "constant" and self.min_lr:
            raise ValueError(
                f"min_lr = {self.min_lr} is not read with schedule = constant. Leave it out, or set schedule to linear "
                "or cosine."
            )
        return self

    @model_validator(mode="after")
    def _distributed_states_are_those_of_adam(self) -> Self:
        if self.distributed and self.name != "adam":
            raise ValueError(
                f"distributed = true shards the states of Adam alone, got name = {self.name}, which Megatron-Core "
                "refuses. Set distributed to false, or name to adam."
            )
        return self


class CheckpointConfig(Section):
    """Checkpoints, from which a killed run resumes."""

    every: Whole = key(
        10, "Steps between checkpoints; 0 saves none, unless the run is requested to stop (SIGTERM, SIGUSR1).", ge=0
    )
    keep: Whole = key(2, "Newest checkpoints to keep.", ge=1)
    resume: str = key(
        "auto",
        "`auto` resumes from the newest in run_dir; `never` starts over and moves what an earlier run left there to "
        "RUN/earlier-run; or the path of a checkpoint, or of another run.",
        min_length=1,
    )
    accept_changes: tuple[str, ...] = key(
        (),
        "What may be other than in the run that wrote the checkpoint, a list of names that a refusal gives, such as "
        "`[teacher.weights, data.prompts]`.",
    )


class SuiteConfig(Section):
    """One way of answering and grading a set of problems. `file: SUITE.yaml` takes its keys from there first."""

    name: str = Field(min_length=1, description="Name of the suite, a column of the result table.")
    prompts: UserPaths = key((), "Its own problems, as `data.prompts`; null takes evaluate.prompts.")
    max_problems: Whole | None = key(None, "Use the first so many problems; null takes evaluate.max_problems.", ge=1)
    columns: ColumnsConfig | None = key(None, "Columns, where they differ from data.columns.")
    template: str | None = key(None, "Jinja over the row's columns that makes the prompt; null takes data.template.")
    answer_template: str | None = key(None, "The same for the reference answer; null takes data.answer_template.")
    system: str | None = key(None, "System message; null takes data.system.")
    grader: Grader | None = key(None, "Rule that grades its answers; null takes data.grader.")
    extract: str | None = key(
        None,
        "Regular expression; its last match in an answer (the first group that took part) is graded; null takes "
        "data.extract.",
    )
    code: CodeConfig | None = key(None, "For the grader `code`; null takes data.code.")
    timeout_s: Real = key(
        10.0, "Longest grading of one answer, or run of one program; what takes longer is wrong.", gt=0
    )
    samples: Whole = key(1, "Answers per problem; the accuracy is their mean (mean@n).", ge=1)
    pass_at: tuple[Whole, ...] = key((), "Every k for which to report pass@k, each at most `samples`; a list.")
    temperature: Real = key(0.0, "Sampling temperature; 0 is greedy.", ge=0)
    top_p: Real = key(1.0, "Nucleus sampling.", gt=0, le=1)
    top_k: Whole = key(0, "Sample among the k likeliest tokens; 0 is off.", ge=0)
    max_new_tokens: Whole | None = key(None, "Longest answer; null takes rollout.max_new_tokens.", ge=1)

    @model_validator(mode="after")
    def _can_be_graded(self) -> Self:
        if self.extract is not None:
            try:
                re.compile(self.extract)
            except re.error as error:
                raise ValueError(f"extract = {self.extract!r} is not a regular expression: {error}.") from None
        for k in self.pass_at:
            if not 1 <= k <= self.samples:
                raise ValueError(f"pass_at holds {k} of {self.samples} samples. Raise samples, or leave {k} out.")
        return self

    @model_validator(mode="after")
    def _greedy_once(self) -> Self:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples = {self.samples} at temperature 0 would repeat one greedy answer. "
                "Set samples to 1, or temperature above 0."
            )
        return self


DEFAULT_SUITES = (
    SuiteConfig(name="greedy"),
    SuiteConfig(name="mean@4 T=0.6", samples=4, temperature=0.6, top_p=0.95),
    SuiteConfig(name="mean@4 T=1", samples=4, temperature=1.0),
)


class EvaluateConfig(Section):
    """Accuracy on held-out problems. Nothing is evaluated while ``prompts`` is null."""

    prompts: UserPaths = key((), "Files of held-out problems with answers, as `data.prompts`; null or [] is off.")
    every: Whole = key(0, "Steps between evaluations during training; 0 is none.", ge=0)
    before: bool = key(True, "Evaluate the student before training.")
    after: bool = key(True, "Evaluate the student after training.")
    teacher: bool = key(True, "Evaluate the teacher too.")
    max_problems: Whole | None = key(None, "Use the first so many problems; null uses all.", ge=1)
    best_by: str | None = key(
        None,
        "Suite by whose accuracy weights are compared, for export.best and train.stop_after_no_gain; null: the first "
        "that samples (temperature above 0), else the first.",
    )
    suites: tuple[SuiteConfig, ...] = key(DEFAULT_SUITES, "Ways of answering, a list.")
    allow_code_execution: bool = key(
        False, "Whether the grader `code` may run programs that the model wrote (docs/evaluation.md says how confined)."
    )
    sandbox: Literal["required", "none"] = key(
        "required",
        "`required` refuses to run them on a machine that cannot keep them from its files, processes and network; "
        "`none` runs them there all the same (docs/security.md).",
    )

    @property
    def code_execution(self) -> CodeExecution:
        """Return whether programs may be run, and where."""
        return "unconfined" if self.allow_code_execution and self.sandbox == "none" else self.allow_code_execution

    @model_validator(mode="after")
    def _has_problems_and_distinct_names(self) -> Self:
        if self.every and not self.prompts and not any(suite.prompts for suite in self.suites):
            raise ValueError(f"every = {self.every} needs prompts, a file of held-out problems. Set it, or every to 0.")
        if not self.suites:
            raise ValueError("suites is empty. Leave it out for the default suites, or set prompts to null.")
        if self.sandbox == "none" and not self.allow_code_execution:
            raise ValueError(
                "sandbox = none is about programs, which allow_code_execution = false does not run. Set the one to "
                "required, or the other to true."
            )
        names = [suite.name for suite in self.suites]
        if self.best_by is not None and self.best_by not in names:
            raise ValueError(f"best_by = {self.best_by!r} is none of the suites ({', '.join(map(repr, names))}).")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"suites holds {names.count(name)} suites named {name!r}. Give each its own name.")
        return self


class ReportConfig(Section):
    """Reports of a run. ``metrics.jsonl`` is always written."""

    html: bool = key(True, "Write RUN/report.html at the end.")
    tensorboard: bool = key(False, "Write TensorBoard events to RUN/tensorboard.")
    wandb: Project = key(None, "Weights & Biases project; `true` names it megatron_tropd, null or `false` is off.")
    mlflow: Project = key(None, "MLflow experiment, the same way; `MLFLOW_TRACKING_URI` says where.")
    trackio: Project = key(None, "Trackio project, the same way.")
    swanlab: Project = key(None, "SwanLab project, the same way.")
    samples: Whole = key(4, "Answers before and after training to show in the report.", ge=0)
    samples_every: Whole = key(
        0,
        "Steps between answers that are printed, colored by region and gate, of those the step learns from; 0: none.",
        ge=0,
    )


class ExportConfig(Section):
    """Where the trained student goes."""

    hf: UserPath | None = chosen(
        None,
        "Directory for the trained student as a Hugging Face checkpoint; of a student with adapters, the merged "
        "weights; null: none. `auto`: RUN/student.",
    )
    adapter: UserPath | None = key(
        None, "Directory for the trained adapters of `student.lora`, as `peft` loads them; null writes none."
    )
    megatron: UserPath | None = key(
        None,
        "Directory for the trained student as a checkpoint that Megatron-LM or Megatron-Bridge loads, in shards as the "
        "run has them; null writes none.",
    )
    megatron_layout: MegatronLayout = key(
        "megatron-lm", "Whose: `megatron-lm` (--load DIR --finetune) or `bridge` (run_config.yaml beside the weights)."
    )
    push_to_hub: str | None = key(
        None, "Name on the hub, `owner/name`, to which the directory of `hf` is pushed at the end of the run."
    )
    private: bool = key(True, "Whether a repository that is made for it is private; one that is there stays as it is.")
    every: Whole = key(
        0, "Steps between exports to RUN/exports/step-..., Hugging Face directories like `hf`; 0 is none.", ge=0
    )
    keep: Whole = key(2, "Newest of those to keep.", ge=1)
    best: bool = key(
        False,
        "Keep the weights that answered best so far (evaluate.best_by) in RUN/exports/best; needs evaluate.every.",
    )

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        if self.megatron is None and self.megatron_layout != "megatron-lm":
            raise ValueError(
                f"megatron_layout = {self.megatron_layout} is not read without megatron. Leave it out, or set megatron "
                "to a directory."
            )
        return self

    @model_validator(mode="after")
    def _pushes_what_is_exported(self, info: ValidationInfo) -> Self:
        if self.push_to_hub is None:
            return self
        if self.hf is None and not (info.context == FITTED_LATER and "hf" not in self.model_fields_set):
            raise ValueError(
                f"push_to_hub = {self.push_to_hub!r} pushes the directory of hf, which is null. Set hf to one."
            )
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", self.push_to_hub):
            raise ValueError(f"push_to_hub = {self.push_to_hub!r} is no name on the hub. Write owner/name.")
        return self
