"""Plants what would go wrong without a word, one defect at a time, and prints which test says it.

    python tools/plant_silent.py [NUMBER ...]

Every row breaks one thing that has to be said, refused or counted: ends of responses, a setting that a resumed run
forgets, a text that is read as finished. Works as ``plant_defects.py`` does, in a private copy. A few minutes.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("plant_defects", ROOT / "tools" / "plant_defects.py")
assert _spec is not None and _spec.loader is not None
plant_defects = sys.modules.setdefault("plant_defects", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(plant_defects)
Defect, Edit = plant_defects.Defect, plant_defects.Edit


def row(name: str, planted: str, path: str, old: str, new: str, caught_by: str) -> Defect:
    """One edit of one file, and the test that must fail."""
    edit = Edit(path=f"megatron_tropd/{path}", old=old, new=new)
    test = f"tests/{caught_by}"
    return Defect(name=name, planted=planted, edits=(edit,), caught_by=test, suites=(test,))


SILENT = (
    row(
        "adapters under sequence parallelism",
        "the gradient of a matrix that tensor ranks have alike is that of one rank's tokens",
        "engine/lora.py",
        "        parameter.sequence_parallel = axis is None and self.place.sequence",
        "        parameter.sequence_parallel = False",
        "ranks/test_adapters.py::test_every_gradient_is_that_of_peft",
    ),
    row(
        "an adapter's update is scaled",
        "alpha / rank is left out",
        "engine/lora.py",
        "        return output + self.spec.scale * self._up(h)\n",
        "        return output + self._up(h)\n",
        "ranks/test_adapters.py::test_logits_are_those_of_peft",
    ),
    row(
        "adapters of q, k and v stand where their rows do",
        "all of q, then k, then v, as if there were one group of heads",
        "engine/lora.py",
        "        return self.place.head_groups if self.linear.per_head_group else 1\n",
        "        return 1\n",
        "ranks/test_adapters.py::test_logits_are_those_of_peft",
    ),
    row(
        "ends of responses are one class",
        "an end keeps the log-prob of its own id",
        "losses/end_class.py",
        "    class_T = class_logprob(end_TX)\n    return torch.where(",
        "    class_T = end_TX[..., 0]\n    return torch.where(",
        "unit/losses/test_end_class.py::test_an_end_has_the_probability_of_all_ends",
    ),
    row(
        "products of bf16 are summed in fp32",
        "tiles are rounded to bf16",
        "losses/vocab_parallel/projection.py",
        "        self.product_dtype, self.device = statistics_dtype(hidden_TD), hidden_TD.device\n",
        "        self.product_dtype, self.device = hidden_TD.dtype, hidden_TD.device\n",
        "ranks/test_losses_precision.py::test_log_probs_top_k_tails_and_cached_tiles_are_exact_on_every_path",
    ),
    row(
        "a resumed run is the same run",
        "any difference is tolerated",
        "train/resume.py",
        "    return key.startswith(_MAY_CHANGE) and key not in (*_MUST_AGREE, *_NOT_THESE)\n",
        "    return True\n",
        "runs/test_resumed_runs.py::test_another_run_is_refused_by_what_differs",
    ),
    row(
        "a cut response teaches no end",
        "every response is taken for finished",
        "data/rows.py",
        "        return reason.lower() not in _CUT\n",
        "        return True\n",
        "unit/data/test_unread.py::test_a_response_that_a_server_says_was_cut_gets_no_end",
    ),
    row(
        "what nobody reads is named",
        "columns of other programs are passed over",
        "data/rows.py",
        "            if sentence := self._unread[name]:\n",
        "            if (sentence := self._unread[name]) and False:\n",
        "unit/data/test_unread.py::test_what_nobody_reads_is_said",
    ),
    row(
        "what stands before </think> is no answer",
        "the whole response is graded",
        "evaluate/thinking.py",
        "    answer = response[end:]\n",
        "    answer = response\n",
        "unit/evaluate/test_thinking.py::test_only_what_follows_the_thinking_is_the_answer",
    ),
    row(
        "nan passes no comparison",
        "the largest value ignores it",
        "parallel/arrays.py",
        "nan=math.inf, posinf=math.inf",
        "nan=0.0, posinf=math.inf",
        "unit/parallel/test_launch.py::test_the_largest_of_values_with_nan_among_them_passes_no_bound",
    ),
    row(
        "several tasks without torchrun are refused",
        "the variables of srun are not looked at",
        "parallel/launch.py",
        "        if count.isdecimal() and int(count) > 1:\n",
        "        if count.isdecimal() and int(count) > 1000000:\n",
        "unit/parallel/test_launch.py::test_one_of_several_tasks_without_torchrun_is_refused",
    ),
    row(
        "files of another kind are called what they are",
        "a Git LFS pointer is any text",
        "storage/kinds.py",
        "    if head.startswith(_LFS):\n",
        "    if head.startswith(_LFS) and not path:\n",
        "unit/storage/test_kinds.py::test_a_file_of_another_kind_is_called_what_it_is",
    ),
    row(
        "rope_scaling counts beside rope_parameters",
        "rope_parameters wins",
        "models/config_fields.py",
        '    table = config.get("rope_scaling") or config.get("rope_parameters") or {}\n',
        '    table = config.get("rope_parameters") or config.get("rope_scaling") or {}\n',
        "unit/convert/test_convert_files.py::test_rope_is_read_from_where_transformers_reads_it",
    ),
    row(
        "ids that were sampled are read bit for bit",
        "they are tokenized anew",
        "data/rows.py",
        "            if ids is not None:\n                return ids, finished\n",
        "            if ids is not None and not finished:\n                return ids, finished\n",
        "unit/data/test_data_responses.py::test_kept_ids_are_read_bit_for_bit_while_they_are_what_the_row_says",
    ),
    row(
        "answers of an evaluation say whether they ended",
        "all of them have",
        "evaluate/suites.py",
        "            finished=rollout.finished,\n",
        "            finished=True,\n",
        "unit/evaluate/test_evaluation_suites.py::test_every_answer_of_a_kept_suite_is_a_line_beside_the_evaluation",
    ),
    row(
        "a teacher's own template is noticed",
        "two templates are alike",
        "setup/chat_templates.py",
        "    return sources[0] == sources[1] and ends[0] == ends[1]\n",
        "    return True\n",
        "unit/setup/test_chat_templates.py::test_both_renderings_are_shown_and_a_warning_says_that_they_differ",
    ),
    row(
        "a response ends where the template ends it",
        "all that the template writes is the response",
        "data/responses.py",
        "            return ids[: ends[0] + 1]\n",
        "            return ids\n",
        "unit/data/test_data_responses.py::test_prompt_and_response_are_the_ids_of_the_whole_conversation",
    ),
    row(
        "tests of programs have failed once",
        "they are believed at once",
        "evaluate/grader_pool.py",
        "    if not reference.probes:\n",
        "    if reference.probes or not reference.probes:\n",
        "unit/evaluate/test_code_references.py::test_tests_that_let_a_program_pass_that_does_nothing_are_refused",
    ),
    row(
        "recordings are one run's",
        "whoever comes may record",
        "rollout/recording.py",
        "    if not steps or (recorded is None and resumed):\n",
        "    if steps is not None:\n",
        "unit/rollout/test_rollout_recording.py::test_the_rollouts_of_one_run_never_mix_into_another_s",
    ),
    row(
        "metrics of minibatches are means over tokens",
        "means over minibatches",
        "engine/step.py",
        "    loss = sum(result.loss * result.weight for result in results) / total if total > 0 else 0.0\n",
        "    loss = sum(result.loss for result in results) / len(results)\n",
        "unit/engine/test_step_means.py::"
        "test_minibatches_of_unequal_sizes_give_the_mean_over_tokens_not_over_minibatches",
    ),
    row(
        "no prompt is skipped, none comes twice",
        "another train.prompts_per_step is tolerated",
        "train/resume.py",
        '_NOT_THESE = ("train.prompts_per_step",)\n',
        "_NOT_THESE = ()\n",
        "runs/test_resumed_runs.py::"
        "test_another_number_of_prompts_per_step_would_skip_some_or_repeat_them_and_is_refused",
    ),
    row(
        "an export has the tokenizer it came with",
        "it is not loaded again",
        "convert/companions.py",
        "    if _facts(given) != _facts(found):\n",
        "    if _facts(given) != _facts(given):\n",
        "unit/convert/test_other_files.py::"
        "test_an_export_whose_tokenizer_is_not_the_one_it_came_with_does_not_count_as_done",
    ),
)


def left_out(folder: str, names: list[str]) -> set[str]:
    """What is not copied; ``tests/runs`` is no directory of runs."""
    found: set[str] = plant_defects._LEFT_OUT(folder, names)
    return found if Path(folder) == ROOT else found - {"runs"}


def main(numbers: list[str]) -> None:
    """Plant the rows of these numbers, or all of them, and print what catches each."""
    chosen = [(i, one) for i, one in enumerate(SILENT, start=1) if not numbers or str(i) in numbers]
    survived = []
    with tempfile.TemporaryDirectory(prefix="tropd-silent-") as folder:
        healthy, copy = Path(folder) / "healthy", Path(folder) / "planted"
        shutil.copytree(ROOT, healthy, ignore=left_out)
        for number, defect in chosen:
            shutil.copytree(healthy, copy)
            plant_defects.plant(defect, copy)
            failing = plant_defects.failures(copy, defect.suites)
            shutil.rmtree(copy)
            survived += [] if defect.caught_by in failing else [str(number)]
            verdict = f"`{defect.caught_by}`" if defect.caught_by in failing else "SURVIVES"
            print(f"| {number} | {defect.name} | {defect.planted} | {verdict} |", flush=True)
    if survived:
        raise SystemExit(f"survive: {', '.join(survived)}")


if __name__ == "__main__":
    main(sys.argv[1:])
