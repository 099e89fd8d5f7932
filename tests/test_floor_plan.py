"""The floor plan is a test: which room may import which, and who may know Megatron-Core."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_tropd
from megatron_tropd.methods import PRESETS

PACKAGE = Path(megatron_tropd.__file__).parent

# low to high: a room imports from lower floors only, never from its own floor
FLOORS = (
    ("errors", "types", "_C"),
    ("config", "parallel", "kernels", "health"),
    ("losses",),
    ("methods",),
    ("data",),
    ("convert", "bridge"),
    ("engine",),
    ("rollout", "teacher"),
    ("report", "selfcheck"),
    ("evaluation", "reading"),
    ("inputs",),
    ("build", "planning"),
    ("batches",),
    ("loop", "plan", "generate", "serve", "score", "conversion", "demo"),
    ("samples", "resume", "preemption"),
    ("session",),
    ("cli",),
    ("__main__", "benchmarks"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
COMMUNICATES = {
    "health",
    "parallel",
    "bridge",
    "engine",
    "teacher",
    "rollout",
    "selfcheck",
    "evaluation",
    "inputs",
    "build",
    "batches",
    "loop",
    "plan",
    "planning",
    "generate",
    "score",
    "conversion",
    "samples",
    "resume",
    "preemption",
    "session",
    "cli",
    "benchmarks",
}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """``losses`` for ``losses/terms.py``; ``config`` for ``config.py`` and its parts ``_config_*.py``."""
    name = module.split("/")[0].removesuffix(".py")
    return "config" if name.startswith("_config_") else name


def imports_of(module: str) -> Iterator[str]:
    """Absolute dotted names of all that a module imports, wherever in the file: ``a.b.c`` for ``from a.b import c``."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{module}:{node.lineno}: write the import in full, so that rooms can be read off it."
            )
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported_by(module: str) -> set[str]:
    names = (name.split(".") for name in imports_of(module))
    return {room_of(parts[1]) for parts in names if parts[0] == "megatron_tropd" and parts[1] != "__version__"}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__.py"])
def test_a_module_imports_from_lower_floors_only(module):
    room = room_of(module)
    assert room in FLOOR, f"{module} is in no room of the floor plan: give {room!r} a floor in this file."
    wrong = {other for other in rooms_imported_by(module) - {room} if FLOOR[other] >= FLOOR[room]}
    assert not wrong, f"{module} (floor {FLOOR[room]}) imports {', '.join(sorted(wrong))}, which is not below it."


def test_the_package_itself_imports_no_room():
    assert not rooms_imported_by("__init__.py")


@pytest.mark.parametrize("module", [m for m in MODULES if m != "parallel/groups.py" and room_of(m) != "engine"])
def test_only_the_engine_and_the_process_groups_know_megatron_core(module):
    assert not [name for name in imports_of(module) if name.split(".")[0] == "megatron"]


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) not in COMMUNICATES | {"losses"}])
def test_rooms_that_only_compute_import_no_collectives(module):
    names = {name for name in imports_of(module) if name.startswith(("torch.distributed", "megatron_tropd.parallel"))}
    assert not names


@pytest.mark.parametrize(
    "module", [m for m in MODULES if room_of(m) in {"engine", "teacher", "rollout", "build", "batches", "loop"}]
)
def test_the_trainer_never_names_a_method(module):
    nodes = ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8")))
    assert not {node.value for node in nodes if isinstance(node, ast.Constant)} & set(PRESETS)


def test_the_floor_plan_sees_an_import_in_every_disguise(tmp_path, monkeypatch):
    source = "import megatron_tropd.loop\ndef f():\n    from megatron_tropd import engine\n"
    (tmp_path / "module.py").write_text(source + "    from megatron_tropd._config_errors import explain\n")
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    assert rooms_imported_by("module.py") == {"loop", "engine", "config"}
