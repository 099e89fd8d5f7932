"""Trust-region on-policy distillation (arXiv 2606.01249) in one file of plain torch and transformers, on one CPU.

    python examples/one_file_opd.py --student DIR --teacher DIR --prompts FILE [--method opd|tropd] [--steps N]

The student answers prompts, the teacher grades every token of the answers, the student learns from the grades. FILE
holds JSON lines with "prompt", "response" (the teacher's, for tropd's guidance) and "answer" (a number, only to print
accuracy). The package on one process gives the same loss and gradients for the same tokens and draws: this file is
what ``tests/runs/test_one_file_opd.py`` compares it with.

Left out, all of it in the package: parallel layouts, packing, losses that never hold whole logits, GPUs and bf16; the
other methods, terms, gates, supports and tails; rollouts used for several updates, special-token masks, corrections
for a sampler that disagrees with the trainer; evaluation, checkpoints, resume, reports.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT, PREFIX, CONTINUATION = 0, 1, 2  # who wrote a token: the data, the teacher, the student
CHUNK = 32  # sequences in one forward pass


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Prompt, teacher-written prefix (may be empty) and student-written continuation (may be empty)."""

    ids: Tensor  # [L]
    prompt: int  # tokens of the prompt
    prefix: int  # tokens of the prefix
    uniform: Tensor  # [L] in [0, 1): the gate's draw for the token that follows each position


@dataclass(frozen=True, kw_only=True)
class Objective:
    """``opd``: policy gradient everywhere. ``tropd``: where the acceptance test passes; k and beta are its own."""

    method: str = "tropd"
    k: int = 64  # teacher candidates of the forward KL
    beta: float = 1e-3  # weight of imitation on prefixes


