"""``tropd convert``: a Hugging Face directory into a Megatron checkpoint, and back, laid out over any ranks.

The checkpoint is of the format that training writes. It belongs to no layout: any can load it. The layout given here is
that of the conversion itself: every rank holds its own shard of the model and no process the whole of it.
"""

from __future__ import annotations

import filecmp
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import Progress, track
from torch import Tensor

from megatron_tropd.config.sections import Layout
from megatron_tropd.convert.companions import companions_of
from megatron_tropd.convert.hf import HFWeights, check_weights, read_architecture
from megatron_tropd.convert.lazy import LazyTensor, WeightsSource
from megatron_tropd.convert.megatron.locate import find_megatron
from megatron_tropd.convert.source import open_weights, source_files
from megatron_tropd.convert.writer import HFWriter
from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.engine.checkpoint import COMPANIONS, load_model_weights, read_state, save_model
from megatron_tropd.engine.forward import run_packs
from megatron_tropd.engine.megatron_layout import save_for_megatron
from megatron_tropd.engine.model import Model, build_model, check_divisible
from megatron_tropd.engine.score import pack_alone
from megatron_tropd.engine.weights import hf_rows, load_weights
from megatron_tropd.errors import CheckpointError, ConfigError, printable
from megatron_tropd.models.name_table import hf_shapes
from megatron_tropd.parallel.arrays import largest_or_infinite
from megatron_tropd.parallel.groups import GroupBuilder, Groups, initialize_distributed
from megatron_tropd.progress.phases import Phase
from megatron_tropd.setup.claims import claimed
from megatron_tropd.setup.claims import target as claim_of
from megatron_tropd.storage.checksums import files_below
from megatron_tropd.storage.owned import beside, check_target, overlaps, settled
from megatron_tropd.types import Architecture, ModelSource

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# of the largest logit; both models in fp32
_TOLERANCE = 1e-4
# in the dtype of the result: of what transformers itself rounds there, and at least
_TIMES, _LEAST_ROUNDING = 4.0, 1e-3

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan:
    """The ranks of a conversion, the numbers it writes, and the texts on which the result is compared."""

    layout: Layout
    dtype: str = "auto"  # auto: that of the source
    texts: Sequence[str] = ()  # nothing is compared when empty


def hf_to_megatron(source: Path, target: Path, plan: ConversionPlan, *, form: str = "own") -> None:
    """Write ``source``, a Hugging Face directory, as the Megatron checkpoint ``target``. Collective.

    A target that was finished from the same source is left as it is: weights of the same sizes and times, and config
    and tokenizer files of the same content. Killed before that, there is no target, and the conversion starts over:
    ranks write their files together, so no part of them is of use alone.

    Args:
        form: own, or one of ``engine.megatron_layout``: what Megatron-LM and Megatron-Bridge load.

    Raises:
        CheckpointError: the source cannot be used, or the result gives other logits.
        ConfigError: the layout does not fit the model, or something else stands at ``target``.
    """
    initialize_distributed()
    _check_separate(target, {"the source": source})
    with claimed(claim_of(target, "TARGET")):
        if form == "own":
            _import(source, target, plan)
        else:
            _import_for_megatron(source, target, plan, form)


def _import(source: Path, target: Path, plan: ConversionPlan) -> None:
    device = initialize_distributed()
    architecture, weights = read_architecture(source), HFWeights(source)
    check_divisible(architecture, plan.layout)
    check_weights(weights, architecture)
    dtype = DTYPES.get(plan.dtype) or next(iter(weights.values())).dtype
    facts = {"source": _fingerprint(source, source.glob("*.safetensors")), "dtype": str(dtype)}
    groups = GroupBuilder().build(plan.layout)
    if _already_there(target, facts, companions_of(source)):
        _say("it is there already, made of the same source: left as it is")
    else:
        check_target(target, name="the target", protected={})
        if beside(settled(target), "partial").exists():
            _say("an earlier conversion was killed: starting over")
        model = build_model(architecture, groups, dtype=dtype, device=device, initialize=False)
        load_weights(model, weights, watch=_progress("reading"))
        _check_finite(model, source, weights)
        _say("writing")
        state = {**facts, "architecture": asdict(architecture)}
        save_model(settled(target), model, state=state, companions=companions_of(source))
    _say(f"Megatron checkpoint: {target}")
    if plan.texts:
        written = _Given(path=settled(target), companions=source, state={})
        with Phase("comparing with transformers"):
            _verify(source, written, architecture, groups, dtype=dtype, texts=plan.texts)


