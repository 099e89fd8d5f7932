"""The floor plan is a test: which room may import which, and who may know Megatron-Core."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import get_args

import megatron_tropd
from megatron_tropd.config.sections import RolloutEngine, TeacherEngine
from megatron_tropd.methods import PRESETS
from megatron_tropd.rollout.engines.registry import ROLLOUT_ENGINES
from megatron_tropd.teacher.engines.registry import TEACHER_ENGINES

PACKAGE = Path(megatron_tropd.__file__).parent

# low to high: a room imports from lower floors only, never from its own floor
FLOORS = (
    ("errors", "types", "_C"),
    ("storage", "progress"),
    ("config",),
    ("parallel",),
    ("losses",),
    ("models",),
    ("methods",),
    ("data",),
    ("convert", "vllm_bridge"),
    ("engine",),
    ("weight_sync",),
    ("rollout", "teacher"),
    ("report",),
    ("evaluate",),
    ("setup",),
    ("planning",),
    ("train",),
    ("commands",),
    ("cli",),
    ("__main__", "benchmarks"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
COMMUNICATES = {
    "parallel",
    "vllm_bridge",
    "engine",
    "weight_sync",
    "teacher",
    "rollout",
    "evaluate",
    "setup",
    "planning",
    "train",
    "commands",
    "cli",
    "benchmarks",
}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """``losses`` for ``losses/terms.py``, ``cli`` for ``cli.py``."""
    return module.split("/")[0].removesuffix(".py")


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


def strings_of(module: str) -> Iterator[tuple[int, str]]:
    """Line and value of every text constant of a module."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def rooms_imported_by(module: str) -> set[str]:
    names = (name.split(".") for name in imports_of(module))
    return {room_of(parts[1]) for parts in names if parts[0] == "megatron_tropd" and parts[1] != "__version__"}


def violations(of: Callable[[str], Iterable[str]], modules: Iterable[str] = MODULES) -> list[str]:
    """Every complaint that ``of`` has about a module, in one list."""
    return [f"{module}: {complaint}" for module in modules for complaint in of(module)]


def test_every_module_imports_from_lower_floors_only():
    def complaints(module: str) -> Iterator[str]:
        room = room_of(module)
        if room not in FLOOR:
            yield f"is in no room of the floor plan: give {room!r} a floor in this file."
            return
        for other in sorted(rooms_imported_by(module) - {room}):
            if FLOOR[other] >= FLOOR[room]:
                yield f"floor {FLOOR[room]} imports {other}, which is not below it."

    assert violations(complaints, [m for m in MODULES if m != "__init__.py"]) == []


# pairs of rooms of which one imports the other; benchmarks, which measure every room, aside. Lower it when you cut one
MOST_ARROWS = 151


def test_no_more_rooms_import_one_another_than_did():
    modules = [m for m in MODULES if m != "__init__.py" and room_of(m) != "benchmarks"]
    arrows = {(room_of(m), other) for m in modules for other in rooms_imported_by(m)}
    assert len({(room, other) for room, other in arrows if room != other}) <= MOST_ARROWS


def test_few_modules_lie_loose_at_the_top():
    assert {m for m in MODULES if "/" not in m} == {"__init__.py", "__main__.py", "cli.py", "errors.py", "types.py"}


def test_the_package_itself_imports_no_room():
    assert not rooms_imported_by("__init__.py")


def test_only_engine_models_and_process_groups_know_megatron_core():
    def complaints(module: str) -> Iterator[str]:
        if module != "parallel/groups.py" and room_of(module) not in {"engine", "models"}:
            yield from (name for name in imports_of(module) if name.split(".")[0] == "megatron")

    assert violations(complaints) == []


def test_rooms_that_only_compute_import_no_collectives():
    def complaints(module: str) -> Iterator[str]:
        if room_of(module) not in COMMUNICATES and not module.startswith("losses/vocab_parallel/"):
            own = ("torch.distributed", "megatron_tropd.parallel")
            yield from (name for name in imports_of(module) if name.startswith(own))

    assert violations(complaints) == []


def test_the_trainer_never_names_a_method():
    def complaints(module: str) -> Iterator[str]:
        if room_of(module) in {"engine", "teacher", "rollout", "setup", "train"}:
            nodes = ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8")))
            yield from {node.value for node in nodes if isinstance(node, ast.Constant)} & set(PRESETS)

    assert violations(complaints) == []


def test_only_its_own_files_and_its_row_know_an_engine_by_name():
    """Everybody else reads a capability off the row."""
    names = {*get_args(RolloutEngine), *get_args(TeacherEngine)}
    own = ("rollout/engines/", "teacher/engines/", "vllm_bridge/", "config/sections.py")

    def complaints(module: str) -> Iterator[str]:
        if not module.startswith(own):
            yield from (f"line {line} names {text!r}" for line, text in strings_of(module) if text in names)

    assert violations(complaints) == []


def test_every_engine_has_a_row():
    assert set(ROLLOUT_ENGINES) == set(get_args(RolloutEngine))
    assert set(TEACHER_ENGINES) == set(get_args(TeacherEngine))


def test_only_setup_the_session_and_the_commands_see_the_whole_configuration():
    """Other rooms take the sections, or the values, that they need."""

    def complaints(module: str) -> Iterator[str]:
        if room_of(module) not in {"config", "setup", "commands"} and module != "train/session.py":
            yield from (name for name in imports_of(module) if name.startswith("megatron_tropd.config.run"))

    assert violations(complaints) == []


def test_no_public_class_name_stands_for_two_things():
    found: dict[str, list[str]] = {}
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(f"{module}:{node.lineno}")
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_the_floor_plan_sees_an_import_in_every_disguise(tmp_path, monkeypatch):
    source = "import megatron_tropd.train\ndef f():\n    from megatron_tropd import engine\n"
    (tmp_path / "module.py").write_text(source + "    from megatron_tropd.config.messages import explain\n")
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    assert rooms_imported_by("module.py") == {"train", "engine", "config"}
