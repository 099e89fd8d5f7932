"""Makes the demo's models from nothing: ``make_models.py teacher``, ``student``, ``student_direct``, ``data``.

The teacher learns correct solutions. The student learns them too, and is then trained on solutions in which later
multiplications are mostly done as additions and divisions as subtractions: it is confidently wrong, the way a model
that has learned something wrong is. ``student_direct`` starts from it, learns correct solutions again, and then to
answer off the top of its head: ``#### 31`` and no more, of which it is sure, and almost always wrong. All are trained
by the package's own engine with the method ``sft`` and exported as Hugging Face directories (bf16). ``data`` lets the
teacher write one response per training prompt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from make_data import HERE, heldout_problems, save_tokenizer, train_problems, write_data

from megatron_tropd.config.sections import Layout, OptimizerConfig
from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.convert.writer import HFWriter
from megatron_tropd.data.packing import pack
from megatron_tropd.data.synthetic import Style, sft_examples, write_prompts
from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.engine.batch import BatchFacts, batch_weights, train_packs
from megatron_tropd.engine.model import Model, build_model
from megatron_tropd.engine.optimizer import optimize
from megatron_tropd.engine.step import Trainer
from megatron_tropd.engine.weights import hf_tensors, load_weights
from megatron_tropd.errors import TokenizerError
from megatron_tropd.evaluate.rules import grade
from megatron_tropd.methods import build_method
from megatron_tropd.models.name_table import hf_shapes
from megatron_tropd.parallel.groups import GroupBuilder, Groups, initialize_distributed
from megatron_tropd.rollout.engines.megatron import MegatronSampler
from megatron_tropd.types import Rollout, RolloutRequest, SamplingParams, single_turn

TEACHER, DATA = HERE / "teacher", HERE / "data"
BATCH, PACK_TOKENS = 64, 8192

_SHARED = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "head_dim": 32,
    "initializer_range": 0.02,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
SIZES = {
    "teacher": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "student": {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of supervised training."""

    style: Style
    steps: int
    lr: float
    seed: int


# the student's second stage is short: long enough to believe, too short to forget how stories are read
STAGES = {
    "teacher": [Stage(style="teacher", steps=1800, lr=3e-3, seed=1000)],
    "student": [
        Stage(style="teacher", steps=2000, lr=3e-3, seed=2000),
        Stage(style="mistaken", steps=334, lr=1e-3, seed=3000),
    ],
    "student_direct": [
        Stage(style="teacher", steps=60, lr=1e-3, seed=4000),
        Stage(style="direct", steps=120, lr=5e-4, seed=5000),
    ],
}
START_FROM = {"student_direct": "student"}  # and its sizes; the others start from random weights


def write_config(directory: Path, sizes: dict[str, int], tokenizer: Tokenizer) -> None:
    """``config.json`` and ``generation_config.json`` of an untrained model."""
    ids = {"eos_token_id": tokenizer.eos_ids[0], "pad_token_id": tokenizer.pad_id, "bos_token_id": None}
    config = _SHARED | sizes | ids | {"vocab_size": tokenizer.vocab_size}
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.eos_ids, "pad_token_id": tokenizer.pad_id}, indent=2) + "\n"
    )


def batches(stage: Stage, tokenizer: Tokenizer) -> Iterator[list[Rollout]]:
    """Endless batches of whole responses as PREFIX: ``sft`` trains on those."""
    examples = sft_examples(stage.seed, stage.steps * BATCH, stage.style, tokenizer)
    while True:
        yield [_as_rollout(i, *next(examples)) for i in range(BATCH)]


def _as_rollout(number: int, prompt: list[int], response: list[int]) -> Rollout:
    empty = np.empty(0, np.float32)
    return Rollout(
        sequence_id=number,
        prompt_index=number,
        token_ids=np.array(prompt + response, dtype=np.int64),
        region_L=single_turn(prompt=len(prompt), prefix=len(response)),
        sampling_logprob=empty,
        model_logprob=empty,
        finished=True,
    )


def initialize(model: Model) -> None:
    """Small embeddings and residual branches that start small: what trains quickly at this size."""
    torch.manual_seed(0)
    architecture = model.architecture
    for name, parameter in model.chunks[0].named_parameters():
        if parameter.dim() != 2:
            continue
        scale = parameter.shape[1] ** -0.5
        if "word_embeddings" in name:
            scale = 0.05
        elif "linear_proj" in name or "linear_fc2" in name:
            scale *= (2 * architecture.num_layers) ** -0.5
        torch.nn.init.normal_(parameter, std=scale)


