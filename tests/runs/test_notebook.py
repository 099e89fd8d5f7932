"""The notebook runs from its first cell to its last, with few steps and few problems."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.run_inputs import ROOT, commands

NOTEBOOK = ROOT / "examples" / "demo.ipynb"


def code_of(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cells(cells: list[str]) -> None:
    """Runs them one after the other, as a kernel does."""
    import matplotlib

    matplotlib.use("Agg")
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), names)


def test_the_notebook_runs_to_its_end(tmp_path: Path):
    cells = code_of(NOTEBOOK)
    small = {"STEPS, PROBLEMS = 80, 128": "STEPS, PROBLEMS = 2, 3", 'Path("runs/notebook")': f'Path("{tmp_path}/run")'}
    for given, put in small.items():
        assert sum(given in cell for cell in cells) == 1
        cells = [cell.replace(given, put) for cell in cells]
    job = commands().start(
        json.dumps([cells]), function="tests.runs.test_notebook:run_cells", cwd=NOTEBOOK.parent, TQDM_DISABLE="1"
    )
    outcome = job.wait().expect_success()
    for model in ("student before", "student after", "teacher"):
        assert f"{model:16} " in outcome.output
    assert (tmp_path / "run" / "student" / "README.md").is_file()


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
