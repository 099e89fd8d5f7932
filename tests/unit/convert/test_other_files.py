"""Directories that look like models and are none are called what they are; tokenizers of any kind are carried along."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from megatron_tropd.convert import writer as writing
from megatron_tropd.convert.companions import check_companions, companions_of, copy_companions
from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.errors import CheckpointError, TokenizerError

DEMO = Path(__file__).resolve().parents[3] / "examples" / "demo" / "teacher"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n"


def test_a_git_lfs_pointer_is_called_that_whatever_file_it_stands_for(tmp_path):
    for name, read in (
        ("config.json", lambda: read_architecture(tmp_path)),
        ("model.safetensors", lambda: HFWeights(tmp_path)),
        ("tokenizer.json", lambda: load_tokenizer(tmp_path)),
    ):
        (tmp_path / name).write_text(POINTER)
        with pytest.raises((CheckpointError, TokenizerError), match=rf"{name} is a Git LFS pointer.*git lfs pull"):
            read()
        (tmp_path / name).unlink()


def test_an_adapter_is_called_that_and_not_a_torn_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"adapter"):
        read_architecture(tmp_path)


def test_files_of_any_tokenizer_are_carried_and_weights_code_and_prose_are_not(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    carried = ["config.json", "vocab.txt", "spiece.model", "tokenizer_of_its_own.dat", "chat_template.jinja"]
    left = ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "modeling_x.py", "README.md"]
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "checkpoint-7").mkdir()
    for name in (*carried, *left, "additional_chat_templates/tool.jinja", "checkpoint-7/config.json", ".hidden"):
        (source / name).write_text(name)
    target.mkdir()
    copy_companions(source, target)
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == {
        *carried,
        "additional_chat_templates/tool.jinja",
    }
    assert sorted(companions_of(source)) == sorted([*carried, "additional_chat_templates/tool.jinja"])


@pytest.mark.parametrize("change", ["vocabulary", "template", "end", "gone"])
def test_an_export_whose_tokenizer_is_not_the_one_it_came_with_does_not_count_as_done(change, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    copy_companions(DEMO, source)
    target = shutil.copytree(source, tmp_path / "target")
    check_companions(source, target)  # as it is, it does
    settings = json.loads((target / "tokenizer_config.json").read_text())
    template = settings["chat_template"]
    if change == "vocabulary":
        table = json.loads((target / "tokenizer.json").read_text())
        table["added_tokens"].append({**table["added_tokens"][0], "id": 9999, "content": "<strange>"})
        (target / "tokenizer.json").write_text(json.dumps(table))
    elif change == "template":
        (target / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ '' }}" + template}))
    elif change == "end":
        (target / "generation_config.json").write_text('{"eos_token_id": [0, 1, 2]}')
    else:
        (target / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer of the export|has no tokenizer that loads"):
        check_companions(source, target)


def test_a_writer_loads_the_tokenizer_again_before_its_export_is_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path):
    def forgets(source: Path, target: Path) -> None:
        copy_companions(source, target)
        (target / "tokenizer.json").unlink()

    source = tmp_path / "source"
    source.mkdir()
    copy_companions(DEMO, source)
    tensors = {"model.norm.weight": torch.ones(3)}
    for copied, fits in ((forgets, False), (copy_companions, True)):
        monkeypatch.setattr(writing, "copy_companions", copied)
        writer = writing.HFWriter(
            tmp_path / "target", companions_from=source, tensors={"model.norm.weight": (3,)}, dtype=torch.float32
        )
        writer.write(tensors.items())
        with nullcontext() if fits else pytest.raises(CheckpointError, match="has no tokenizer that loads"):
            writer.finish()
        assert (tmp_path / "target").exists() == fits
