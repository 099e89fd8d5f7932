"""docs/methods.md says what the code does: a section per preset, every option with its default, parts and costs."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import yaml
from omegaconf import OmegaConf

from megatron_tropd.config.loading import parse_config
from megatron_tropd.losses.multipliers import MISMATCHES
from megatron_tropd.losses.reduce import NORMALIZATIONS
from megatron_tropd.losses.support import ReverseTail
from megatron_tropd.methods import PRESETS, build_method, tropd
from megatron_tropd.methods.options import Multiplier, own_options, parse_options
from megatron_tropd.types import Needs, SupportKind

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs" / "methods.md"
EXAMPLES = sorted((ROOT / "examples" / "methods").glob("*.yaml"))
FAMILY, COMMON, GLANCE = "Options of the TrOPD family", "Options every method takes", "Presets at a glance"


@cache
def sections() -> dict[str, str]:
    """Text under every second-level heading."""
    _, *parts = re.split(r"^## (.+)$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    titles, texts = parts[::2], parts[1::2]
    assert len(set(titles)) == len(titles), "a heading appears twice"
    return dict(zip(titles, texts, strict=True))


def table_rows(section: str) -> list[list[str]]:
    """Cells of all table rows of a section, without headings and rulers."""
    rows = [line.strip("|").split("|") for line in sections()[section].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= set("-| ")]


def listed_options(section: str) -> dict[str, object]:
    """Option -> default as YAML reads it, from rows ``| `name` | `default` | meaning |``."""
    rows = [row for row in table_rows(section) if len(row) == 3 and row[0].startswith("`") and row[1].startswith("`")]
    return {name.strip("`"): yaml.safe_load(default.strip("`")) for name, default, _ in rows}


def effective(name: str) -> dict[str, object]:
    """What a reader takes the defaults of the preset ``name`` to be: its own table first, then what it refers to."""
    options = listed_options(COMMON)
    if "(#options-of-the-tropd-family)" in sections()[name]:
        options |= listed_options(FAMILY)
    return options | listed_options(name)


def test_every_preset_has_a_section_and_no_section_is_about_another():
    lower = {title for title in sections() if title == title.lower()}
    assert lower == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_option_stands_there_with_its_default(name):
    preset = PRESETS[name]
    expected = parse_options(preset.options, preset.defaults, method=name)
    written = effective(name)
    assert set(written) == set(preset.options.model_fields)
    read = parse_options(preset.options, written, method=name)
    for option, default in expected:
        # the page rounds log(0.1) / 0.9
        close = pytest.approx(default, rel=1e-5) if isinstance(default, float) else default
        assert getattr(read, option) == close, option


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_lists_its_own_options_or_refers_to_the_family(name):
    own = set(own_options(PRESETS[name].options))
    if PRESETS[name].options is tropd.TropdOptions:
        assert "(#options-of-the-tropd-family)" in sections()[name]
    else:
        assert own <= set(listed_options(name))
    # a default that differs from the common one must not hide in another section
    assert set(PRESETS[name].defaults) <= set(listed_options(name))


@pytest.mark.parametrize("name", PRESETS)
def test_a_section_holds_formula_source_use_costs_and_caveats(name):
    text = sections()[name]
    assert text.count("```") == 2, "one block with the loss by region"
    formula = text.split("```")[1]
    assert "CONTINUATION" in formula and "PREFIX" in formula and "gradient" in formula
    for label in ("**Source.**", "**Use it**", "**Costs**", "**Caveats.**"):
        assert text.count(label) == 1
    paper = re.search(r"arXiv (\d{4}\.\d{5})", PRESETS[name].source)
    assert paper is None or paper.group() in text
    assert f"`examples/methods/{name}.yaml`" in text


@pytest.mark.parametrize("name", PRESETS)
def test_the_glance_names_the_parts_and_needs(name):
    (row,) = [row for row in table_rows(GLANCE) if row[0] == f"[{name}](#{name})"]
    method = build_method(name)
    terms = [term.name for term in (method.trusted, method.outlier, method.extra, method.prefix)]
    yes_no = {True: "yes", False: "no"}
    assert row[1:] == [
        method.gate.name,
        *terms,
        method.schedule.name,
        asked(method.needs),
        yes_no[method.needs.old_logprob],
        yes_no[method.vanishes_at_teacher],
    ]


def asked(needs: Needs) -> str:
    parts = {
        f"top-{needs.top_k}": needs.top_k > 0,
        "hidden states": needs.hidden_states,
        "base log-probs": needs.base_model,
    }
    return ", ".join(part for part, wanted in parts.items() if wanted) or "-"


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ("Gates", get_args(tropd.GateName)),
        ("Terms", get_args(tropd.TrustedTerm)),
        ("Supports and tails", (*get_args(SupportKind), *get_args(ReverseTail))),
        ("Prefix schedules", ("cosine", "linear", "constant", "none")),
        ("Normalization and weights", (*NORMALIZATIONS, *get_args(Multiplier), "truncate", "mask", "mask_first")),
        (COMMON, MISMATCHES),
    ],
)
def test_every_part_by_name_is_explained(section, names):
    quoted = set(re.findall(r"[\w.]+", " ".join(re.findall(r"`([^`]+)`", sections()[section]))))
    assert set(names) <= quoted


def test_every_link_within_the_page_leads_somewhere():
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in sections()}
    links = re.findall(r"\]\(#([^)]+)\)", DOCS.read_text(encoding="utf-8"))
    assert set(links) <= anchors
    assert set(PRESETS) <= set(links)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_valid_run_on_top_of_the_demo(path):
    demo = OmegaConf.load(ROOT / "examples" / "demo" / "demo.yaml")
    del demo["method"]
    config = parse_config(OmegaConf.to_container(OmegaConf.merge(demo, OmegaConf.load(path))))
    method = build_method(config.method.name, **config.method.options)
    assert method.name == path.stem
    assert config.rollout.samples_per_prompt + config.rollout.guided_per_prompt * method.guided > 0


def test_examples_and_presets_correspond():
    assert {path.stem for path in EXAMPLES} == set(PRESETS)
