"""Plants the field's known defects in a private copy of the package, one at a time, and writes down what catches them.

    python tools/plant_defects.py [NAME ...]

The copy lies in a temporary directory. For each defect the tests of its suites run there; what fails goes into the
table of docs/correctness.md (when all defects were planted). A test that fails without any defect ends the run, and so
does a defect that survives. Ten to twenty minutes on two cores.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ("tests/ranks/test_losses_parity.py", "tests/unit/losses/test_losses_terms.py")
LAYOUTS, METHODS = "tests/ranks/test_engine_layouts.py", "tests/unit/methods/test_methods.py"
_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.egg-info", ".*_cache", "__pycache__")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change: a text that the file holds exactly once, and what takes its place."""

    path: str
    old: str
    new: str


@dataclass(frozen=True, kw_only=True)
class Defect:
    """A defect shipped elsewhere and how it is planted here."""

    name: str
    planted: str  # for the table
    edits: tuple[Edit, ...]
    caught_by: str  # a test that must fail: file::function
    suites: tuple[str, ...] = LOSSES


DEFECTS = (
    Defect(
        name="plain all-reduce, without a backward, inside the graph",
        planted="what the softmax Jacobian of reverse KL and JSD subtracts, a mean under q, is this shard's part of it",
        edits=(
            Edit(
                path="megatron_tropd/losses/vocab_parallel/divergence.py",
                old="    kl_2T = all_reduce_sum(_local_mixture_kl(pair, plan, student, teacher), plan.group)\n",
                new="    local_2T = _local_mixture_kl(pair, plan, student, teacher)\n"
                "    kl_2T = all_reduce_sum(local_2T.clone(), plan.group)\n",
            ),
            Edit(
                path="megatron_tropd/losses/vocab_parallel/divergence.py",
                old="    return student, teacher, loss_T, kl_2T[1]\n",
                new="    return student, teacher, loss_T, local_2T[1]\n",
            ),
            Edit(
                path="megatron_tropd/losses/vocab_parallel/divergence.py",
                old="full.kl_T, full.mean_gap_T",
                new="full.kl_T, local.mean_gap_T",
            ),
        ),
        caught_by="tests/ranks/test_losses_parity.py::test_no_gradient_of_any_objective_is_off_by_more_than_1e_5",
    ),
    Defect(
        name="replicated loss and a gather whose backward sums over ranks",
        planted="the gradient that comes in, equal on all ranks, is summed over them: everything times TP",
        edits=(
            Edit(
                path="megatron_tropd/losses/vocab_parallel/logprobs.py",
                old="        grad_TK, grad_entropy_T, grad_logsumexp_T, grad_logtail_T = grads\n",
                new="        group = ctx.plan.group\n"
                "        grads = tuple(None if g is None else all_reduce_sum(g.clone(), group) for g in grads)\n"
                "        grad_TK, grad_entropy_T, grad_logsumexp_T, grad_logtail_T = grads\n",
            ),
        ),
        caught_by="tests/ranks/test_losses_parity.py::test_no_gradient_of_any_objective_is_off_by_more_than_1e_5",
    ),
    Defect(
        name="truncated forward KL's gradient as q - p, without the mass factor",
        planted="`(1 - m_A) q_j` is added to the gradient of `tail: none`; values stay as they are",
        edits=(
            Edit(
                path="megatron_tropd/losses/vocab_parallel/logprobs.py",
                old="    logprob_TK, entropy_T, logsumexp_T, logtail_T = answer\n",
                new="    logprob_TK, entropy_T, logsumexp_T, logtail_T = answer\n"
                "    if logsumexp_T.requires_grad:\n"
                "        from megatron_tropd.losses import support\n\n"
                "        support.LAST = logsumexp_T\n",
            ),
            Edit(
                path="megatron_tropd/losses/support.py",
                old='    if tail != "bucket":\n        return kl_T\n',
                new='    if tail == "none" and "LAST" in globals() and not first_TK.requires_grad:\n'
                "        mass_T = first_TK.exp().sum(-1) if mask_TK is None else (first_TK.exp() * mask_TK).sum(-1)\n"
                "        return kl_T + (1.0 - mass_T) * (LAST - LAST.detach()) if LAST.shape == kl_T.shape else kl_T\n"
                '    if tail != "bucket":\n        return kl_T\n',
            ),
        ),
        caught_by="tests/ranks/test_losses_parity.py::test_no_gradient_of_any_objective_is_off_by_more_than_1e_5",
    ),
    Defect(
        name="out-of-shard ids at local index 0, assigned instead of added",
        planted="an id outside a tile points at its column 0, and gradients of ids are scattered by assignment",
        edits=(
            Edit(
                path="megatron_tropd/losses/vocab_parallel/backends/torch/softmax.py",
                old="        column_RK = true_RK.clamp(0, width - 1)\n",
                new="        column_RK = torch.where((true_RK >= 0) & (true_RK < width), true_RK, 0)\n",
            ),
            Edit(
                path="megatron_tropd/losses/vocab_parallel/backends/torch/softmax.py",
                old="        dlogits_Rw.scatter_add_(1, self.column_RK, grad_RK * self.inside_RK)\n",
                new="        at_RK = dlogits_Rw.gather(1, self.column_RK)\n"
                "        dlogits_Rw.scatter_(1, self.column_RK, at_RK + grad_RK * self.inside_RK)\n",
            ),
        ),
        caught_by="tests/ranks/test_losses_parity.py::test_no_gradient_of_any_objective_is_off_by_more_than_1e_5",
    ),
    Defect(
        name="a shard-local sum where backward needs the global one",
        planted="the sum of the ids' gradients leaves out ids that lie on other shards",
        edits=(
            Edit(
                path="megatron_tropd/losses/vocab_parallel/logprobs.py",
                old="            constant_T -= grad_TK.sum(-1)\n",
                new="            local_TK = ids_TK - plan.shard.start\n"
                "            constant_T -= (grad_TK * ((local_TK >= 0) & (local_TK < plan.shard.width))).sum(-1)\n",
            ),
        ),
        caught_by="tests/ranks/test_losses_parity.py::test_no_gradient_of_any_objective_is_off_by_more_than_1e_5",
    ),
    Defect(
        name="truncated KL clamped at 0",
        planted="`clamp(min=0)` on every divergence over a support",
        edits=(
            Edit(
                path="megatron_tropd/losses/support.py",
                old='    if tail != "bucket":\n        return kl_T\n',
                new='    if tail != "bucket":\n        return kl_T.clamp(min=0.0)\n',
            ),
        ),
        caught_by="tests/unit/losses/test_losses_terms.py::test_negative_truncated_forward_kl_keeps_its_gradient",
    ),
    Defect(
        name="mean of per-microbatch means",
        planted="each pack's loss is divided by its own weight, and the sum by the number of packs",
        edits=(
            Edit(
                path="megatron_tropd/engine/step.py",
                old="        loss = (answer.loss_T * weight_N).sum()\n",
                new="        loss = (answer.loss_T * weight_N).sum() / weight_N.sum().clamp(min=1e-6)\n",
            ),
            Edit(
                path="megatron_tropd/engine/step.py",
                old="        self._sums.denominator += weight_N.double().sum()\n",
                new="        self._sums.denominator += 1.0\n",
            ),
        ),
        caught_by=f"{LAYOUTS}::test_every_gradient_is_that_of_plain_autograd",
        suites=(LAYOUTS,),
    ),
    Defect(
        name="padding columns left in the softmax",
        planted="every row of the output weight counts as a token of the vocabulary",
        edits=(
            Edit(
                path="megatron_tropd/losses/vocab_parallel/tiles.py",
                old="width=min(max(vocab_size - start, 0), per_rank)",
                new="width=per_rank",
            ),
        ),
        caught_by="tests/ranks/test_losses_parity.py::test_no_gradient_of_any_objective_is_off_by_more_than_1e_5",
    ),
    Defect(
        name="detached top-k KL as the advantage",
        planted="`outlier_gradient: pg_scalar` is the default of `tropd`",
        edits=(
            Edit(
                path="megatron_tropd/methods/tropd.py",
                old='        "direct", "fkl_topk: its own gradient, or (script) a detached advantage"',
                new='        "pg_scalar", "fkl_topk: its own gradient, or (script) a detached advantage"',
            ),
        ),
        caught_by=f"{METHODS}::test_tropd_gives_each_token_the_term_of_its_kind",
        suites=(METHODS,),
    ),
    Defect(
        name="teacher scored by another engine than the trainer",
        planted="the teacher's hidden states pass through bf16 before its log-probabilities are taken",
        edits=(
            Edit(
                path="megatron_tropd/teacher/engines/megatron.py",
                old="        groups, device = self.model.groups, self.model.device\n",
                new="        groups, device = self.model.groups, self.model.device\n"
                "        hidden_ND = hidden_ND.bfloat16().to(hidden_ND.dtype)\n",
            ),
        ),
        caught_by=f"{LAYOUTS}::test_a_student_that_is_its_own_teacher_has_nothing_to_learn",
        suites=(LAYOUTS,),
    ),
)


