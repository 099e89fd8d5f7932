"""A directory of recorded rollouts is one run's, and says how they were sampled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megatron_tropd.errors import DataError
from megatron_tropd.rollout.engines.recorded import RecordedSampler, read_rollouts, write_rollouts
from megatron_tropd.rollout.recording import FILE, claim_recording
from megatron_tropd.types import Rollout, RolloutRequest, SamplingParams, single_turn

IDENTITY = {"seed": 3, "student weights": "abc", "train.steps": 4}
PARAMS = SamplingParams(max_new_tokens=5, temperature=0.7)
REQUEST = RolloutRequest(
    sequence_id=0, prompt_index=1, prompt_ids=np.arange(3), prefix_ids=np.arange(0), max_new_tokens=5
)
ROLLOUT = Rollout(
    sequence_id=0,
    prompt_index=1,
    token_ids=np.arange(7),
    region_L=single_turn(prompt=3, continuation=4),
    sampling_logprob=np.zeros(4, np.float32),
    model_logprob=np.zeros(4, np.float32),
    finished=True,
)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)


def claim(
    directory: Path, run: str, *, resumed: bool = False, identity: dict[str, object] = IDENTITY, steps: int = 0
) -> None:
    claim_recording(directory, run_dir=Path(run), identity=identity, sampling=PARAMS, resumed=resumed)
    for step in range(steps):
        write_rollouts(directory, step, [ROLLOUT])


def test_the_rollouts_of_one_run_never_mix_into_another_s(tmp_path: Path):
    claim(tmp_path, "/runs/a", steps=4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for resumed in (False, True):
        with pytest.raises(DataError) as error:
            claim(tmp_path, "/runs/b", resumed=resumed)
        assert str(error.value) == (
            f"{tmp_path} holds step-00000000 to step-00000003 of the run in /runs/a, not of the one in /runs/b. "
            "Record into another directory (rollout.record)."
        )
    with pytest.raises(DataError, match=r"of an earlier run in /runs/a, which had another seed, train\.steps than"):
        claim(tmp_path, "/runs/a", identity=IDENTITY | {"seed": 4, "train.steps": 2})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_same_run_starts_over_or_resumes_into_its_own(tmp_path: Path):
    claim(tmp_path, "/runs/a", steps=2)
    claim(tmp_path, "/runs/a", steps=2)
    claim(tmp_path, "/runs/a", resumed=True, identity=IDENTITY | {"train.steps": 8})
    assert json.loads((tmp_path / FILE).read_text())["identity"]["train.steps"] == 8
    claim(tmp_path / "empty", "/runs/b")
    claim(tmp_path / "empty", "/runs/c")  # b died before it wrote any


def test_rollouts_of_an_earlier_version_are_taken_over_by_a_resumed_run_alone(tmp_path: Path):
    write_rollouts(tmp_path, 0, [ROLLOUT])
    with pytest.raises(DataError, match="holds step-00000000 to step-00000000 of a run of an earlier version, not of"):
        claim(tmp_path, "/runs/a")
    claim(tmp_path, "/runs/a", resumed=True)
    claim(tmp_path, "/runs/a")


def test_a_broken_claim_is_one_error(tmp_path: Path):
    claim(tmp_path, "/runs/a", steps=1)
    for text in ("{", "[1]"):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(DataError, match="it is not known whose rollouts these are"):
            claim(tmp_path, "/runs/a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 4}, "rollout.max_new_tokens=5, not 4. Replay"),
        ({"temperature": 1.0, "top_p": 0.5}, "rollout.temperature=0.7, not 1.0 and rollout.top_p=1.0, not 0.5. Replay"),
    ],
)
def test_a_replay_minds_how_the_rollouts_were_sampled(tmp_path: Path, change: dict[str, float], message: str):
    claim(tmp_path, "/runs/a", steps=1)
    sampler = RecordedSampler(tmp_path)
    assert len(sampler.generate([REQUEST], PARAMS, seed=0, step=0)) == 1
    with pytest.raises(DataError) as error:
        sampler.generate([REQUEST], replace(PARAMS, **change), seed=0, step=0)  # type: ignore[arg-type]
    assert str(error.value) == f"{tmp_path} was recorded with {message} with the settings of the recording."


def test_a_recording_that_does_not_say_so_is_held_to_the_budget(tmp_path: Path):
    write_rollouts(tmp_path, 0, [ROLLOUT])
    sampler = RecordedSampler(tmp_path)
    exact, short = replace(REQUEST, max_new_tokens=4), replace(REQUEST, max_new_tokens=3)
    assert len(sampler.generate([exact], PARAMS, seed=0, step=0)) == 1
    with pytest.raises(DataError, match="has a response of 4 tokens for a budget of 3"):
        sampler.generate([short], PARAMS, seed=0, step=0)


@pytest.mark.parametrize(("at", "bit"), [(8, 1), (10, 1), (16, 1)], ids=["encrypted", "packed otherwise", "checksum"])
def test_a_bit_of_the_archives_own_table_that_flips_is_one_error(at: int, bit: int, tmp_path: Path):
    """The table of a zip file: zipfile and numpy speak of each with an exception of another kind."""
    path = write_rollouts(tmp_path, 0, [ROLLOUT])
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + at] ^= bit
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"step-00000000.npz is torn or not a recording: .*Record it again"):
        read_rollouts(tmp_path, 0)
