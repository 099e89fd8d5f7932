"""Every place of the package that removes, renames, replaces, cuts or writes a path, found in its source.

Benchmarks are left out: they write files that the user names for it, and below directories that they make.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import megatron_tropd

PACKAGE = Path(megatron_tropd.__file__).parent
# calls by the last part of their name, whatever they are called on
_METHODS = {
    *("unlink", "rmtree", "rmdir", "removedirs", "rename", "renames", "truncate", "ftruncate", "copyfile", "copytree"),
    *("copy2", "write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "save_file"),
}
_OF_OS = {"remove", "replace", "link", "symlink", "move", "copy"}


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A function that changes paths, and the calls with which it does."""

    module: str
    function: str
    calls: tuple[str, ...]


def places() -> list[Place]:
    """All of them, in order."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        if module.startswith("benchmarks/"):
            continue
        calls: dict[str, list[str]] = {}
        for function, name in changes(path.read_text(encoding="utf-8")):
            calls.setdefault(function, []).append(name)
        found += [Place(module, function, tuple(sorted(names))) for function, names in calls.items()]
    return sorted(found)


def changes(source: str) -> Iterator[tuple[str, str]]:
    """Function (with its class) and call, of every call of a source text that changes a path."""

    def walk(node: ast.AST, where: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            inner = where
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{where}.{child.name}".lstrip(".")
            if isinstance(child, ast.Call) and (name := _change(child)):
                yield inner, name
            yield from walk(child, inner)

    return walk(ast.parse(source), "")


def _change(call: ast.Call) -> str | None:
    function = call.func
    name = (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )
    if name == "open":
        return _opening(call)
    if isinstance(function, ast.Attribute):
        of_os = isinstance(function.value, ast.Name) and function.value.id in ("os", "shutil")
        # str.replace takes two arguments, Path.replace one; list.remove is not os.remove
        one = name == "replace" and len(call.args) == 1 and not call.keywords
        if name in _METHODS or (of_os and name in _OF_OS) or (one and not _is_module(function.value)):
            return name
    return name if name in _METHODS else None


def _is_module(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("dataclasses", "re")


def _opening(call: ast.Call) -> str | None:
    """``open`` where it may write: its mode or its flags say so."""
    words = [
        part.value
        for argument in [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        for part in ast.walk(argument)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    modes = [word for word in words if len(word) <= 3 and set(word) <= set("rwaxbt+") and set(word) & set("wax+")]
    flags = {part.attr for part in ast.walk(call) if isinstance(part, ast.Attribute) and part.attr.startswith("O_")}
    if modes:
        return f"open {modes[0]}"
    return "open O_CREAT" if flags & {"O_CREAT", "O_TRUNC", "O_WRONLY"} else None


# --------------------------------------------------------------------------- what keeps each from a user's files


@dataclass(frozen=True, slots=True)
class Guard:
    """Why a place cannot touch what is a user's, and the test (of ``tests/``) or attack that has tried it."""

    why: str
    proof: str


