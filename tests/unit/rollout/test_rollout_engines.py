"""The rows of the rollout engines: what each is built with, against the signatures of what it builds."""

from __future__ import annotations

import shutil
from dataclasses import replace
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
from megatron_tropd.rollout.engines.registry import ROLLOUT_ENGINES, SamplerContext, publish_directory
from megatron_tropd.types import Architecture

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


def test_weights_lie_in_memory_only_where_two_copies_of_them_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 * 2**20))  # Docker's default
    assert publish_directory(tmp_path / "run", 32 * 2**20, memory=tmp_path) == tmp_path
    found = publish_directory(tmp_path / "run", 32 * 2**20 + 1, memory=tmp_path)
    assert found == tmp_path / "run" / "publish"
    assert publish_directory(Path("run"), 1, memory=tmp_path / "none") == Path("run").absolute() / "publish"


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_counted_as_they_are_published_tied_embeddings_twice(tied: bool):
    of_a_llama = Architecture(
        family="LlamaForCausalLM",
        num_layers=3,
        hidden_size=8,
        ffn_size=12,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=7,
        max_positions=16,
        norm_eps=1e-6,
        rope_theta=1e4,
        tied_embeddings=tied,
        qkv_bias=False,
        qk_norm=False,
    )
    # q, k, v, o; gate, up, down; two norms. Then embedding, final norm, output
    layer = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8 + 3 * 12 * 8 + 2 * 8
    assert replace(context({}), architecture=of_a_llama).weight_bytes == 2 * (3 * layer + 7 * 8 + 8 + 7 * 8)


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
