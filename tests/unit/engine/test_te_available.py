"""Why Transformer Engine cannot be used is one sentence, in the configuration's refusal and in what health prints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.engine import te
from megatron_tropd.errors import ConfigError
from megatron_tropd.setup import validate


def config(**student: str) -> Any:
    own = {"attention": "auto", "layers": "local", "fp8": "none", **student}
    return SimpleNamespace(student=SimpleNamespace(**own), teacher=SimpleNamespace(attention="sdpa"))


def pose(monkeypatch: pytest.MonkeyPatch, *, fault: str = "", imports: Exception | None = None) -> None:
    def load(name: str) -> None:
        assert name == "transformer_engine.pytorch"
        if imports is not None:
            raise imports

    monkeypatch.setattr(te, "te_fault", lambda: fault)
    monkeypatch.setattr(te.importlib, "import_module", load)


UNDEFINED = ImportError("transformer_engine_torch.so: undefined symbol: _ZN3c105ErrorC2E\nmore")


@pytest.mark.parametrize(
    ("fault", "imports", "said"),
    [
        ("Transformer Engine is not installed.", None, "Transformer Engine is not installed."),
        ("", UNDEFINED, "its extension may be of another torch: transformer_engine_torch.so: undefined symbol"),
        ("", OSError("libcudart.so.13: cannot open"), "its extension may be of another torch: libcudart.so.13"),
        ("", None, ""),
    ],
)
def test_what_is_missing_is_one_sentence(
    fault: str, imports: Exception | None, said: str, monkeypatch: pytest.MonkeyPatch
):
    pose(monkeypatch, fault=fault, imports=imports)
    assert said in te.te_unavailable() and bool(said) == bool(te.te_unavailable()) and "\n" not in te.te_unavailable()


@pytest.mark.parametrize(("key", "value"), [("layers", "te"), ("attention", "te"), ("fp8", "blockwise")])
def test_settings_that_need_it_are_refused_with_that_sentence(key: str, value: str, monkeypatch: pytest.MonkeyPatch):
    pose(monkeypatch, fault="Transformer Engine 2.8.0 is too old.")
    with pytest.raises(ConfigError, match=rf"student.{key}={value} is not available yet: .*2.8.0 is too old. Use "):
        validate.check_available(config(**{key: value}))
    pose(monkeypatch)
    with pytest.raises(ConfigError, match="is here, but its layers are not built into this version yet"):
        validate.check_available(config(**{key: value}))
    validate.check_available(config())


def test_the_first_adam_that_can_be_imported_is_named(monkeypatch: pytest.MonkeyPatch):
    pose(monkeypatch)
    assert te.accelerators()["Adam"] == "Transformer Engine's"
    pose(monkeypatch, fault="Transformer Engine is not installed.")
    monkeypatch.setattr(te.importlib.util, "find_spec", lambda name: None)
    assert te.accelerators() == {
        "Transformer Engine": "Transformer Engine is not installed.",
        "apex": "apex is not installed.",
        "Adam": "torch's, fused on a GPU",
    }
    monkeypatch.setattr(te.importlib.util, "find_spec", lambda name: Path())
    assert te.accelerators()["Adam"] == "apex's"
