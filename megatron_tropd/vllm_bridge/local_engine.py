"""A vLLM engine in this process: sampling, scoring, new weights without a copy on disk.

Under torchrun every rank has its own engine, or its part of one: ``groups`` says which ranks make one up. All of them
must call with the same tasks, as vLLM's external launcher requires.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.types import Int64Array, SamplingParams
from megatron_tropd.vllm_bridge.options import whole_prompts
from megatron_tropd.vllm_bridge.requests import (
    Task,
    TeacherScores,
    Written,
    checked_written,
    sampling_options,
    scoring_options,
    versions_of,
)
from megatron_tropd.vllm_bridge.score_requests import ScoreRequest, answer_of, checked_answer, in_batches

# read when vLLM is imported; what the user has set stays
_ENVIRONMENT = {
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # room for the one token that scoring samples and throws away
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the engine's step runs here, where the weights are
_ON_CPU = {
    "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled there
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are others' too
}


def prepare(*, in_process: bool = True) -> None:
    """Set what vLLM reads from the environment when it is imported."""
    wanted = _ENVIRONMENT | (_IN_PROCESS if in_process else {}) | ({} if torch.cuda.is_available() else _ON_CPU)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def check_installed() -> None:
    """Raise ConfigError when vLLM cannot be imported here."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed in this environment. Install it (`pip install vllm`; without a GPU, `make "
            "install-vllm` makes .venv-vllm), or use servers (engine vllm_server), which may live in another one."
        )


# log-probs in one batch of answers, about 60 bytes each
_MOST_VALUES = 4_000_000


@dataclass(frozen=True, slots=True)
class Scoring:
    """The use of an engine that scores."""

    top_k: int  # the most alternatives of a token that will be requested
    vocab_size: int


