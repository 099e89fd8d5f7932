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
        "    return key.startswith(_MAY_CHANGE) and key not in _MUST_AGREE\n",
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
        "batches of another train.prompts_per_step are counted from the run's beginning",
        "train/rollout_queue.py",
        "        self._places = self._places.changed(unsampled, self._run.train.prompts_per_step)\n",
        "        self._places = StepPlaces.of(self._run.train.prompts_per_step)\n",
        "runs/test_rollout_queue.py::test_an_epoch_over_a_change_of_prompts_per_step_asks_every_prompt_once",
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
    row(
        "a class of ends is in a divergence's gradient before it is rounded",
        "its columns keep the gradient of ids by themselves",
        "losses/vocab_parallel/divergence.py",
        "            if plan.ends is not None and of_ends_TX is not None:\n                plan.ends.put(",
        "            if plan.ends is not None and not tile and of_ends_TX is not None:\n                plan.ends.put(",
        "ranks/test_losses_precision.py::test_ends_that_are_far_apart_cost_no_digits_where_they_are_one_class",
    ),
    row(
        "sampling stops at every end of the class",
        "it stops at the student's own",
        "setup/ends.py",
        "    return replace(tokenizer, eos_ids=(*tokenizer.eos_ids, *more)) if more else tokenizer\n",
        "    return tokenizer\n",
        "unit/setup/test_ends.py::test_sampling_stops_at_all_of_them_the_own_end_first",
    ),
    row(
        "a teacher on ranks of its own is asked for the ends",
        "the order arrives without them",
        "teacher/engines/remote.py",
        '{"end_ids": tuple(request["end_ids"])}',
        '{"end_ids": ()}',
        "ranks/test_remote_teacher.py::test_an_order_arrives_as_it_was_given",
    ),
    row(
        "a resumed run has the settings of its command",
        "the optimizer's groups are the checkpoint's",
        "engine/optimizer.py",
        "for name, value in settings.items() if name not in _GROUP_STATE})\n",
        "for name, value in settings.items() if name not in settings})\n",
        "ranks/test_engine_optimizer.py::"
        "test_a_run_that_goes_on_has_its_own_learning_rate_schedule_decay_betas_and_eps",
    ),
    row(
        "different numbers are never equal",
        "a library's tolerance decides",
        "evaluate/mathematics.py",
        "def _numbers_differ(one: Any, other: Any) -> bool:\n",
        "def _numbers_differ(one: Any, other: Any) -> bool:\n    return abs(float(one) - float(other)) > 1e-6\n\n\n"
        "def _numbers_differ_indeed(one: Any, other: Any) -> bool:\n",
        "unit/evaluate/test_mathematics.py::test_different_numbers_are_never_equal",
    ),
    row(
        "a full disk is called that",
        "Megatron's error of a short write goes through as it is",
        "engine/checkpoint.py",
        "            short = any(text in str(error) for text in _SHORT_WRITES)\n",
        "            short = any(text in str(target) for text in _SHORT_WRITES)\n",
        "unit/engine/test_checkpoint_disk.py::test_a_full_disk_is_an_error_of_ours",
    ),
    row(
        "reverse KL on a bare support is warned of",
        "of another tail instead",
        "losses/terms.py",
        '    if tail == "none":\n        _warn_of_leaking_support()\n',
        '    if tail == "sampled":\n        _warn_of_leaking_support()\n',
        "unit/losses/test_losses_terms.py::test_reverse_kl_on_a_bare_support_warns_once_and_other_tails_never",
    ),
    row(
        "generation resumes where it was killed",
        "it begins again behind what is there",
        "commands/generate.py",
        "        for block in blocks[done[0] :]:\n",
        "        for block in blocks:\n",
        "runs/test_generate.py::test_a_killed_run_goes_on_and_ends_in_the_same_file",
    ),
    row(
        "a model that gives nan writes no answers",
        "nobody looks at its log-probs",
        "commands/generate.py",
        "            check_finite(rollouts, params, str(job.model.weights))\n",
        "",
        "runs/test_generate.py::test_a_model_that_gives_nan_is_refused_before_anything_is_written",
    ),
    row(
        "a library that is slow to load is named",
        "imports are no phase",
        "progress/phases.py",
        "            found = package if package != _OURS or not found else found\n",
        "            found = found if package else found\n",
        "unit/progress/test_phases.py::test_a_library_that_is_being_loaded_is_named_with_and_without_a_phase",
    ),
    row(
        "norms of gradients have their digits on a CPU",
        "squares are summed in fp32",
        "engine/patches/cuda_calls.py",
        "torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensors",
        "torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensors",
        "unit/engine/test_gradient_norm.py::test_the_norm_of_large_gradients_has_the_digits_of_fp64",
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
