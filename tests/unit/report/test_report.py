"""Metrics survive kills and restarts; the report shows what a run left and never trusts the text in it."""

from __future__ import annotations

import html.parser
import io
import json
import logging
import math
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.report import charts
from megatron_tropd.report.html import write_report
from megatron_tropd.report.metrics import METRICS, STEP_PARTS, unknown_names
from megatron_tropd.report.progress import TrainingProgress
from megatron_tropd.report.records import (
    AFTER,
    BEFORE,
    DURING,
    TEACHER,
    Evaluation,
    Sample,
    SampleToken,
    distance_closed,
    read_evaluations,
    read_samples,
    record_evaluations,
    record_samples,
)
from megatron_tropd.report.sinks import MetricsWriter, open_sinks, read_jsonl
from megatron_tropd.report.table import accuracy_table


def evaluation(model: str, accuracy: float, *, suite: str = "greedy", step: int | None = None) -> Evaluation:
    return Evaluation(
        model=model,
        suite=suite,
        accuracy=accuracy,
        low=max(accuracy - 0.05, 0.0),
        high=min(accuracy + 0.05, 1.0),
        problems=101,
        samples=1,
        mean_length=31.5,
        step=step,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --------------------------------------------------------------------------- metric names


def test_every_metric_has_a_meaning_and_every_step_part_is_one():
    assert all(metric.meaning.endswith(".") for metric in METRICS.values())
    assert {f"time_{part}" for part in STEP_PARTS} <= METRICS.keys()
    assert {metric.unit for name, metric in METRICS.items() if name.startswith("time_")} == {"s"}


def test_unknown_names_are_found_and_refused_when_strict(tmp_path: Path):
    assert unknown_names(["loss", "zloss", "step", "aloss"]) == ["aloss", "zloss"]
    assert unknown_names(["loss/math", "math/loss", "logprob_gap_mean/0-63"]) == ["math/loss"]  # of a source
    with (
        MetricsWriter(tmp_path / "m.jsonl", strict=True) as writer,
        pytest.raises(ValueError, match=r"\['zloss'\] are"),
    ):
        writer.write({"step": 0, "zloss": 1.0})
    assert (tmp_path / "m.jsonl").read_text() == ""


# --------------------------------------------------------------------------- metrics.jsonl


def test_each_step_is_one_line_readable_before_the_next(tmp_path: Path):
    with MetricsWriter(tmp_path / "run" / "metrics.jsonl") as writer:
        writer.write({"step": 0, "loss": 0.5})
        assert lines(writer.path) == [{"step": 0, "loss": 0.5}]
        writer.write({"step": np.int64(1), "loss": torch.tensor(0.25), "tokens": np.float32(3)})
    assert lines(writer.path)[1] == {"step": 1, "loss": 0.25, "tokens": 3.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_a_number_becomes_null(tmp_path: Path, value: float | None):
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.write({"step": 3, "loss": value})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 3, "loss": null}\n'


def test_a_line_without_step_is_refused(tmp_path: Path):
    with MetricsWriter(tmp_path / "m.jsonl") as writer, pytest.raises(ValueError, match="metrics need a step"):
        writer.write({"loss": 1.0})


def test_going_on_from_a_checkpoint_gives_the_file_of_an_uninterrupted_run(tmp_path: Path):
    def train(path: Path, first: int, last: int) -> None:
        with MetricsWriter(path) as writer:
            writer.truncate_after(first - 1)
            for step in range(first, last):
                writer.write({"step": step, "loss": 1 / (step + 3)})

    train(tmp_path / "whole.jsonl", 0, 7)
    train(tmp_path / "broken.jsonl", 0, 6)  # killed after step 5, checkpoint at the end of step 2
    train(tmp_path / "broken.jsonl", 3, 7)
    assert (tmp_path / "broken.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_starting_over_empties_the_file(tmp_path: Path):
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.write({"step": 0})
        writer.truncate_after(-1)
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_a_torn_last_line_is_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "lo')
    assert read_jsonl(path) == ([{"step": 0}], True)
    with caplog.at_level(logging.WARNING), MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": 2.0})
    assert lines(path) == [{"step": 0}, {"step": 1, "loss": 2.0}]
    assert f'{path} ends in a torn line, dropped: {{"step": 1, "lo' in caplog.text


def test_a_last_line_that_lacks_only_its_line_break_is_kept(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    with MetricsWriter(path) as writer:
        writer.write({"step": 2})
    assert lines(path) == [{"step": 0}, {"step": 1}, {"step": 2}]


@pytest.mark.parametrize("bad", ["{oops", "[1]", "3"])
def test_a_bad_line_in_the_middle_is_named(tmp_path: Path, bad: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(
        DataError, match=r"metrics\.jsonl:2: not a JSON object .* Mend that line, or move the file away\."
    ):
        read_jsonl(path)


# --------------------------------------------------------------------------- optional sinks


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_the_numbers_of_the_run_and_forgets_steps_done_again(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped,unused-ignore]
        EventAccumulator,
    )

    with MetricsWriter(tmp_path / "metrics.jsonl", sinks=open_sinks(tmp_path, tensorboard=True)) as writer:
        for step, loss in enumerate([4.0, math.nan, 2.0, 1.0]):
            writer.write({"step": step, "loss": loss})
        writer.truncate_after(2)
        writer.write({"step": 3, "loss": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 4.0), (2, 2.0), (3, 0.5)]


@pytest.mark.parametrize(
    ("module", "asked", "message"),
    [
        ("torch.utils.tensorboard", {"tensorboard": True}, "report.tensorboard = true needs the package tensorboard"),
        ("wandb", {"wandb": "p"}, "report.wandb = 'p' needs the package wandb, which is not installed"),
    ],
)
def test_a_sink_whose_package_is_missing_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, asked: dict[str, Any], message: str
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_sinks(tmp_path, **asked)


def test_no_sink_is_opened_unasked(tmp_path: Path):
    assert open_sinks(tmp_path) == []


def test_wandb_goes_on_with_the_same_run_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """W&B itself needs a network; a stand-in with its three calls records what it is told."""
    calls: list[Any] = []

    def init(**settings: Any) -> types.SimpleNamespace:
        calls.append(settings)
        return run

    run = types.SimpleNamespace(log=lambda metrics, step: calls.append((step, metrics)), finish=lambda: None)
    # no more of it than there is: wandb.util.generate_id was, until 0.31
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in range(2):
        sinks = open_sinks(tmp_path / "first", wandb="project", config={"seed": 3})
        with MetricsWriter(tmp_path / "first" / "metrics.jsonl", sinks=sinks) as writer:
            writer.write({"step": step, "loss": 0.5, "lr": math.nan})
    settings = calls[0]
    assert (settings["project"], settings["name"], settings["config"]) == ("project", "first", {"seed": 3})
    assert calls[2] == settings and settings["resume"] == "allow"
    assert settings["id"] == (tmp_path / "first" / "wandb_id").read_text().strip() != ""
    assert (calls[1], calls[3]) == ((0, {"loss": 0.5}), (1, {"loss": 0.5}))


# --------------------------------------------------------------------------- evaluations, samples, table


def test_evaluations_are_added_and_repeated_ones_replaced(tmp_path: Path):
    record_evaluations(tmp_path, [evaluation(BEFORE, 0.5), evaluation(DURING, 0.6, step=10)])
    record_evaluations(tmp_path, [evaluation(BEFORE, 0.4), evaluation(DURING, 0.7, step=20), evaluation(TEACHER, 1.0)])
    found = [(e.model, e.accuracy, e.step) for e in read_evaluations(tmp_path)]
    assert found == [(BEFORE, 0.4, None), (DURING, 0.6, 10), (DURING, 0.7, 20), (TEACHER, 1.0, None)]
    # the end of a run that goes on moves, and is there once
    for step in (30, 40):
        record_evaluations(tmp_path, [evaluation(AFTER, step / 100, step=step)])
    assert [(e.accuracy, e.step) for e in read_evaluations(tmp_path)[4:]] == [(0.4, 40)]


def test_samples_of_one_moment_are_replaced_together(tmp_path: Path):
    token = SampleToken(text="4", region="prefix", trusted=None, log_ratio=-0.5)
    before = Sample(when="before", prompt="2+2", tokens=(token,), answer="4", correct=True)
    record_samples(tmp_path, [before, Sample(when="before", prompt="3+3", tokens=())])
    after = Sample(when="after", prompt="2+2", tokens=())
    record_samples(tmp_path, [after])
    record_samples(tmp_path, [before])
    assert read_samples(tmp_path) == [after, before]


def test_files_of_another_program_are_refused(tmp_path: Path):
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match=r"evaluation\.json is not valid JSON .* evaluate again"):
        read_evaluations(tmp_path)
    (tmp_path / "evaluation.json").write_text('[{"model": "teacher"}]')
    with pytest.raises(DataError, match=r"evaluation\.json: .*missing.*suite"):
        read_evaluations(tmp_path)


def test_distance_closed_is_the_share_of_the_gap_to_the_teacher():
    trio = [evaluation(BEFORE, 0.5), evaluation(AFTER, 0.8), evaluation(TEACHER, 0.9)]
    assert distance_closed(trio, "greedy") == pytest.approx(0.75)
    assert distance_closed(trio[:2], "greedy") is None
    for accuracy in (0.5, 0.4):  # no gap to close
        assert distance_closed([*trio[:2], evaluation(TEACHER, accuracy)], "greedy") is None
    other = [evaluation(model, accuracy, suite="other") for model, accuracy in ((BEFORE, 0.2), (AFTER, 0.3))]
    assert distance_closed([*trio, *other], "greedy") == pytest.approx(0.75)
    assert distance_closed([*trio, *other], "other") is None


def test_table_shows_per_cent_with_intervals_and_fits_a_terminal():
    trio = [
        evaluation(model, accuracy, suite=suite)
        for suite in ("greedy", "mean@4 T=0.6", "mean@4 T=1")
        for model, accuracy in ((BEFORE, 0.535), (AFTER, 0.953), (TEACHER, 0.998))
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(accuracy_table(trio))
    rows = [re.sub(r"\s+", " ", line).strip() for line in console.export_text().splitlines()]
    assert "student before 53.5 [48.5, 58.5] 53.5 [48.5, 58.5] 53.5 [48.5, 58.5]" in rows
    assert "teacher 99.8 [94.8, 100.0] 99.8 [94.8, 100.0] 99.8 [94.8, 100.0]" in rows
    assert "distance closed 90% 90% 90%" in rows


def test_table_leaves_out_who_was_not_evaluated():
    assert accuracy_table([evaluation(BEFORE, 0.5)]).row_count == 1
    assert accuracy_table([evaluation(BEFORE, 0.5, step=0), evaluation(DURING, 0.6, step=4)]).row_count == 1
    assert accuracy_table([evaluation("student", 0.6)]).row_count == 1  # a model that happens to be called so


# --------------------------------------------------------------------------- progress


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "log file"])
def test_progress_shows_steps_and_metrics(terminal: bool):
    console = Console(record=True, force_terminal=terminal, width=120, file=io.StringIO())
    with TrainingProgress(9, done=7, console=console) as progress:
        progress.say("[not markup]")
        for _ in range(2):
            progress.update({"loss": 0.12345, "outlier_fraction": 0.071, "tokens_per_second": None})
    text = console.export_text()
    assert "9/9" in text and "loss 0.1235  outliers 7.1%" in text and "[not markup]" in text


def test_progress_is_silent_on_other_ranks():
    console = Console(record=True, force_terminal=True, file=io.StringIO())
    with TrainingProgress(2, enabled=False, console=console) as progress:
        progress.say("hello")
        progress.update({"loss": 1.0})
    assert console.export_text() == ""


# --------------------------------------------------------------------------- charts


def test_running_mean_ignores_gaps_and_keeps_them():
    values = np.array([1.0, np.nan, 3.0, 5.0, 7.0])
    np.testing.assert_allclose(charts._running_mean(values, window=3), [1.0, np.nan, 4.0, 5.0, 6.0])


def test_long_runs_are_thinned_to_means():
    thin = charts._thin(np.arange(1201.0))
    np.testing.assert_allclose(thin[:2], [1.0, 4.0])
    assert len(thin) == 401 and thin[-1] == 1200.0


def test_a_chart_is_responsive_labeled_and_has_the_colors_of_the_page():
    line = charts.Series(label="a", step=np.arange(3.0), value=np.array([1.0, np.nan, 2.0]))
    svg = charts.line_chart([line, line], alt='x <"y">')
    assert re.match(r'<svg role="img" aria-label="x &lt;&#34;y&#34;&gt;"', svg)
    head = svg[: svg.index(">")]
    assert "viewBox" in head and 'width="' not in head
    assert "var(--s1)" in svg and "var(--s2)" in svg and "#0102" not in svg
    assert charts.line_chart([line, line], alt='x <"y">') == svg


# --------------------------------------------------------------------------- the page


class Page(html.parser.HTMLParser):
    """Tags, attributes and visible text of a page; complains about tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta"}:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "title"):
            self.text += data

    def spans(self, kind: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == "span" and attrs.get("class") == kind]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "my-run"
    with MetricsWriter(run / "metrics.jsonl", strict=True) as writer:
        for step in range(33):
            writer.write(
                {
                    "step": step,
                    "loss": 1 / (step + 1),
                    "reverse_kl": 0.1,
                    "outlier_fraction": 0.2,
                    "student_entropy": 0.3,
                    "teacher_entropy": 0.2,
                    "grad_norm": 1.0,
                    "response_length": 30.0,
                    "prefix_length": math.nan if step > 20 else 20.0 - step,
                    "time_rollout": 0.5,
                    "time_rollout_hidden": 0.125,
                    "time_teacher": 0.25,
                    "time_step": 1.0,
                }
            )
    models = ((BEFORE, 0.535), (AFTER, 0.953), (TEACHER, 0.998))
    record_evaluations(run, [evaluation(model, accuracy) for model, accuracy in models])
    record_evaluations(run, [evaluation(DURING, 0.8, step=16)])
    tokens = (
        SampleToken(text="First ", region="prefix"),
        SampleToken(text="<b>3</b>", trusted=True, log_ratio=0.25),
        SampleToken(text="\n&4", trusted=False, log_ratio=-2.345),
        SampleToken(text="."),
    )
    record_samples(run, [Sample(when="before", prompt="<script>alert(1)</script>", tokens=tokens, correct=False)])
    record_samples(
        run, [Sample(when="after", prompt="<script>alert(1)</script>", tokens=tokens, answer=None, correct=True)]
    )
    (run / "config.yaml").write_text(
        "method: {name: tropd}\nstudent: {model: a/small}\nteacher: {model: b/large}\ntrain: {steps: 40}\nx: <i>\n"
    )
    return run


def test_report_tells_the_result_the_curves_and_the_configuration(run_dir: Path):
    path = write_report(run_dir)
    page = Page(path)
    text = re.sub(r"\s+", " ", page.text)
    assert path == run_dir / "report.html"
    assert "Greedy: the student went from 53.5 % to 95.3 %; the teacher is at 99.8 %" in text
    assert "90 % of the distance" in text
    assert "48.5 to 58.5" in text and "101 problems" in text and "33 of 40" in text
    for title in ("Loss", "Reverse KL", "Outlier fraction", "Entropy", "Gradient norm", "Response length"):
        assert any(
            attrs.get("aria-label") == f"{title} over training steps" for tag, attrs in page.tags if tag == "svg"
        )
    assert "Accuracy over steps" in text and "Prefix length" in text
    assert "x: <i>" in page.text


def test_report_shows_mean_at_n_and_pass_at_k_and_draws_them(run_dir: Path):
    for model, step, solved in ((BEFORE, 0, 0.25), (DURING, 16, 0.5), (AFTER, 33, 0.75)):
        one = evaluation(model, solved / 2, suite="sampled", step=step)
        record_evaluations(run_dir, [replace(one, samples=8, pass_at={"4": (solved, solved - 0.1, solved + 0.1)})])
    page = Page(write_report(run_dir))
    text = re.sub(r"\s+", " ", page.text)
    assert "12.5 % mean@8, 7.5 to 17.5 pass@4 25.0 %, 15.0 to 35.0" in text
    assert "37.5 % mean@8, 32.5 to 42.5 pass@4 75.0 %, 65.0 to 85.0" in text
    assert "mean@1" not in text  # one answer to a problem is no mean
    assert "Accuracy over steps" in text and "sampled: pass@4 over steps" in text
    drawn = [attrs.get("aria-label") for tag, attrs in page.tags if tag == "svg"]
    assert "sampled: pass@4 over steps, on held-out problems" in drawn


def test_report_without_several_samples_has_no_chart_of_pass_at_k(run_dir: Path):
    assert "over steps" in (page := write_report(run_dir).read_text()) and "pass@" not in page.split("<table")[1]


def test_report_breaks_the_mean_step_into_parts(run_dir: Path):
    text = re.sub(r"\s+", " ", Page(write_report(run_dir)).text)
    assert "rollout0.500 s50.0 %" in text and "teacher0.250 s25.0 %" in text
    assert "other0.250 s25.0 %" in text and "mean step1.000 s" in text
    assert "rollouts beside it0.125 s" in text  # they took none of the step's own time


def test_report_marks_tokens_by_region_and_gate(run_dir: Path):
    page = Page(write_report(run_dir))
    assert [span.get("title") for span in page.spans("trusted")] == ["trusted, log p/q = +0.25 nats"] * 2
    assert [span.get("title") for span in page.spans("outlier")] == ["outlier, log p/q = -2.35 nats"] * 2
    assert len(page.spans("prefix")) == len(page.spans("plain")) == 2
    assert "First <b>3</b>\n&4." in page.text
    assert "✗ wrong" in page.text and "✓ correct" in page.text


def test_report_runs_no_script_and_loads_nothing(run_dir: Path):
    page = Page(write_report(run_dir))
    assert "<script>alert(1)</script>" in page.text
    assert not {"script", "link", "img", "iframe", "b"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert not {name for name in attrs if name in ("src", "srcset") or name.startswith("on")}
        # charts refer to their own definitions only
        assert all((attrs.get(name) or "#").startswith("#") for name in ("href", "xlink:href"))
    assert "url(http" not in page.source and "@import" not in page.source
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_report_is_the_same_when_written_again(run_dir: Path):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_report_of_an_empty_run_says_what_is_missing(tmp_path: Path):
    text = Page(write_report(tmp_path)).text
    for missing in ("evaluation.json is missing", "metrics.jsonl is missing", "samples.jsonl is missing"):
        assert missing in text
    assert "config.yaml is missing" in text and "no prefix length" in text and "No times were measured" in text


def test_report_of_one_torn_step_is_still_written(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0, "lr": null}\n{"step": 1, "l')
    assert "The last line of metrics.jsonl was cut off" in Page(write_report(tmp_path)).text


def test_report_of_no_run_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"there is no run directory .*gone.* Give the run_dir of a run\."):
        write_report(tmp_path / "gone")


def test_long_answers_are_cut_with_a_note(tmp_path: Path):
    tokens = tuple(SampleToken(text="x ") for _ in range(1501))
    record_samples(tmp_path, [Sample(when="after", prompt="p", tokens=tokens)])
    page = Page(write_report(tmp_path))
    assert len(page.spans("plain")) == 1500 and "… 1 more tokens" in page.text


def test_every_metric_of_the_table_is_written_somewhere():
    """By its name, or as a part of a step that the stopwatch measures."""
    report = Path(charts.__file__).parent
    sources = [path for path in report.parent.rglob("*.py") if path != report / "metrics.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    parts = {f"time_{part}" for part in STEP_PARTS}
    assert [name for name in METRICS if f'"{name}"' not in text and name not in parts] == []