_ASIDE = "tests/unit/storage/test_write_aside.py::"
_LOCKS = "tests/unit/storage/test_locks.py::"
_PUBLISH = "tests/unit/weight_sync/test_publish_directory.py::"
_RESUMED = "tests/runs/test_resumed_runs.py::"
_FILES = "tests/unit/convert/test_convert_files.py::"
_SANDBOX = "tests/system/test_sandbox.py::test_the_file_system_is_read_only_and_shows_nothing_of_ours"
_ATTACK = "tests/system/test_attacks.py::test_no_quick_attack_gets_through"
GUARDS: dict[tuple[str, str], Guard] = {
    ("storage/write_aside.py", "write_aside"): Guard(
        "under a name of its process, which must be new; the path itself is one that the program owns",
        _ASIDE + "test_what_a_killed_writer_leaves_is_removed_by_the_next_run_and_nothing_else",
    ),
    ("storage/write_aside.py", "remove_partials"): Guard(
        "names of that pattern whose process has ended and on which nobody holds a lock",
        _ASIDE + "test_what_a_killed_writer_leaves_is_removed_by_the_next_run_and_nothing_else",
    ),
    ("storage/write_aside.py", "rename_directory"): Guard(
        "to a name that was found free, or freed by the list of what this program wrote",
        _ASIDE + "test_a_directory_with_anything_of_the_users_is_refused_and_left",
    ),
    ("storage/owned.py", "remove_files"): Guard(
        "plain files of a list, one by one; directories once they are empty; links never",
        _ASIDE + "test_what_was_left_half_done_goes_but_for_what_is_not_ours",
    ),
    ("storage/owned.py", "_unlink"): Guard(
        "of these lists, plain files; the note that says whose a directory is goes last",
        _ASIDE + "test_removing_what_was_left_half_done_can_be_cut_short_anywhere",
    ),
    ("storage/locks.py", "take_lock"): Guard(
        "a file that is new or says that it is a lock of this program",
        _LOCKS + "test_a_file_of_the_users_is_no_lock_and_stays",
    ),
    ("storage/locks.py", "HeldLock.release"): Guard(
        "the file that it holds open, while it is locked", _LOCKS + "test_one_process_holds_a_lock_once"
    ),
    ("commands/init.py", "write_configuration"): Guard(
        "opened only where no file is",
        "tests/unit/commands/test_fitting.py::test_init_writes_what_one_line_says_and_leaves_a_file_that_is_there",
    ),
    ("commands/api.py", "_write_rows"): Guard(
        "a new name of its own, then the name that its content has, if nothing is there",
        "tests/unit/test_library.py::test_rows_are_written_once_under_the_name_of_their_content",
    ),
    ("convert/peft.py", "write_peft"): Guard(
        "its own note, in a directory aside that it has started",
        "tests/unit/convert/test_peft_files.py::test_a_directory_with_anything_of_the_users_is_left",
    ),
    ("data/hub.py", "_write"): Guard(
        "notes of its own folder and name, a day old",
        "tests/unit/data/test_hub.py::test_a_note_drops_those_of_launches_long_gone_and_nothing_else",
    ),
    ("setup/claims.py", "held_here"): Guard("directories that it made, if they are empty", _ATTACK),
    ("engine/checkpoint.py", "_write_whole"): Guard(
        "in `STEP.partial`, made anew; what is no checkpoint's there is moved aside", _ATTACK
    ),
    ("engine/megatron_layout.py", "save_for_megatron"): Guard("its own note, in `TARGET.partial`", _ATTACK),
    ("engine/megatron_layout.py", "_write_beside"): Guard("in `TARGET.partial`, made anew", _ATTACK),
    ("train/earlier_run.py", "set_aside"): Guard(
        "results by their names, renamed to a name that is free",
        _RESUMED + "test_a_fresh_run_moves_what_an_earlier_one_left_aside_and_removes_none_of_it",
    ),
    ("report/sinks.py", "MetricsWriter.__init__"): Guard(
        "appends to `RUN/metrics.jsonl`, under the run's lock", _ATTACK
    ),
    ("report/sinks.py", "MetricsWriter.truncate_after"): Guard(
        "lines that a resumed run writes anew; a run that goes back keeps a copy",
        _RESUMED + "test_going_back_moves_later_checkpoints_aside",
    ),
    ("data/response_file.py", "ResponseFile.__init__"): Guard(
        "takes back an `OUT` that the same command was just done with, by its inode, size and time", _ATTACK
    ),
    ("data/response_file.py", "ResponseFile.resume"): Guard(
        "`OUT.partial` whose description says that it is of the same command", _ATTACK
    ),
    ("data/response_file.py", "ResponseFile.append"): Guard("the same file, appended to", _ATTACK),
    ("data/response_file.py", "ResponseFile.finish"): Guard("an `OUT` that is there is kept as `OUT.1`, ...", _ATTACK),
    ("convert/writer.py", "HFWriter._handle"): Guard("in `TARGET.partial`, with this program's note in it", _ATTACK),
    ("convert/writer.py", "HFWriter._finish_file"): Guard("the same, from `FILE.part` to `FILE`", _ATTACK),
    ("convert/writer.py", "HFWriter.finish"): Guard(
        "its own note", _FILES + "test_a_finished_writer_replaces_all_that_was_there"
    ),
    ("convert/companions.py", "copy_companions"): Guard("into `TARGET.partial` alone", _ATTACK),
    ("weight_sync/publish_directory.py", "PublishDirectory.__init__"): Guard(
        "a new directory of its own", _PUBLISH + "test_weights_are_gone_with_the_process_that_published_them"
    ),
    ("weight_sync/publish_directory.py", "PublishDirectory.drop_all_but"): Guard(
        "folders in it", _PUBLISH + "test_older_versions_are_dropped_and_closing_twice_is_fine"
    ),
    ("weight_sync/publish_directory.py", "PublishDirectory.close"): Guard(
        "that directory", _PUBLISH + "test_weights_are_gone_with_the_process_that_published_them"
    ),
    ("weight_sync/publish_directory.py", "remove_abandoned"): Guard(
        "such directories of this user in which a lock lies that nobody holds",
        _PUBLISH + "test_the_next_run_removes_what_a_killed_one_left_and_nothing_of_a_living_one",
    ),
    ("weight_sync/publishers.py", "_write_bucket"): Guard(
        "in that directory", _PUBLISH + "test_weights_are_gone_with_the_process_that_published_them"
    ),
    ("commands/demo.py", "student_server"): Guard("appends to `RUN/server.log`", ""),
    ("commands/health.py", "_offer"): Guard("in a new folder whose name holds 128 random bits", _ATTACK),
    ("commands/health.py", "_try_shared"): Guard("that folder", _ATTACK),
    ("data/template_worker.py", "main"): Guard("/dev/null", ""),
    ("data/synthetic.py", "write_prompts"): Guard("the demo's own data, by examples alone", ""),
    ("evaluate/grader_worker.py", "main"): Guard("/dev/null", ""),
    ("evaluate/memory_limit.py", "open_group"): Guard("a group of its own below /sys/fs/cgroup", ""),
    ("evaluate/memory_limit.py", "MemoryGroup.close"): Guard("that group, once it is empty", ""),
    ("evaluate/sandbox_child.py", "_enter_namespaces"): Guard("its own maps in /proc/self", _SANDBOX),
    ("evaluate/sandbox_child.py", "_make_root"): Guard("in a new file system in memory", _SANDBOX),
    ("evaluate/sandbox_child.py", "_run"): Guard("in a new temporary directory", _SANDBOX),
    ("evaluate/sandbox_child.py", "_show"): Guard("in a new file system in memory", _SANDBOX),
    ("evaluate/sandbox_child.py", "main"): Guard("its own limits in /proc/self", _SANDBOX),
    ("evaluate/sandbox_driver.py", "main"): Guard("in a new temporary directory", _SANDBOX),
    ("evaluate/sandbox_driver.py", "probe"): Guard("in a new temporary directory", _SANDBOX),
}


# --------------------------------------------------------------------------- the list, for people

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
HEADING = "## Every place that changes a path"
_ABOVE = f"""{HEADING}

Written by `python -m tests.support.path_changes`, and compared with the source by
`tests/unit/storage/test_path_changes.py`. *attack* is `python tools/attack.py paths`, in which a
file of a user's lies in the way and must survive.

| place | calls | what keeps it from a user's files | tried by |
|---|---|---|---|
"""


def section() -> str:
    """The last section of docs/reliability.md."""
    rows = []
    for place in places():
        guard = GUARDS[place.module, place.function]
        name = guard.proof.rpartition("::")[2]
        tried = "*attack*" if guard.proof == _ATTACK else f"`{name}`" if name else "nothing of a user's is there"
        calls = ", ".join(dict.fromkeys(place.calls))
        rows.append(f"| `{place.module}` `{place.function}` | {calls} | {guard.why} | {tried} |")
    return _ABOVE + "\n".join(rows) + "\n"


def main() -> None:
    """Write the section anew."""
    PAGE.write_text(PAGE.read_text(encoding="utf-8").partition(HEADING)[0] + section(), encoding="utf-8")


if __name__ == "__main__":
    main()
