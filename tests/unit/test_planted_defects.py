"""The ten planted defects of docs/correctness.md can still be planted, and their tests still exist."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


plant_defects = tool("plant_defects")
SILENT = tool("plant_silent").SILENT


@pytest.mark.parametrize("defect", (*plant_defects.DEFECTS, *SILENT), ids=lambda defect: defect.name)
def test_defect_can_be_planted_and_its_test_exists(defect, tmp_path):
    for path in {edit.path for edit in defect.edits}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    plant_defects.plant(defect, tmp_path)
    for path in {edit.path for edit in defect.edits}:
        planted = (tmp_path / path).read_text(encoding="utf-8")
        compile(planted, path, "exec")
        assert planted != (ROOT / path).read_text(encoding="utf-8")
    file, function = defect.caught_by.split("::")
    assert file in defect.suites or defect.caught_by in defect.suites
    assert re.search(rf"^def {function}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_code_that_has_moved_on_is_named(tmp_path):
    defect = plant_defects.DEFECTS[5]
    (tmp_path / defect.edits[0].path).parent.mkdir(parents=True)
    (tmp_path / defect.edits[0].path).write_text("nothing like it\n")
    with pytest.raises(
        ValueError, match=r"'truncated KL clamped at 0': megatron_tropd/losses/support.py holds 0 times"
    ):
        plant_defects.plant(defect, tmp_path)


def test_the_page_has_a_row_for_each_defect_and_names_its_test():
    text = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- table: defects -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert found
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1].splitlines()[2:]]
    assert [row[:2] for row in rows] == [[d.name, d.planted] for d in plant_defects.DEFECTS]
    for row, defect in zip(rows, plant_defects.DEFECTS, strict=True):
        assert defect.caught_by.removeprefix("tests/") in row[2]
