"""The page on coming from other trainers names keys that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_tropd.config.reference import config_reference
from megatron_tropd.methods import PRESETS

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "migrate.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
KEYS = set(re.findall(r"^\| `([\w.\[\]]+)` \|", config_reference(), re.MULTILINE))
# options of presets, as they are given beside method.name
OPTIONS = {"method.beta", "method.on_policy_fraction", "method.temperature", "method.k", "method.tail", "method.form"}


def rows(section: str) -> list[list[str]]:
    """Cells of the table's rows below its head."""
    found = [line.strip("| ").split(" | ") for line in SECTIONS[section].splitlines() if line.startswith("| `")]
    assert found
    return found


@pytest.mark.parametrize("section", ["TRL", "ms-swift", "verl", "NeMo-RL"])
def test_every_key_of_a_table_is_one_of_the_configuration(section: str):
    named = {key for row in rows(section) for key in re.findall(r"`([^`]+)`", row[1])}
    assert named and named - OPTIONS <= KEYS, named - OPTIONS - KEYS


@pytest.mark.parametrize("section", ["TRL", "ms-swift", "verl", "NeMo-RL"])
def test_what_is_there_is_named_once(section: str):
    names = [name for row in rows(section) for name in re.findall(r"`([^`]+)`", row[0])]
    assert len(set(names)) == len(names)


def test_options_of_presets_that_the_page_names_are_taken_by_one():
    from megatron_tropd.methods import build_method

    assert {"gkd", "fkl", "rkl", "opd", "sft"} <= PRESETS.keys()
    build_method("gkd", beta=0.25, on_policy_fraction=1.0, temperature=0.9)
    for name in ("fkl", "rkl"):
        build_method(name, form="topk", k=7, tail="bucket")
