"""Foreign attributes are changed in one folder, each with its reason, and only while there is something to change."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import megatron_tropd
import megatron_tropd.engine.experts  # defines what megatron-core leaves undefined
from megatron_tropd.engine.patches.table import PATCHES, ForeignPatch

PACKAGE = Path(megatron_tropd.__file__).parent
FOREIGN = ("megatron.", "torch", "transformers", "vllm")


def resolved(dotted: str) -> Any:
    """Import the longest module of a dotted name, and look the rest up."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ImportError(dotted)


def foreign_assignments(path: Path) -> Iterator[str]:
    """Dotted targets of assignments to attributes of what a module has imported from elsewhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                (a.asname or a.name).split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Attribute):
                parts, base = [], target
                while isinstance(base, ast.Attribute):
                    parts.append(base.attr)
                    base = base.value  # type: ignore[assignment]
                if isinstance(base, ast.Name) and names.get(base.id, "").startswith(FOREIGN):
                    yield ".".join([names[base.id], *reversed(parts)])


# vLLM's are looked up where vLLM is: tests/vllm/test_vllm.py
@pytest.mark.parametrize(
    "patch", [p for p in PATCHES if not p.target.startswith("vllm.")], ids=lambda patch: patch.target.rsplit(".", 1)[-1]
)
def test_what_is_patched_is_there_to_be_patched(patch: ForeignPatch):
    resolved(patch.target)
    assert patch.reason and patch.ends


def test_every_foreign_attribute_that_is_assigned_is_listed_with_its_file():
    listed = {(patch.file, patch.target) for patch in PATCHES}
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    found = {(name, target) for name, path in files.items() for target in foreign_assignments(path)}
    assert found and found <= listed, found - listed
    megatron = {file for file, target in listed if target.startswith("megatron.")}
    assert all(file.startswith("engine/patches/") for file in megatron)


def test_an_assignment_in_disguise_is_seen(tmp_path: Path):
    code = "import torch\nfrom megatron.core import parallel_state as ps\ntorch.cuda.x = 1\nps.a.b = 2\nown.c = 3\n"
    (tmp_path / "module.py").write_text(code)
    assert list(foreign_assignments(tmp_path / "module.py")) == ["torch.cuda.x", "megatron.core.parallel_state.a.b"]
