"""Files of a model directory are looked at before they are opened; ``support/attacks/model.py`` has the attacks."""

from __future__ import annotations

import json
import os

import pytest

from megatron_tropd.errors import CheckpointError, ModelFileError
from megatron_tropd.models.registry import architecture_of
from megatron_tropd.storage.kinds import head_of
from megatron_tropd.storage.model_files import check_model_files
from tests.support.attacks.model import _CONFIG, save_good


def test_links_folders_and_large_weights_are_what_models_have(tmp_path):
    model = save_good(tmp_path / "m")
    (model / "original").mkdir()
    (model / "link.json").symlink_to(model / "config.json")
    (model / "nowhere.json").symlink_to(tmp_path / "gone")
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(40 << 30)
    check_model_files(model)
    check_model_files(tmp_path / "not there")


def test_a_pipe_in_a_folder_that_is_read_is_found_and_has_no_first_bytes(tmp_path):
    model = save_good(tmp_path / "m")
    (model / "additional_chat_templates").mkdir()
    os.mkfifo(model / "additional_chat_templates" / "rag.jinja")
    with pytest.raises(ModelFileError, match=r"rag.jinja is a named pipe, not a file"):
        check_model_files(model)
    assert head_of(model / "additional_chat_templates" / "rag.jinja") == b""


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"])
def test_sizes_that_no_model_has_are_refused(name):
    assert architecture_of(json.loads(json.dumps(_CONFIG))).num_layers == 2
    for size in (0, -1, 10**12, 1e308):
        with pytest.raises(CheckpointError, match=r"config.json (gives|of a)"):
            architecture_of(_CONFIG | {name: size})
