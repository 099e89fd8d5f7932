"""The flags of Megatron-LM and the keys that say the same here: one table, for errors and for the page on migrating."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MegatronFlag:
    """A flag, the keys that stand for it, and what to know; without keys, why there is nothing to set."""

    flag: str
    keys: tuple[str, ...]
    note: str = ""


def _of_model(key: str) -> tuple[str, ...]:
    return tuple(f"{role}.parallel.{key}" for role in ("student", "teacher"))


_FROM_CONFIG = "read from `config.json`"
_ALWAYS = "always so"
FLAGS = (
    MegatronFlag("--tensor-model-parallel-size", (*_of_model("tensor"), "rollout.parallel.tensor")),
    MegatronFlag("--pipeline-model-parallel-size", _of_model("pipeline")),
    MegatronFlag("--num-virtual-stages-per-pipeline-rank", _of_model("virtual_pipeline")),
    MegatronFlag(
        "--num-layers-per-virtual-pipeline-stage",
        _of_model("virtual_pipeline"),
        "layers / (stages x this number) is the value here",
    ),
    MegatronFlag("--context-parallel-size", _of_model("context")),
    MegatronFlag("--expert-model-parallel-size", _of_model("expert")),
    MegatronFlag("--sequence-parallel", _of_model("sequence")),
    MegatronFlag("--expert-tensor-parallel-size", (), "experts are cut as the rest of the model is"),
    MegatronFlag("--recompute-granularity", ("student.recompute",), "`selective` and `full`, as there"),
    MegatronFlag("--recompute-activations", ("student.recompute",), "`selective`"),
    MegatronFlag("--recompute-method", ("student.recompute",), "`full` is `uniform`, layer by layer"),
    MegatronFlag("--recompute-num-layers", ("student.recompute",), "`full` is `uniform`, layer by layer"),
    MegatronFlag("--use-distributed-optimizer", ("optimizer.distributed",)),
    MegatronFlag("--overlap-grad-reduce", ("optimizer.overlap",), "one key for both"),
    MegatronFlag("--overlap-param-gather", ("optimizer.overlap",), "one key for both"),
    MegatronFlag("--optimizer-cpu-offload", ("optimizer.offload",), "between updates; the update is on the device"),
    MegatronFlag("--optimizer", ("optimizer.name",)),
    MegatronFlag("--lr", ("optimizer.lr",)),
    MegatronFlag("--min-lr", ("optimizer.min_lr",)),
    MegatronFlag("--lr-decay-style", ("optimizer.schedule",)),
    MegatronFlag("--lr-warmup-iters", ("optimizer.warmup_steps",)),
    MegatronFlag("--weight-decay", ("optimizer.weight_decay",), "never on norms and biases"),
    MegatronFlag("--adam-beta1", ("optimizer.beta1",)),
    MegatronFlag("--adam-beta2", ("optimizer.beta2",)),
    MegatronFlag("--adam-eps", ("optimizer.eps",)),
    MegatronFlag("--sgd-momentum", ("optimizer.momentum",)),
    MegatronFlag("--clip-grad", ("optimizer.clip_grad",)),
    MegatronFlag("--bf16", ("dtype",), "`bf16`, with fp32 master weights"),
    MegatronFlag("--fp16", ("dtype",), "`bf16` or `fp32`: training in fp16 is not carried"),
    MegatronFlag("--seed", ("seed",)),
    MegatronFlag(
        "--seq-length",
        ("data.max_prompt_tokens", "rollout.max_new_tokens", "train.pack_tokens"),
        "sequences have the length they have; packs of `train.pack_tokens` hold them",
    ),
    MegatronFlag("--micro-batch-size", ("train.pack_tokens",), "a microbatch is a pack, measured in tokens"),
    MegatronFlag(
        "--global-batch-size",
        ("train.prompts_per_step", "rollout.samples_per_prompt", "train.minibatches"),
        "prompts x samples / minibatches are the sequences of an update",
    ),
    MegatronFlag("--train-iters", ("train.steps",)),
    MegatronFlag("--train-samples", ("train.steps",), "steps of `train.prompts_per_step` prompts"),
    MegatronFlag("--load", ("student.model", "checkpoint.resume"), "a start; a run's own resume is `resume=auto`"),
    MegatronFlag("--finetune", ("student.model",), "a checkpoint there brings its weights alone"),
    MegatronFlag("--pretrained-checkpoint", ("student.model",)),
    MegatronFlag("--save", ("run_dir",), "`RUN/checkpoints`; as `export.hf` for Hugging Face"),
    MegatronFlag("--save-interval", ("checkpoint.every",)),
    MegatronFlag("--no-load-optim", ("student.model",), "a checkpoint there brings its weights alone"),
    MegatronFlag("--no-load-rng", ("student.model",), "a checkpoint there brings its weights alone"),
    MegatronFlag("--ckpt-format", (), "`torch_dist`, always; other formats are converted before"),
    MegatronFlag("--async-save", (), "not carried: a checkpoint is on disk before the next step"),
    MegatronFlag("--data-path", ("data.prompts",), "JSONL, Parquet or Arrow of prompts, not token files"),
    MegatronFlag("--tokenizer-model", ("student.model", "student.like"), "the tokenizer beside the model"),
    MegatronFlag("--tokenizer-type", ("student.model", "student.like"), "the tokenizer beside the model"),
    MegatronFlag("--eval-interval", ("evaluate.every",)),
    MegatronFlag("--eval-iters", ("evaluate.max_problems",), "problems, not batches"),
    MegatronFlag("--moe-aux-loss-coeff", ("student.router_aux_loss",)),
    MegatronFlag("--attention-backend", ("student.attention", "teacher.attention")),
    MegatronFlag("--distributed-timeout-minutes", ("collective_timeout_s",), "in seconds"),
    MegatronFlag("--tensorboard-dir", ("report.tensorboard",)),
    MegatronFlag("--wandb-project", ("report.wandb",)),
    MegatronFlag("--export-kd-teacher-load", ("teacher.model",)),
    *(
        MegatronFlag(f"--{name}", (), _FROM_CONFIG)
        for name in (
            *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "group-query-attention"),
            *("num-query-groups", "kv-channels", "max-position-embeddings", "position-embedding-type", "rotary-base"),
            *("normalization", "norm-epsilon", "swiglu", "untie-embeddings-and-output-weights", "qk-layernorm"),
            *("add-qkv-bias", "disable-bias-linear", "num-experts", "moe-router-topk", "moe-ffn-hidden-size"),
        )
    ),
    *(
        MegatronFlag(f"--{name}", (), _ALWAYS)
        for name in ("calculate-per-token-loss", "use-mcore-models", "accumulate-allreduce-grads-in-fp32")
    ),
)
_BY_NAME = {one.flag.removeprefix("--").replace("-", "_"): one for one in FLAGS}
# the words of megatron-core's configuration, where they are others than the flags'
_ALIASES = {
    "virtual_pipeline_model_parallel_size": "num_virtual_stages_per_pipeline_rank",
    "layernorm_epsilon": "norm_epsilon",
    "gated_linear_unit": "swiglu",
    "num_moe_experts": "num_experts",
    "moe_aux_loss_coefficient": "moe_aux_loss_coeff",
}


def answer_to(name: str) -> str | None:
    """Say what stands here for a name in Megatron's words, with or without dashes; None for other names."""
    plain = name.strip().lstrip("-").replace("-", "_")
    found = _BY_NAME.get(_ALIASES.get(plain, plain))
    if found is None:
        return None
    note = found.note.replace("`", "")
    if not found.keys:
        return f"Megatron-LM's {found.flag} has no key here: {note}."
    return f"Megatron-LM's {found.flag} is here {' and '.join(found.keys)}{f' ({note})' if note else ''}."


def flags_table() -> str:
    """Return the table of docs/migrate.md."""
    lines = ["| Megatron-LM | here | |", "|---|---|---|"]
    for one in FLAGS:
        keys = ", ".join(f"`{key}`" for key in one.keys) or "-"
        lines.append(f"| `{one.flag}` | {keys} | {one.note} |")
    return "\n".join(lines) + "\n"