def _import_for_megatron(source: Path, target: Path, plan: ConversionPlan, form: str) -> None:
    """Write the layout of somebody else's trainer. Compared, where texts are given, as any checkpoint of theirs is."""
    device = initialize_distributed()
    check_target(target, name="the target", protected={"the source": source})
    architecture, weights = read_architecture(source), HFWeights(source)
    check_divisible(architecture, plan.layout)
    check_weights(weights, architecture)
    dtype = DTYPES.get(plan.dtype) or next(iter(weights.values())).dtype
    groups = GroupBuilder().build(plan.layout)
    model = build_model(architecture, groups, dtype=dtype, device=device, initialize=False)
    load_weights(model, weights, watch=_progress("reading"))
    _check_finite(model, source, weights)
    save_for_megatron(target, model, layout=form, companions=companions_of(source))
    _say(f"checkpoint for {form}: {target}")
    if plan.texts:
        _verify(source, _open(target, source), architecture, groups, dtype=dtype, texts=plan.texts)


def megatron_to_hf(source: Path, target: Path, plan: ConversionPlan, *, like: Path | None = None) -> None:
    """Write ``source``, a Megatron checkpoint, as the Hugging Face directory ``target``. Collective.

    The source is a checkpoint of ours, or of Megatron-LM, Megatron-Bridge or NeMo 2 (``convert.megatron``).
    Killed and started again, it continues after the last safetensors file that was finished.

    Args:
        like: a model directory whose ``config.json`` and tokenizer the target gets. Checkpoints made by
            ``hf_to_megatron`` carry their own; those of training do not.

    Raises:
        CheckpointError: the source cannot be used, or the result gives other logits.
        ConfigError: the layout does not fit the model, or there is no ``config.json``.
    """
    initialize_distributed()
    protected = {"the source": source, **({} if like is None else {"--like": like})}
    _check_separate(target, protected)
    with claimed(claim_of(target, "TARGET")):
        _export(source, target, plan, like=like, protected=protected)


def _export(
    source: Path, target: Path, plan: ConversionPlan, *, like: Path | None, protected: Mapping[str, Path]
) -> None:
    device = initialize_distributed()
    given = _open(source, like)
    check_target(target, name="the target", protected=protected)
    architecture = read_architecture(given.companions)
    check_divisible(architecture, plan.layout)
    dtype = DTYPES[plan.dtype] if plan.dtype != "auto" else given.saved_dtype()
    groups = GroupBuilder().build(plan.layout)
    model = build_model(architecture, groups, dtype=dtype, device=device, initialize=False)
    given.load(model)
    _check_finite(model, source)
    shapes = hf_shapes(architecture)
    writer, done = None, [frozenset[str]()]
    if dist.get_rank() == 0:
        made_from = json.dumps([_fingerprint(given.path, given.path.glob("*.distcp")), str(dtype)], sort_keys=True)
        writer = HFWriter(
            target,
            companions_from=given.companions,
            tensors=shapes,
            dtype=dtype,
            resume_from=made_from,
            end_ids=given.state.get("run", {}).get("method.end_ids", ()),
        )
        done = [writer.done]
    dist.broadcast_object_list(done)
    total = sum(math.prod(shape) for name, shape in shapes.items() if name not in done[0])
    with Progress(disable=writer is None) as progress:
        bar = progress.add_task("writing", total=total)
        for name, first, rows in hf_rows(model, skip=done[0]):
            if writer is not None:
                writer.write_rows(name, first, rows)
                progress.advance(bar, rows.numel())
    if writer is not None:
        writer.finish()
    dist.barrier()
    del model
    _say(f"Hugging Face directory: {target}")
    if plan.texts:
        with Phase("comparing with transformers"):
            _verify(target, given, architecture, groups, dtype=dtype, texts=plan.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """A Megatron checkpoint that is converted: of ours, with its record, or of somebody else."""

    path: Path
    companions: Path
    state: Mapping[str, Any]  # of a checkpoint of ours
    weights: WeightsSource | None = None  # None: of ours

    def load(self, model: Model) -> None:
        """Fill the model. Collective."""
        if self.weights is None:
            load_model_weights(self.path, model)
        else:
            load_weights(model, self.weights)

    def saved_dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return _saved_dtype(self.state) if self.weights is None else self.weights[next(iter(self.weights))].dtype


def _open(source: Path, like: Path | None) -> _Given:
    """Open the checkpoint that a directory holds.

    Raises:
        CheckpointError: it holds none, or one that cannot be read. ConfigError: there is no ``config.json``.
    """
    found = find_megatron(source)
    if found is None and not source.is_dir():
        raise CheckpointError(f"{source.absolute()} does not exist, or is a file. Give the directory of a checkpoint.")
    if found is None:
        raise CheckpointError(
            f"{source.absolute()} holds no checkpoint of Megatron: neither one of ours, nor of Megatron-LM or "
            "Megatron-Bridge (latest_checkpointed_iteration.txt, iter_...), nor of NeMo 2 (weights/, context/). It is "
            "left as it is. Give the directory of a checkpoint."
        )
    if found.is_ours:
        return _Given(path=found.path, companions=_companions(found.path, like), state=read_state(found.path))
    given = ModelSource(source, like)
    return _Given(path=found.path, companions=source_files(given), state={}, weights=open_weights(given))


def _check_separate(target: Path, protected: Mapping[str, Path]) -> None:
    """Raise ConfigError when the target is one of the sources, holds one, or lies in one."""
    name = overlaps(target, protected)
    inside = next((name for name, path in protected.items() if overlaps(path, {"target": target})), None)
    if name is not None or inside is not None:
        place = f"is {name} or holds it" if name is not None else f"lies in {inside}"
        raise ConfigError(f"the target {target.absolute()} {place}. Name another directory.")


def _companions(source: Path, like: Path | None) -> Path:
    found = source / "hf" if like is None else like
    if not (found / "config.json").exists():
        raise ConfigError(
            f"{source.absolute()} carries no config.json of a Hugging Face model. Name the directory of the model it "
            "was trained from with --like."
            if like is None
            else f"--like {like} has no config.json. Give a Hugging Face model directory."
        )
    return found


def _saved_dtype(state: Mapping[str, Any]) -> torch.dtype:
    # a conversion says it of the checkpoint, training of its run
    said = state.get("dtype") or dict(state.get("run") or {}).get("dtype", "")
    name = str(said).removeprefix("torch.")
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, **DTYPES}
    if name not in names:
        raise ConfigError("the checkpoint does not say in which dtype it is. Give --dtype fp32, bf16 or fp16.")
    return names[name]