def plant(defect: Defect, root: Path) -> None:
    """Apply the edits of a defect to the tree at ``root``. Raises ValueError when the code has moved on."""
    for edit in defect.edits:
        path = root / edit.path
        text = path.read_text(encoding="utf-8")
        if text.count(edit.old) != 1:
            raise ValueError(
                f"{defect.name!r}: {edit.path} holds {text.count(edit.old)} times {edit.old!r}. "
                "Plant the same defect in what stands there now."
            )
        path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")


def failures(root: Path, suites: tuple[str, ...]) -> dict[str, list[str]]:
    """Tests that fail in the tree at ``root``: ``file::function`` and the parameters it fails with."""
    report = root / "report.xml"
    report.unlink(missing_ok=True)
    # the page itself is no test of the code
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-k", "not page", f"--junitxml={report}", *suites]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            function, _, parameters = case.attrib["name"].partition("[")
            name = f"{case.attrib['classname'].replace('.', '/')}.py::{function}"
            found.setdefault(name, []).append(parameters.rstrip("]"))
    return found


def main(names: list[str]) -> None:
    """Plants the named defects, or all of them and writes the table."""
    unknown = set(names) - {defect.name for defect in DEFECTS}
    if unknown:
        raise SystemExit(f"no such defect: {', '.join(unknown)}. There are: {'; '.join(d.name for d in DEFECTS)}")
    chosen = [defect for defect in DEFECTS if not names or defect.name in names]
    lines = []
    with tempfile.TemporaryDirectory(prefix="tropd-defects-") as folder:
        healthy = Path(folder) / "healthy"
        shutil.copytree(ROOT, healthy, ignore=_LEFT_OUT)
        if failing := failures(healthy, tuple(sorted({suite for d in chosen for suite in d.suites}))):
            raise SystemExit(f"these tests fail without any defect: {', '.join(failing)}")
        for defect in chosen:
            copy = Path(folder) / "planted"
            shutil.copytree(healthy, copy)
            plant(defect, copy)
            failing = failures(copy, defect.suites)
            shutil.rmtree(copy)
            if defect.caught_by not in failing:
                raise SystemExit(f"SURVIVES: {defect.name!r}. {defect.caught_by} passes; failing: {list(failing)}")
            lines.append(row(defect, failing))
            print(lines[-1], flush=True)
    if not names:
        write(lines)


def row(defect: Defect, failing: dict[str, list[str]]) -> str:
    """The defect's row: the test that must catch it, with what parameters it failed, and how many others did."""
    test = defect.caught_by.removeprefix("tests/")
    parameters = sorted(p for p in failing[defect.caught_by] if p)
    shown = f" ({', '.join(parameters[:6])}{', ...' if len(parameters) > 6 else ''})" if parameters else ""
    others = len(failing) - 1
    also = f"; {others} other{'s' * (others > 1)}" if others else ""
    return f"| {defect.name} | {defect.planted} | `{test}`{shown}{also} |"


def write(lines: list[str]) -> None:
    """Replace the table on the page."""
    page = ROOT / "docs" / "correctness.md"
    content = "\n".join(["| defect | how it is planted | caught by |", "|---|---|---|", *lines])
    pattern = re.compile(r"(<!-- table: defects -->\n).*?(\n<!-- end -->)", re.DOTALL)
    text, count = pattern.subn(lambda match: match[1] + content + match[2], page.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{page} has {count} places for the table of defects")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