class LocalEngine:
    """vLLM's ``LLM`` with this package's nouns. But for a teacher's, its weights are random until ``load``."""

    def __init__(
        self,
        model: str | Path,
        groups: Groups,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int,
        scoring: Scoring | None = None,
        options: Mapping[str, Any],
    ) -> None:
        """Start the engine. ``max_tokens``: the longest sequence. ``options``: more arguments of ``vllm.LLM``.
        Collective.

        ``scoring``: the engine is a teacher's: its weights are the model's own and never change.

        Raises:
            ConfigError: vLLM is missing or refuses the model or the options.
        """
        check_installed()
        prepare()
        arguments: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "tensor_parallel_size": groups.layout.tensor,
            "max_model_len": max_tokens + 1,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
            "enforce_eager": device.type != "cuda",
            **({} if device.type == "cuda" else whole_prompts(max_tokens)),
        }
        if dist.get_world_size() > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
        if scoring is not None:
            arguments |= {"load_format": "auto", "max_logprobs": scoring.top_k, "enable_prefix_caching": False}
        section = "rollout" if scoring is None else "teacher"
        self._vocab_size = 0 if scoring is None else scoring.vocab_size
        self._llm = _new_llm(str(model), arguments | dict(options), section=section)
        self._sleeps = bool(options.get("enable_sleep_mode", False))
        self._asleep_level = 0  # 0: awake
        self._again: tuple[Iterable[tuple[str, Tensor]], int] | None = None  # weights and version, to be read anew

    def write(self, tasks: Sequence[Task], params: SamplingParams, *, forbidden: range = range(0)) -> list[Written]:
        """Continue every task.

        Raises:
            ServingError: an answer cannot be right.
        """
        from vllm import SamplingParams as Sampling

        options = [Sampling(**sampling_options(params, task, forbidden=forbidden)) for task in tasks]
        outputs = self._ask([task.token_ids for task in tasks], options)
        return [checked_written(_written(o.outputs[0]), t, params) for o, t in zip(outputs, tasks, strict=True)]

    def score(self, sequences: Sequence[Int64Array], *, top_k: int = 0) -> list[TeacherScores]:
        """Return the log-prob of every token after the first of every sequence, and of its ``top_k`` likeliest
        alternatives.

        Raises:
            ServingError: an answer cannot be right.
        """
        return self.answer(
            [ScoreRequest(number=n, token_ids=sequence, top_k=top_k) for n, sequence in enumerate(sequences)]
        )

    def answer(self, requests: Sequence[ScoreRequest]) -> list[TeacherScores]:
        """Answer every request, in their order.

        Raises:
            ServingError: an answer cannot be right.
        """
        from vllm import SamplingParams as Sampling

        answers = []
        # vLLM's answers are Python numbers: many at a time would fill the memory
        for batch in in_batches(requests, vocab_size=self._vocab_size, most_values=_MOST_VALUES):
            options = [Sampling(**scoring_options(request.columns), flat_logprobs=True) for request in batch]
            for request, output in zip(
                batch, self._ask([request.token_ids for request in batch], options), strict=True
            ):
                flat = output.prompt_logprobs
                answers.append(checked_answer(answer_of(request, flat.token_ids, flat.logprobs), request))
        return answers

    def load(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Take whole tensors under Hugging Face names; nothing computed with the old ones is used again.

        Tensors that can be iterated over again need not wait in host memory while the engine sleeps.
        """
        if self._asleep_level:
            self._llm.wake_up(tags=["weights"])  # the cache's room still serves the gathering of the new ones
        # vLLM cuts its own slices; it logs what the stream lacks but does not refuse it: see engine.publish.verify
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        if self._asleep_level:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep_level = 0
        self._again = None if iter(tensors) is tensors else (tensors, version)
        self._llm.reset_prefix_cache()
        self._llm.update_weight_version(str(version))

    def sleep(self) -> None:
        """Give the GPU's memory to the trainer until next used: the cache is dropped, and so are weights that can be
        had again; others wait in host memory.
        """
        if self._sleeps and not self._asleep_level:
            self._asleep_level = 1 if self._again is None else 2
            self._llm.sleep(level=self._asleep_level)

    def close(self) -> None:
        """End the engine."""
        self._llm.llm_engine.engine_core.shutdown()

    def _wake(self) -> None:
        """Wake the engine with the weights that it had. Collective where these are read anew."""
        if self._asleep_level == 2 and self._again is not None:
            tensors, version = self._again
            self.load(tensors, version=version)
        elif self._asleep_level:
            self._llm.wake_up()
            self._asleep_level = 0

    def _ask(self, sequences: Sequence[Int64Array], options: Sequence[Any]) -> list[Any]:
        self._wake()
        prompts = [{"prompt_token_ids": sequence.tolist()} for sequence in sequences]
        outputs: list[Any] = self._llm.generate(prompts, list(options), use_tqdm=False)
        return outputs


def _new_llm(model: str, arguments: dict[str, Any], *, section: str) -> Any:
    """Make a ``vllm.LLM``, without its effects on this process's random numbers and number of threads."""
    states, set_threads = torch.random.get_rng_state(), torch.set_num_threads
    try:
        from vllm import LLM
        from vllm.v1.engine import core

        # an engine that ends would take the trainer's process group with it, thinking it its own
        core.cleanup_dist_env_and_memory = _leave_process_group
        return LLM(model, **arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"vLLM cannot serve {model} ({error}). Change {section}.vllm or the layout.") from error
    finally:
        torch.random.set_rng_state(states)
        torch.set_num_threads = set_threads


def _leave_process_group(shutdown_ray: bool = False) -> None:
    """Stand in for vLLM's function that destroys every process group of the process."""


def _written(output: Any) -> Written:
    token_ids = np.asarray(output.token_ids, dtype=np.int64)
    logprobs = [entry[token].logprob for token, entry in zip(token_ids.tolist(), output.logprobs, strict=True)]
    spans = [(span.version, span.start, span.end) for span in output.weight_versions or ()]
    return Written(
        token_ids=token_ids,
        logprob_n=np.asarray(logprobs, dtype=np.float32),
        version_n=versions_of(spans, len(token_ids)),
        finished=output.finish_reason == "stop",
    )
