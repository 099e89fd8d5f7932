"""The rows of the rollout engines: what each is built with, against the signatures of what it builds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from megatron_tropd.config.sections import RolloutConfig
from megatron_tropd.errors import ConfigError
from megatron_tropd.rollout.engines import registry
from megatron_tropd.rollout.engines.checks import check_logprobs
from megatron_tropd.rollout.engines.registry import ROLLOUT_ENGINES, SamplerContext

CPU = torch.device("cpu")
URLS = ["http://127.0.0.1:8100"]


def context(section: dict[str, Any], *, run_dir: Path = Path("run")) -> SamplerContext:
    nothing: Any = SimpleNamespace(vocab_size=211)
    return SamplerContext(
        section=RolloutConfig.model_validate(section),
        model=Path("student"),
        architecture=nothing,
        groups=nothing,
        dtype=torch.bfloat16,
        device=CPU,
        max_tokens=97,
        vocab_size=199,
        run_dir=run_dir,
    )


def built(monkeypatch: pytest.MonkeyPatch, name: str, section: dict[str, Any], *stands_in: str, **options: Any) -> Any:
    """Builds the engine, with autospecs (which refuse calls that the real ones would) in the place of what is named."""
    made = SimpleNamespace()
    for what in stands_in:
        setattr(made, what, create_autospec(getattr(registry, what)))
        monkeypatch.setattr(registry, what, getattr(made, what))
    ROLLOUT_ENGINES[name].build(context({"engine": name, **section}, **options))
    return made


def test_the_embedded_sampler_has_the_batch_size_of_its_section(monkeypatch: pytest.MonkeyPatch):
    made = built(monkeypatch, "megatron", {"batch_size": 5}, "MegatronSampler")
    assert made.MegatronSampler.call_args.kwargs["batch_size"] == 5
    assert made.MegatronSampler.call_args.kwargs["vocab_size"] == 199


def test_an_engine_in_process_gets_its_own_section_and_never_sleeps_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    made = built(monkeypatch, "vllm", {"vllm": {"max_sequences": 3, "cache_mib": 7}}, "VLLMSampler")
    given = made.VLLMSampler.call_args.kwargs
    assert given["options"] == {"max_num_seqs": 3, "kv_cache_memory_bytes": 7 * 2**20}
    assert (given["max_tokens"], given["dtype"]) == (97, torch.bfloat16)


@pytest.mark.parametrize(
    ("publish", "publisher", "ours"),
    [
        ("files", "FilePublisher", {"bucket_bytes": 3 * 2**20, "transfer_s": 11.0}),
        (
            "broadcast",
            "BroadcastPublisher",
            {"bucket_bytes": 3 * 2**20, "transfer_s": 11.0, "address": "10.0.0.7", "device": CPU},
        ),
    ],
)
def test_servers_are_asked_for_what_a_student_needs_and_publish_as_the_section_says(
    monkeypatch: pytest.MonkeyPatch, publish: str, publisher: str, ours: dict[str, Any]
):
    section = {"urls": URLS, "publish": publish, "publish_dir": "weights", "publish_address": "10.0.0.7"}
    section |= {"bucket_mib": 3, "transfer_s": 11.0, "timeout_s": 13.0}
    monkeypatch.setattr(registry, "dist", SimpleNamespace(get_rank=lambda: 0))
    made = built(monkeypatch, "vllm_server", {"vllm_server": section}, "open_pool", publisher, "ServerSampler")
    # one token more than the longest sequence: scoring samples one and throws it away
    assert made.open_pool.call_args.kwargs["needs"] == {
        "dtype": "bfloat16",
        "vocab_size": 211,
        "max_model_len": 98,
        "logprobs_mode": "processed_logprobs",
        "takes_weights": True,
    }
    call = getattr(made, publisher).call_args
    assert call.args == ((made.open_pool.return_value, Path("weights")) if publish == "files" else call.args[:1])
    assert call.kwargs == ours
    assert made.ServerSampler.call_args.kwargs["timeout_s"] == 13.0


def test_only_the_first_rank_talks_to_servers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "dist", SimpleNamespace(get_rank=lambda: 1))
    made = built(
        monkeypatch, "vllm_server", {"vllm_server": {"urls": URLS}}, "open_pool", "FilePublisher", "ServerSampler"
    )
    made.open_pool.assert_not_called()
    assert made.ServerSampler.call_args.args[0] is None and made.FilePublisher.call_args.args[0] is None


def test_a_recording_is_read_from_where_the_section_says(monkeypatch: pytest.MonkeyPatch):
    made = built(monkeypatch, "recorded", {"recorded_from": "there"}, "RecordedSampler")
    assert made.RecordedSampler.call_args.args == (Path("there"),)


@pytest.mark.parametrize("name", [name for name, row in ROLLOUT_ENGINES.items() if row.needs_vllm])
def test_an_engine_that_is_not_installed_is_refused_by_its_row(monkeypatch: pytest.MonkeyPatch, name: str):
    asked: list[bool] = []
    monkeypatch.setattr(registry, "check_installed", lambda: asked.append(True))
    ROLLOUT_ENGINES["vllm_server"].check()
    assert not asked  # its servers may live in another environment
    ROLLOUT_ENGINES[name].check()
    assert asked == [True]


@pytest.mark.parametrize("name", [name for name, row in ROLLOUT_ENGINES.items() if not row.exact_vocabulary])
@pytest.mark.parametrize("shaped", [{"temperature": 0.9}, {"top_p": 0.9}, {"top_k": 9}])
def test_an_engine_that_knows_its_own_ids_only_samples_plainly_where_the_models_share_fewer(
    name: str, shaped: dict[str, float]
):
    own = {"engine": name, "vllm_server": {"urls": URLS}}
    section, plain = RolloutConfig.model_validate({**own, **shaped}), RolloutConfig.model_validate(own)
    with pytest.raises(ConfigError, match=f"the student has 60 ids, the teacher 50: with rollout.engine={name} "):
        check_logprobs(section, shared_ids=50, student_ids=60, teacher_ids=50)
    check_logprobs(section, shared_ids=60, student_ids=60, teacher_ids=60)
    check_logprobs(plain, shared_ids=50, student_ids=60, teacher_ids=50)
    check_logprobs(RolloutConfig.model_validate(shaped), shared_ids=50, student_ids=60, teacher_ids=50)
