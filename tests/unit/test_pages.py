"""The pages hold what they say: generated tables, links, the README's Python, and their lengths."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_tropd.models.registry import FAMILIES
from megatron_tropd.report.metrics import metrics_reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_metrics_page_holds_the_table_of_metrics():
    assert metrics_reference() in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 1
    names: dict[str, object] = {}
    exec(code[0], names)
    assert "top_k=64" in capsys.readouterr().out
    # -sum log softmax(h W^T)[ids]: by hand, from whole rows
    import torch

    hidden_TD, weight_VD, ids_TK = (names[name] for name in ("hidden_TD", "weight_VD", "ids_TK"))
    again = hidden_TD.detach().double().requires_grad_()
    logq_TV = (again @ weight_VD.detach().double().T).log_softmax(-1)
    (-logq_TV.gather(1, ids_TK[:, :1])).sum().backward()
    torch.testing.assert_close(hidden_TD.grad.double(), again.grad, rtol=1e-5, atol=1e-5)


def test_the_readme_fits_on_a_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 90


def test_every_family_has_a_row_in_the_table_of_conversion():
    page = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
    assert [name for name in FAMILIES if f"| `{name}` |" not in page] == []


def long_lines(text: str) -> list[int]:
    """Numbers of lines of more than 100 columns, in code of more than 120; rows of tables cannot be broken."""
    found, in_code = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        in_code ^= line.lstrip().startswith("```")
        if len(line) > (120 if in_code else 100) and not line.lstrip().startswith("|"):
            found.append(number)
    return found


def test_no_line_of_a_page_is_too_long():
    # two pages are called README.md
    found = {str(page.relative_to(ROOT)): long_lines(page.read_text(encoding="utf-8")) for page in PAGES}
    assert {name: numbers for name, numbers in found.items() if numbers} == {}
    wide = "x" * 101
    assert long_lines(f"{wide}\n| {wide} |\n```\n{wide}\n{wide}{wide}\n```\n{wide}") == [1, 5, 7]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


def test_the_example_for_own_models_is_a_configuration_of_their_size():
    from megatron_tropd.config.loading import load_config

    config = load_config(ROOT / "examples" / "own_models.yaml", check_paths=False)
    assert config.dtype == "bf16" and config.optimizer.lr <= 1e-5
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    assert longest <= config.train.pack_tokens


def test_the_example_for_adapters_is_a_configuration_that_trains_some():
    from megatron_tropd.config.loading import load_config

    config = load_config(ROOT / "examples" / "lora.yaml", check_paths=False)
    assert config.student.lora is not None and config.student.lora.rank == 16
    assert config.export.adapter is not None and config.optimizer.lr >= 1e-4
