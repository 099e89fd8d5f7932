"""Reads what ``megatron_writer`` wrote, under other layouts, and compares it with the models it was written from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_tropd.convert.companions import companions_of
from megatron_tropd.convert.hf import check_weights
from megatron_tropd.convert.source import open_weights, source_architecture
from megatron_tropd.engine.megatron_layout import save_for_megatron
from megatron_tropd.parallel.groups import GroupBuilder, Layout, initialize_distributed
from megatron_tropd.setup.build import load_model
from megatron_tropd.types import ModelSource
from tests.support.family_cases import ROLLOUTS, local_logits, whole_logits
from tests.support.megatron_writer import BY_NAME, Written, _build
from tests.support.tiny_families import config_of, load_transformers, save_family
from tests.support.tiny_models import relative_error

LAYOUTS = {"tp2": {"tensor": 2, "sequence": True}, "pp2": {"pipeline": 2}}


def save_models(root: Path, cases: Sequence[Written]) -> None:
    """A random Hugging Face model for every case."""
    for seed, case in enumerate(cases):
        save_family(root / "hf" / case.name, case.family, seed=seed, sizes={"num_hidden_layers": case.layers})


def source_of(case: Written, root: Path) -> ModelSource:
    return ModelSource(root / case.name, root / "hf" / case.name)


def different_tensors(case: Written, root: Path) -> list[str]:
    """Names of tensors that are not those of the model, bit for bit, whole and in part; of more or fewer, too."""
    source, truth = source_of(case, root), load_file(root / "hf" / case.name / "model.safetensors")
    weights = open_weights(source)
    check_weights(weights, source_architecture(source))
    different = sorted(set(weights) ^ set(truth))
    for name, tensor in truth.items():
        same = weights[name][:].equal(tensor)
        if tensor.dim() == 2:
            same = same and weights[name][3:7, 2:5].equal(tensor[3:7, 2:5])
        different += [] if same else [name]
    return different


def read_all(names: Sequence[str], root: str) -> dict[str, Any]:
    """Logits of this rank under every layout, on two ranks of ``run_on_ranks``."""
    device, builder = initialize_distributed(), GroupBuilder()
    found: dict[str, Any] = {}
    for layout, axes in LAYOUTS.items():
        groups = builder.build(Layout(**axes))
        shard = groups.tensor_rank if groups.is_last_stage else -1
        for name in names:
            model = load_model(source_of(BY_NAME[name], Path(root)), groups, dtype=torch.float32, device=device)
            found[f"{name} {layout}"] = {"logits": local_logits(model), "shard": shard}
    return found


def write_ours(root: str, layout: str, case: Written) -> None:
    """The model of a case, written by our writer under tensor parallelism, or under experts' own."""
    device, builder, place = initialize_distributed(), GroupBuilder(), Path(root)
    axes = {"expert": 2} if case.expert > 1 else {"tensor": 2}
    hf = place / "hf" / case.name
    model = load_model(hf, builder.build(Layout(**axes)), dtype=torch.float32, device=device)
    save_for_megatron(place / f"ours-{layout}", model, layout=layout, companions=companions_of(hf))


def loaded_by_megatron(root: str, layout: str, case: Written) -> list[str]:
    """Parameters that are not those of the model once plain megatron-core has loaded what ``write_ours`` wrote."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling

    parallel_state.destroy_model_parallel()  # a buffer of the engine's
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tensor, expert_model_parallel_size=case.expert
    )
    hf = Path(root) / "hf" / case.name
    said, weights = config_of(hf), load_file(hf / "model.safetensors")
    (model,) = _build(case, said, {name: torch.zeros_like(tensor) for name, tensor in weights.items()})
    (truth,) = _build(case, said, weights)
    name = "release" if layout == "megatron-lm" else "iter_0000000"
    state = dist_checkpointing.load(
        {"model": model.sharded_state_dict()},
        str(Path(root) / f"ours-{layout}" / name),
        strict=StrictHandling.RAISE_ALL,
    )
    model.load_state_dict(state["model"], strict=True)
    parallel_state.destroy_model_parallel()
    vocabulary = said["vocab_size"]
    return [
        name
        for (name, one), (_, two) in zip(model.named_parameters(), truth.named_parameters(), strict=True)
        if not (one[: _rows(name, two, vocabulary, case)].equal(two[: _rows(name, two, vocabulary, case)]))
    ]


def _rows(name: str, parameter: torch.Tensor, vocabulary: int, case: Written) -> int:
    """Rows of a parameter that are the model's: those of a padded vocabulary are whoever's who wrote them."""
    if "word_embeddings" not in name and "output_layer" not in name:
        return len(parameter)
    return min(len(parameter), vocabulary - dist.get_rank() * len(parameter) * (case.tensor > 1))


def logit_error(ranks: Sequence[dict[str, Any]], hf: Path) -> float:
    """Largest relative error of a rollout's logits against `transformers` in fp64."""
    found = whole_logits(ranks, "logits", config_of(hf)["vocab_size"])
    model, worst = load_transformers(hf), 0.0
    for rollout in ROLLOUTS:
        with torch.no_grad():
            truth = model(torch.from_numpy(rollout.token_ids)[None]).logits[0, :-1]
        worst = max(worst, float(relative_error(found[str(rollout.sequence_id)], truth)))
    return worst
