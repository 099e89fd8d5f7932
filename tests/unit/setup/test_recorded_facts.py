"""What a recording of scores depends on is written beside it, so that none is replayed under other circumstances."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.setup.build import recorded_facts
from tests.support.chat_families import save_byte_tokenizer

OURS = "{% for m in messages %}[{{m['role']}}]{{m['content']}}<eos>{% endfor %}"


@dataclass(frozen=True)
class Sizes:
    """As much of an architecture as facts look at."""

    width: int = 7


def facts_of(directory: Path, *, template: str = OURS, dtype: str = "fp32", response: int = 9, **changed: Any) -> Any:
    tokenizer = load_tokenizer(save_byte_tokenizer(directory / str(len(list(directory.iterdir()))), template=template))
    tokenizer = replace(tokenizer, eos_ids=changed.get("ends", tokenizer.eos_ids))
    config: Any = SimpleNamespace(
        dtype=dtype,
        teacher=SimpleNamespace(record=None, recorded_from=None),
        data=SimpleNamespace(max_prompt_tokens=8),
        rollout=SimpleNamespace(max_new_tokens=response),
    )
    inputs: Any = SimpleNamespace(
        teacher=Sizes(changed.get("width", 7)),
        base=None,
        vocab_size=changed.get("vocab_size", 258),
        tokenizer=tokenizer,
        method=SimpleNamespace(temperature=changed.get("temperature", 1.0), end_ids=changed.get("end_ids", ())),
    )
    return recorded_facts(config, inputs)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": "bf16"}, ["dtype"]),
        ({"template": OURS.replace("[", "(")}, ["chat template"]),
        ({"response": 10}, ["budget"]),
        ({"temperature": 0.7}, ["temperature"]),
        ({"ends": (1, 0)}, ["end tokens"]),
        ({"end_ids": (0, 1)}, ["ends counted as one"]),
        ({"width": 8}, ["architecture"]),
        ({"vocab_size": 257}, ["vocab_size"]),
        ({}, []),
    ],
)
def test_every_circumstance_is_a_fact_of_its_own(change: dict[str, Any], named: list[str], tmp_path: Path):
    plain, other = facts_of(tmp_path), facts_of(tmp_path, **change)
    assert [name for name in plain if plain[name] != other[name]] == named