def train(model: Model, stage: Stage, tokenizer: Tokenizer) -> None:
    """One stage of supervised training."""
    method = build_method("sft")
    settings = OptimizerConfig(
        lr=stage.lr,
        min_lr=stage.lr / 50,
        warmup_steps=min(100, stage.steps // 4),
        schedule="cosine",
        weight_decay=0.01,
        beta2=0.98,
    )
    trainer = Trainer(model, optimize(model, settings, steps=stage.steps), method)
    started = time.time()
    for step, rollouts in zip(range(stage.steps), batches(stage, tokenizer), strict=False):
        packs = pack(rollouts, max_tokens=PACK_TOKENS)
        facts = BatchFacts(seed=stage.seed, step=step, progress=step / stage.steps)
        weights = batch_weights(packs, method, facts, model.groups)
        nothing = [None] * len(packs[0])
        by_id = {rollout.sequence_id: rollout for rollout in rollouts}
        items = train_packs(
            packs[0],
            weights,
            nothing,
            nothing,
            rollouts=by_id,
            method=method,
            facts=facts,
            model=model,
        )
        result = trainer.step(items, update=step)
        if step % 20 == 0 or step == stage.steps - 1:
            print(
                f"{stage.style} {step:5d}  loss {result.loss:.4f}  grad {result.grad_norm:.2f}  lr {result.lr:.1e}  "
                f"{time.time() - started:.0f} s",
                flush=True,
            )


def accuracy(directory: Path, groups: Groups, temperature: float) -> float:
    """Share of held-out problems answered rightly by the exported model."""
    problems = heldout_problems()
    texts = respond(directory, groups, [problem.text for problem in problems], temperature)
    right = [grade("final_number", text, str(p.answer)) for text, p in zip(texts, problems, strict=True)]
    return float(np.mean(right))


def respond(directory: Path, groups: Groups, prompts: list[str], temperature: float, *, seed: int = 7) -> list[str]:
    """One response of the exported model per prompt."""
    tokenizer = load_tokenizer(directory)
    architecture = read_architecture(directory)
    sampler = MegatronSampler(architecture, groups, dtype=torch.float32, device=torch.device("cpu"), batch_size=64)
    load_weights(sampler.model, HFWeights(directory))
    requests = [
        RolloutRequest(
            sequence_id=i,
            prompt_index=i,
            prompt_ids=np.array(tokenizer.render_prompt(prompt), dtype=np.int64),
            prefix_ids=np.empty(0, np.int64),
            max_new_tokens=64,
        )
        for i, prompt in enumerate(prompts)
    ]
    params = SamplingParams(max_new_tokens=64, temperature=temperature, stop_token_ids=tuple(tokenizer.eos_ids))
    rollouts = sampler.generate(requests, params, seed=seed, step=0)
    return [
        tokenizer.decode([t for t in rollout.token_ids[rollout.prompt_length :] if t not in tokenizer.eos_ids])
        for rollout in rollouts
    ]


def make_model(name: str, *, steps_scale: float) -> None:
    """Trains and exports one model."""
    device = initialize_distributed()
    groups = GroupBuilder().build(Layout())
    target, start = HERE / name, START_FROM.get(name)
    with tempfile.TemporaryDirectory() as scratch:
        save_tokenizer(scratch)
        tokenizer = load_tokenizer(Path(scratch))
        write_config(Path(scratch), SIZES[start or name], tokenizer)
        architecture = read_architecture(scratch)
        # bf16 is slow on processors without it; the first two models were made in it
        dtype = torch.bfloat16 if start is None else torch.float32
        model = build_model(architecture, groups, dtype=dtype, device=device)
        if start is None:
            initialize(model)
        else:
            load_weights(model, HFWeights(HERE / start))
        for stage in STAGES[name]:
            train(model, Stage(**{**vars(stage), "steps": max(2, int(stage.steps * steps_scale))}), tokenizer)
        writer = HFWriter(target, companions_from=scratch, tensors=hf_shapes(architecture), dtype=torch.bfloat16)
        writer.write(hf_tensors(model))
        writer.finish()
    for temperature in (0.0, 0.6, 1.0):
        print(f"{name} T={temperature}: {accuracy(target, groups, temperature):.3f} of held-out problems", flush=True)


def make_responses() -> None:
    """Prompts, answers, and one sampled teacher response per training prompt."""
    initialize_distributed()
    groups = GroupBuilder().build(Layout())
    DATA.mkdir(exist_ok=True)
    write_data(DATA)
    problems = train_problems()
    tokenizer = load_tokenizer(TEACHER)
    responses: dict[int, str] = {}
    for seed in range(10):
        missing = [number for number in range(len(problems)) if number not in responses]
        texts = respond(TEACHER, groups, [problems[number].text for number in missing], 1.0, seed=seed)
        # the vocabulary is closed: a rare slip at T=1 can spell a word that no token begins with, and is drawn again
        responses |= {n: text for n, text in zip(missing, texts, strict=True) if _can_encode(tokenizer, text)}
        if len(responses) == len(problems):
            break
    write_prompts(DATA / "train.jsonl", problems, responses=[responses[n] for n in range(len(problems))])


def _can_encode(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return tokenizer.decode(tokenizer.encode(text)) == text
    except TokenizerError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=[*STAGES, "data"])
    parser.add_argument("--steps-scale", type=float, default=1.0, help="shorter training, for a trial")
    arguments = parser.parse_args()
    if arguments.what == "data":
        make_responses()
    else:
        make_model(arguments.what, steps_scale=arguments.steps_scale)


if __name__ == "__main__":
    main()
