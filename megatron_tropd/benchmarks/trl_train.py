"""Train with TRL's ``DistillationTrainer``, under the Python of ``make bench-trl``, which does not have this package.

``python trl_train.py FOLDER``, under torchrun, reads ``FOLDER/job.json`` and writes ``FOLDER/rank-N.json`` as
``marked_train`` does, with the parts of every step. Prompts come as token ids: tokenizers play no part.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class MarkedTrainer(DistillationTrainer):  # type: ignore[misc]
    """The trainer as it is, with a clock around its parts."""

    parts: dict[str, float]
    tokens: int

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [[int(token) for token in prompt.split()] for prompt in prompts], None, {}

    def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
        began = time.perf_counter()
        found: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self.parts["rollout"] = self.parts.get("rollout", 0.0) + time.perf_counter() - began
        self.tokens = int(found["num_items_in_batch"])
        return found

    def _get_last_hidden_state(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = super()._get_last_hidden_state(model, *args, **kwargs)
        if not torch.is_grad_enabled():
            self.parts["teacher"] = self.parts.get("teacher", 0.0) + time.perf_counter() - began
        return found


class Marks(TrainerCallback):  # type: ignore[misc]
    """Marks at the end of every step."""

    def __init__(self) -> None:
        self.trainer: MarkedTrainer | None = None
        self.steps: list[dict[str, Any]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.steps:
            self.mark()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.mark()

    def mark(self) -> None:
        trainer = self.trainer
        assert trainer is not None
        now = (time.perf_counter(), time.process_time())
        self.steps.append({"mark": now, "parts": dict(trainer.parts), "tokens": trainer.tokens})
        trainer.parts.clear()


def main(folder: Path) -> None:
    """Train the job's steps."""
    job = json.loads((folder / "job.json").read_text())
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    prompts = [" ".join(map(str, ids)) for batch in job["prompts"] for ids in batch for _ in range(job["samples"])]
    settings = DistillationConfig(
        output_dir=str(folder / "trl"),
        beta=1.0,  # reverse KL over the full vocabulary
        max_completion_length=job["max_new_tokens"],
        temperature=1.0,
        per_device_train_batch_size=len(job["prompts"][0]) * job["samples"] // ranks,
        max_steps=len(job["prompts"]),
        learning_rate=job["lr"],
        weight_decay=job["weight_decay"],
        max_grad_norm=job["clip_grad"],
        lr_scheduler_type="constant",
        bf16=job["dtype"] == "bf16",
        gradient_checkpointing=False,
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,  # there are none, and looking for them costs
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    marks = Marks()
    tokenizer = AutoTokenizer.from_pretrained(job["student"])
    trainer = MarkedTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["student"], dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(job["teacher"], dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[marks],
    )
    trainer.parts, trainer.tokens, marks.trainer = {}, 0, trainer
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        "marks": [step["mark"] for step in marks.steps],
        "parts": [step["parts"] for step in marks.steps[1:]],
        "tokens": [step["tokens"] for step in marks.steps[1:]],
        "peak": peak,
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
