"""A page of several runs says which is which, what differs, and follows runs that go on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_tropd.errors import DataError, StorageError
from megatron_tropd.report.comparison import MOST_RUNS, differences, write_comparison
from megatron_tropd.report.html import write_report
from megatron_tropd.report.records import AFTER, BEFORE, Evaluation, record_evaluations
from megatron_tropd.report.settings import flat
from megatron_tropd.report.watch import signature, watch


def a_run(folder: Path, *, lr: str, accuracy: float, steps: int = 3) -> Path:
    folder.mkdir(parents=True)
    rows = [{"step": n + 1, "loss": 0.5 / (n + 1), "reverse_kl": 0.25, "lr": 0.1} for n in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = f"run_dir: {folder}\nseed: 3\nmethod: {{name: tropd}}\noptimizer: {{lr: {lr}}}\ntrain: {{steps: 3}}\n"
    (folder / "config.yaml").write_text(config)
    for model, right in ((BEFORE, 0.125), (AFTER, accuracy)):
        one = Evaluation(
            model=model, suite="greedy", accuracy=right, low=0.1, high=0.9, problems=8, samples=1, mean_length=3.0
        )
        record_evaluations(folder, [one])
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    first = a_run(tmp_path / "first", lr="0.001", accuracy=0.625)
    return [first, a_run(tmp_path / "<b>second", lr="0.004", accuracy=0.875)]


def test_runs_are_named_drawn_and_their_differences_listed(runs: list[Path], tmp_path: Path):
    page = write_comparison(runs, tmp_path / "all.html").read_text(encoding="utf-8")
    assert "2 runs compared" in page and "<strong>first</strong>" in page
    assert "&lt;b&gt;second" in page and "<b>second" not in page
    for words in ("62.5<small>", "87.5<small>", "before 12.5", "tropd, 3 of 3 steps"):
        assert words in page
    # of the configurations one key differs: run_dir is no difference
    keys = re.findall(r'<tr><th scope="row">(.*?)</th><td data-run="(.*?)">(.*?)</td>', page)
    assert keys == [("optimizer.lr", "first", "0.001")]
    # a line of each run in each chart, in the colors that name them
    charts = re.findall(r"<svg role=\"img\".*?</svg>", page, re.DOTALL)
    assert len(charts) == 3  # loss, reverse KL, learning rate
    assert all("var(--s1)" in chart and "var(--s2)" in chart for chart in charts)


def test_the_page_is_for_phones_and_the_dark_and_loads_nothing(runs: list[Path], tmp_path: Path):
    page = write_comparison(runs, tmp_path / "all.html").read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "@media (prefers-color-scheme: dark)" in page and "@media (max-width: 640px)" in page
    assert "default-src 'none'" in page and 'http-equiv="refresh"' not in page
    assert not re.search(r"<script|<link|<img|url\((?!#)|@import", page)
    # every color that is used is one that light and dark both say
    for scheme in (r":root \{(.*?)\}", r"dark\) \{\s*:root \{(.*?)\}"):
        said = set(re.findall(r"(--\w[\w-]*):", re.search(scheme, page, re.DOTALL)[1]))  # type: ignore[index]
        assert set(re.findall(r"var\((--[\w-]+)\)", page)) - {"--hue"} <= said


def test_a_run_without_a_line_is_left_out_of_a_chart_with_its_color(runs: list[Path], tmp_path: Path):
    (runs[0] / "metrics.jsonl").unlink()
    page = write_comparison(runs, tmp_path / "all.html").read_text(encoding="utf-8")
    charts = re.findall(r"<svg role=\"img\".*?</svg>", page, re.DOTALL)
    assert charts and all("var(--s2)" in chart and "var(--s1)" not in chart for chart in charts)


def test_what_cannot_be_compared_is_refused(runs: list[Path], tmp_path: Path):
    with pytest.raises(DataError, match="a run is given twice"):
        write_comparison([runs[0], runs[1] / ".." / "first"], tmp_path / "all.html")
    with pytest.raises(DataError, match="there is no run directory"):
        write_comparison([runs[0], tmp_path / "missing"], tmp_path / "all.html")
    many = [tmp_path / f"r{n}" for n in range(MOST_RUNS + 1)]
    for one in many:
        one.mkdir()
    with pytest.raises(DataError, match="8 runs are more than the 7"):
        write_comparison(many, tmp_path / "all.html")


def test_somebody_elses_page_is_left_alone_and_our_own_written_again(runs: list[Path], tmp_path: Path):
    out = tmp_path / "notes.html"
    out.write_text("<html>mine</html>")
    with pytest.raises(StorageError, match="left alone"):
        write_comparison(runs, out)
    assert out.read_text() == "<html>mine</html>"
    write_comparison(runs, tmp_path / "all.html")
    write_comparison(runs, tmp_path / "all.html")


def test_settings_are_compared_by_dotted_key():
    one = flat({"a": {"b": 1, "c": [1, 2]}, "d": None})
    assert one == {"a.b": "1", "a.c": "[1, 2]", "d": "null"}
    assert differences([one, {**one, "a.b": "2", "e": "x"}]) == [("a.b", ["1", "2"]), ("e", ["-", "x"])]


def test_watching_writes_after_every_change_and_at_the_end_without_reloading(tmp_path: Path):
    run, pages, told = a_run(tmp_path / "run", lr="0.1", accuracy=0.5, steps=1), [], []

    def write(refresh_s: int | None) -> Path:
        pages.append((refresh_s, len((run / "metrics.jsonl").read_text().splitlines())))
        return run / "report.html"

    def wait(seconds: float) -> None:
        assert seconds == 7
        waits.append(seconds)
        if len(waits) == 2:
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 2}\n')
        if len(waits) == 5:
            raise KeyboardInterrupt

    waits: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        watch([run], write, every_s=7, told=told.append, wait=wait)
    assert pages == [(7, 1), (7, 2), (None, 2)]
    assert told == [run / "report.html"]


def test_a_live_page_reloads_itself(tmp_path: Path):
    run = a_run(tmp_path / "run", lr="0.1", accuracy=0.5)
    before = signature([run])
    assert '<meta http-equiv="refresh" content="7">' in write_report(run, refresh_s=7).read_text()
    assert 'http-equiv="refresh"' not in write_report(run).read_text()
    assert signature([run]) == before  # the page is none of the files that it is made from
