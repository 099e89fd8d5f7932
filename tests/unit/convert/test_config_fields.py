"""Settings of a ``config.json`` that are not read are named, and those of the families themselves are not."""

from __future__ import annotations

import logging

import pytest
import transformers

from megatron_tropd.models.config_fields import say_unread, unread_fields
from megatron_tropd.models.registry import FAMILIES, architecture_of


def config(name: str) -> dict:
    made = getattr(transformers, name.removesuffix("ForCausalLM") + "Config")()
    return made.to_dict() | {"architectures": [name]}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_transformers_writes_for_a_family_is_known(name: str, caplog):
    say_unread.cache_clear()
    architecture_of(config(name))
    assert caplog.text == ""


def test_what_another_family_has_and_code_of_its_own_are_named_once(caplog):
    say_unread.cache_clear()
    given = config("LlamaForCausalLM") | {
        "embedding_multiplier": 12.0,  # Granite's
        "auto_map": {"AutoModelForCausalLM": "modeling.Own"},
        "use_mrope": False,
        "logit_scale": None,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [16, 24, 24]},
    }
    with caplog.at_level(logging.WARNING):
        architecture_of(given)
        architecture_of(given)
    assert caplog.text.count("sets auto_map, embedding_multiplier, rope_scaling.mrope_section, which") == 1
    assert "auto_map) is never run" in caplog.text


def test_values_that_set_nothing_are_passed_over():
    assert unread_fields({"a": None, "b": False, "c": [], "d": {}, "e": ""}) == []
    assert unread_fields({"a": 0, "b": 1.0}) == ["b"]