def _fingerprint(directory: Path, files: Iterable[Path]) -> dict[str, Any]:
    """Return what distinguishes one state of a directory from another without reading it."""
    stats = {file.name: file.stat() for file in sorted(files)}
    return {str(directory.absolute()): {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


def _already_there(target: Path, facts: dict[str, Any], companions: Mapping[str, Path]) -> bool:
    """Say whether ``target`` is finished and of this source; ConfigError when it is something else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        found = read_state(target)
    except CheckpointError as error:
        raise ConfigError(f"{target.absolute()} is there and is no whole checkpoint: {error}") from error
    if any(found.get(name) != value for name, value in facts.items()):
        raise ConfigError(f"{target.absolute()} is a checkpoint made of something else. Name another target.")
    carried = files_below(target / COMPANIONS)
    changed = sorted(
        name
        for name in {*carried, *companions}
        if name not in carried or name not in companions or not filecmp.cmp(carried[name], companions[name], False)
    )
    if changed:
        raise ConfigError(
            f"{target.absolute()} was made of the same weights, but {', '.join(changed)} of the source "
            f"{'have' if len(changed) > 1 else 'has'} changed since. Name another target."
        )
    return True


def _progress(what: str) -> Callable[[Iterable[Item]], Iterable[Item]]:
    """Show a progress bar on the first rank."""
    if dist.get_rank() != 0:
        return lambda items: items
    return lambda items: track(items, description=what)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(printable(text), flush=True)


# --------------------------------------------------------------------------- comparing


def _check_finite(model: Model, source: Path, weights: Mapping[str, LazyTensor] | None = None) -> None:
    """Make sure that every weight is a number that the model's dtype can hold. Collective.

    Raises:
        CheckpointError: names the parameter, and whether it came so or became so by the conversion.
    """
    bad = next(
        (
            name
            for chunk in model.chunks
            for name, parameter in chunk.named_parameters()
            if not bool(parameter.isfinite().all())
        ),
        None,
    )
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, bad)
    name = next((name for name in found if name is not None), None)
    if name is None:
        return
    came_so = weights is None or any(not bool(weights[key][:].isfinite().all()) for key in weights)
    why = (
        "holds weights that are infinite or not a number"
        if came_so
        else f"has weights beyond the largest number of {model.dtype}. Convert with --dtype bf16 or fp32"
    )
    raise CheckpointError(f"{source.absolute()} {why} (they are in {name}). Nothing was written.")


def _verify(
    hf: Path,
    given: _Given,
    architecture: Architecture,
    groups: Groups,
    *,
    dtype: torch.dtype,
    texts: Sequence[str],
) -> None:
    """Compare the checkpoint's logits with those of `transformers`: in fp32, and in ``dtype``, of the result.

    In the latter both round, each its own way: ours may be as far from fp32 as a few times theirs. Collective.

    Raises:
        CheckpointError: they differ by more than rounding, or are not finite; it says whose are not.
    """
    tokenizer = load_tokenizer(hf)
    sequences = [np.array(tokenizer.encode(text), dtype=np.int64)[: architecture.max_positions] for text in texts]
    device = initialize_distributed()
    truths = _transformers_logits(hf, sequences, architecture, torch.float32)
    worst = _worst(given, architecture, groups, torch.float32, sequences, truths)
    _check_difference(worst, _TOLERANCE, hf, given.path, torch.float32)
    said = f"{worst:.1e}"
    if dtype != torch.float32:
        theirs = _transformers_logits(hf, sequences, architecture, dtype)
        shares = [_share((a - b).abs(), b) for a, b in zip(theirs, truths, strict=True)]
        rounding = largest_or_infinite(torch.tensor(shares, device=device))
        allowed = max(_TIMES * rounding, _LEAST_ROUNDING)
        if not math.isfinite(rounding):
            raise CheckpointError(
                f"{hf.absolute()} in transformers gives logits in {dtype} that are infinite or not a number, "
                "though finite ones in fp32: the model does not fit the dtype. Convert with --dtype bf16 or fp32."
            )
        rounded = _worst(given, architecture, groups, dtype, sequences, truths)
        _check_difference(rounded, allowed, hf, given.path, dtype)
        said += f" in fp32, and by {rounded:.1e} in {dtype} (theirs there: {rounding:.1e})"
    _say(f"logits differ from transformers' by {said} of the largest, over {len(texts)} texts")


def _worst(
    given: _Given,
    architecture: Architecture,
    groups: Groups,
    dtype: torch.dtype,
    sequences: Sequence[np.ndarray],
    truths: Sequence[Tensor],
) -> float:
    """Return the largest difference of a logit over all sequences, as a share of the largest logit. Collective."""
    device = truths[0].device
    model = build_model(architecture, groups, dtype=dtype, device=device, initialize=False).freeze()
    given.load(model)
    found = [_difference(model, sequence, truth) for sequence, truth in zip(sequences, truths, strict=True)]
    return largest_or_infinite(torch.tensor(found))


def _check_difference(worst: float, allowed: float, hf: Path, checkpoint: Path, dtype: torch.dtype) -> None:
    if not math.isfinite(worst):
        raise CheckpointError(
            f"{checkpoint.absolute()} gives logits in {dtype} that are infinite or not a number, where those of "
            f"{hf.absolute()} in transformers are finite. Do not use the result; convert with --dtype bf16 or fp32."
        )
    if not worst <= allowed:
        raise CheckpointError(
            f"{checkpoint.absolute()} gives other logits than {hf.absolute()} in transformers: they differ in {dtype} "
            f"by {worst:.1e} of the largest one, and rounding leaves less than {allowed:.0e}. Do not use the result."
        )


def _transformers_logits(
    hf: Path, sequences: Sequence[np.ndarray], architecture: Architecture, dtype: torch.dtype
) -> list[Tensor]:
    """Compute ``[L, V]`` logits per sequence, fp32, on every rank; the first holds the whole model. Collective.

    Raises:
        CheckpointError: fp32 logits are not finite.
    """
    device = initialize_distributed()
    found = [torch.empty(len(tokens), architecture.vocab_size, device=device) for tokens in sequences]
    if dist.get_rank() == 0:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(hf, dtype=dtype).eval()
        with torch.no_grad():
            found = [model(torch.from_numpy(tokens)[None]).logits[0].float().to(device) for tokens in sequences]
    for logits_LV in found:
        dist.broadcast(logits_LV, src=0)
        if dtype == torch.float32 and not bool(logits_LV.isfinite().all()):
            raise CheckpointError(
                f"{hf.absolute()} in transformers gives logits that are infinite or not a number: the source itself "
                "is broken, and nothing can be compared with it."
            )
    return found


def _difference(model: Model, tokens: np.ndarray, truth_LV: Tensor) -> float:
    """Return the largest difference of a logit, as a share of the largest logit, over all ranks. Collective."""
    groups = model.groups
    packs = pack_alone(tokens, groups.layout)[0]

    def last_stage(number: int, hidden_ND: Tensor, weight_vD: Tensor) -> float:
        first = groups.tensor_rank * len(weight_vD)
        wanted_Nv = truth_LV[:-1, first : first + len(weight_vD)]
        found_Nv = F.linear(hidden_ND, weight_vD)[:, : wanted_Nv.size(1)].float()
        return largest_or_infinite((found_Nv - wanted_Nv).abs())

    found = torch.tensor(max(run_packs(model, packs, last_stage) or [0.0]), device=model.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return _share(found, truth_LV)


def _share(difference: Tensor, truth_LV: Tensor) -> float:
    """Return a largest difference relative to the largest logit; 0 where both are."""
    largest = float(truth_LV.abs().max()) if truth_LV.numel() else 0.0
    return largest_or_infinite(difference) / max(largest, torch.finfo(torch.float32).tiny)