def token_loss(
    student_NV: Tensor, teacher_NV: Tensor, target_N: Tensor, region_N: Tensor, uniform_N: Tensor, objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each response token from both models' logits (nats, gradient to the student's), and facts for the log."""
    logq_NV, logp_NV = student_NV.log_softmax(-1), teacher_NV.detach().log_softmax(-1)
    logq_N, logp_N = (x.gather(-1, target_N[:, None])[:, 0] for x in (logq_NV, logp_NV))
    reward_N = (logp_N - logq_N).detach()  # detached: the gradient of log q - log p itself would ignore the teacher
    trusted_N = uniform_N < reward_N.clamp(max=0.0).exp()  # accepted with probability min(1, p/q)
    facts = {"reverse KL": -reward_N, "outliers": 1.0 - trusted_N.float()}
    policy_N = -reward_N * logq_N  # K1: in expectation over y ~ q its gradient is that of KL(q || p)
    if objective.method == "opd":
        return torch.where(region_N == PREFIX, 0.0, policy_N), facts
    top = logp_NV.topk(min(objective.k, logp_NV.shape[-1]))
    # a partial sum of the forward KL: at times negative, and never clamped, or it would lose its gradient there
    forward_N = (top.values.exp() * (top.values - logq_NV.gather(-1, top.indices))).sum(-1)
    continuation_N = torch.where(trusted_N, policy_N, forward_N)
    return torch.where(region_N == PREFIX, -objective.beta * logq_N, continuation_N), facts


def regions(sequence: Sequence) -> Tensor:
    """``[L - 1]`` region of the token that follows each position."""
    place = torch.arange(1, len(sequence.ids))
    return (place >= sequence.prompt).long() + (place >= sequence.prompt + sequence.prefix).long()


def loss_sum(
    student: Any, teacher: Any, sequences: list[Sequence], objective: Objective
) -> tuple[Tensor, dict[str, float]]:
    """Sum of all token losses, and sums of the facts over CONTINUATION tokens."""
    vocab = min(student.config.vocab_size, teacher.config.vocab_size)  # ids that only one model knows do not exist
    # padding on the right is never seen by a causal model, and its region is PROMPT: no loss
    columns = [[s.ids for s in sequences], [regions(s) for s in sequences], [s.uniform[:-1] for s in sequences]]
    ids_BL, region_BL, uniform_BL = (pad_sequence(column, batch_first=True) for column in columns)
    response_BL = region_BL != PROMPT
    student_NV = student(ids_BL).logits[:, :-1, :vocab][response_BL]
    with torch.no_grad():
        teacher_NV = teacher(ids_BL).logits[:, :-1, :vocab][response_BL]
    target_N, region_N = ids_BL[:, 1:][response_BL], region_BL[response_BL]
    loss_N, facts = token_loss(student_NV, teacher_NV, target_N, region_N, uniform_BL[response_BL], objective)
    return loss_N.sum(), {name: float(fact_N[region_N == CONTINUATION].sum()) for name, fact_N in facts.items()}


def accumulate(student: Any, teacher: Any, sequences: list[Sequence], objective: Objective) -> dict[str, float]:
    """Adds the gradient of one step: sums over chunks, divided once, so that all tokens weigh the same."""
    valid = sum(len(s.ids) - s.prompt for s in sequences)
    written = sum(len(s.ids) - s.prompt - s.prefix for s in sequences)
    log = {"loss": 0.0, "reverse KL": 0.0, "outliers": 0.0}
    for start in range(0, len(sequences), CHUNK):
        loss, facts = loss_sum(student, teacher, sequences[start : start + CHUNK], objective)
        (loss / valid).backward()
        log["loss"] += loss.item() / valid
        for name, total in facts.items():
            log[name] += total / max(written, 1)
    return log


@torch.no_grad()
def sample(student: Any, contexts: list[Tensor], budgets: list[int], *, end: int, vocab: int) -> list[Tensor]:
    """Continues each context at temperature 1, nothing truncated, up to an end token or its budget."""
    width = max(map(len, contexts))
    # padding on the left, so that all rows continue at one column
    mask = torch.stack([torch.arange(width) >= width - len(context) for context in contexts])
    ids = torch.full((len(contexts), width), end).masked_scatter(mask, torch.cat(contexts))
    beyond = list(range(vocab, student.config.vocab_size)) or None
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "suppress_tokens": beyond}
    settings |= {"max_new_tokens": max(1, *budgets), "eos_token_id": end, "pad_token_id": end}
    out = student.generate(ids, attention_mask=mask.long(), **settings)
    rows = [row[:budget] for row, budget in zip(out[:, width:], budgets, strict=True)]
    return [row[: int((row == end).long().argmax()) + 1] if (row == end).any() else row for row in rows]


def prefix_length(length: int, *, step: int, steps: int, budget: int) -> int:
    """How much of a teacher response of ``length`` tokens is given: at first all, at the end none, along a cosine."""
    share = (1.0 + math.cos(math.pi * step / steps)) / 2.0
    return min(math.floor(share * length), budget)


def prompt_ids(text: str, tokenizer: Any) -> Tensor:
    """What the student continues: the prompt within the chat template, where the tokenizer has one."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return torch.tensor(tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="On-policy distillation in one file.")
    for name in ("--student", "--teacher", "--prompts"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--method", choices=["opd", "tropd"], default="tropd")
    for name, default in {"steps": 40, "prompts-per-step": 16, "samples": 4, "max-new-tokens": 64, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-4, help="falls to 0 along a line")
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    load = AutoModelForCausalLM.from_pretrained
    student, teacher = (load(path, dtype=torch.float32).eval() for path in (args.student, args.teacher))
    end, vocab = tokenizer.eos_token_id, min(student.config.vocab_size, teacher.config.vocab_size)
    rows = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    if args.method == "tropd" and not all("response" in row for row in rows):
        parser.error(f"tropd's guidance needs the teacher's 'response' in every row of {args.prompts}; opd does not")
    random.Random(args.seed).shuffle(rows)
    objective, budget = Objective(method=args.method), args.max_new_tokens
    adam = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0)

    for step in range(args.steps):
        batch = [rows[(step * args.prompts_per_step + i) % len(rows)] for i in range(args.prompts_per_step)]
        prompts = [prompt_ids(row["prompt"], tokenizer) for row in batch]
        nothing = torch.empty(0, dtype=torch.long)
        plan = [(prompt, nothing, budget) for prompt in prompts for _ in range(args.samples)]
        if objective.method == "tropd":  # one more per prompt, which begins with what the teacher wrote
            for row, prompt in zip(batch, prompts, strict=True):
                response = torch.tensor([*tokenizer(row["response"], add_special_tokens=False).input_ids, end])
                given = prefix_length(len(response), step=step, steps=args.steps, budget=budget)
                plan.append((prompt, response[:given], 0 if given == len(response) else budget - given))

        # with the weights of this very step: the student learns from what it would write now
        contexts = [torch.cat([prompt, prefix]) for prompt, prefix, _ in plan]
        answers = sample(student, contexts, [left for *_, left in plan], end=end, vocab=vocab)
        sequences = [
            Sequence(
                ids=torch.cat([prompt, prefix, answer]),
                prompt=len(prompt),
                prefix=len(prefix),
                uniform=torch.rand(len(prompt) + len(prefix) + len(answer)),
            )
            for (prompt, prefix, _), answer in zip(plan, answers, strict=True)
        ]

        adam.param_groups[0]["lr"] = args.lr * (1.0 - step / args.steps)
        adam.zero_grad()
        log = accumulate(student, teacher, sequences, objective)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        adam.step()

        alone = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers[: len(batch) * args.samples]]
        wanted = [str(row.get("answer")) for row in batch for _ in range(args.samples)]
        right = [re.findall(r"-?\d+", text)[-1:] == [number] for text, number in zip(alone, wanted, strict=True)]
        log["accuracy"] = sum(right) / max(len(right), 1)
        print(f"step {step + 1:3d}  " + "  ".join(f"{name} {value:.3f}" for name, value in log.items()), flush=True)


if __name__ == "__main__":
    main()
