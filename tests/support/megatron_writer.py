"""Checkpoints as Megatron-LM, Megatron-Bridge and NeMo 2 leave them, by plain megatron-core and none of our code.

``write_all`` runs on two ranks of ``run_on_ranks``; every case is the model of a Hugging Face directory.
"""

from __future__ import annotations

import argparse
import copy
import enum
import json
import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Written:
    """One checkpoint: which model, under which layout, and how it was written."""

    name: str
    family: str
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    expert: int = 1
    stacked: bool = True  # layers along a first axis, or numbered in the key
    local_names: bool = False  # norms beside the matrices, not within
    grouped: bool = False  # experts as two large matrices
    singleton: bool = False  # halves of first matrices, and experts, under keys of their own
    writer: str = "megatron-lm"  # or bridge, nemo
    release: bool = False
    layers: int = 2


CASES = (
    Written(name="llama-tp2", family="llama3", tensor=2),
    Written(name="llama-vpp", family="llama2", pipeline=2, virtual=2, layers=4, stacked=False, release=True),
    Written(name="qwen2-pp2", family="qwen2-tied", pipeline=2, local_names=True, stacked=False, writer="bridge"),
    Written(name="qwen3-nemo", family="qwen3", writer="nemo"),
    Written(name="qwen3-tied", family="qwen3-tied", tensor=2, singleton=True),
    Written(name="qwen3-moe-ep2", family="qwen3-moe", expert=2, writer="bridge"),
    Written(name="qwen3-moe-grouped", family="qwen3-moe-raw", expert=2, grouped=True, stacked=False),
    Written(name="mixtral-tp2", family="mixtral", tensor=2, grouped=True),
    Written(name="mixtral-singleton", family="mixtral", pipeline=2, singleton=True, local_names=True),
)
BY_NAME = {case.name: case for case in CASES}
PAD = 64


class AttnBackend(enum.Enum):  # as Megatron's arguments hold one
    auto = 5


def swiglu(x: Tensor) -> Tensor:
    """A function among the arguments."""
    return x


def write_all(root: str, cases: tuple[Written, ...] = CASES) -> None:
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.Stream = lambda *_, **__: None  # type: ignore[assignment,misc]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    filesystem_async._results_queue = queue.Queue()  # or every save starts a process
    for case in cases:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=case.tensor,
            pipeline_model_parallel_size=case.pipeline,
            virtual_pipeline_model_parallel_size=case.virtual if case.virtual > 1 else None,
            expert_model_parallel_size=case.expert,
        )
        _write(case, Path(root))
        parallel_state.destroy_model_parallel()


def _write(case: Written, root: Path) -> None:
    from megatron.core import dist_checkpointing

    said = json.loads((root / "hf" / case.name / "config.json").read_text())
    models = _build(case, said, load_file(root / "hf" / case.name / "model.safetensors"))
    metadata = {"singleton_local_shards": case.singleton, "non_homogeneous_layers": not case.stacked or case.singleton}
    prefix = "module." if case.writer == "nemo" else ""
    state: dict[str, Any] = {
        "model" if case.virtual == 1 else f"model{number}": model.sharded_state_dict(
            prefix=prefix, metadata=dict(metadata)
        )
        for number, model in enumerate(models)
    }
    state |= {"checkpoint_version": 3.0, "iteration": 100, "num_floating_point_operations_so_far": 0}
    if case.writer == "megatron-lm":
        state["args"] = argparse.Namespace(**arguments(case, said), attention_backend=AttnBackend.auto, act=swiglu)
    target = directory_of(case, root / case.name)
    if dist.get_rank() == 0:
        target.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(target))
    if dist.get_rank() == 0:
        _write_beside(case, root / case.name, target, said)
    dist.barrier()


def directory_of(case: Written, root: Path) -> Path:
    """Where the tensors of a case lie."""
    if case.writer == "nemo":
        return root / "weights"
    return root / ("release" if case.release else "iter_0000100")


def _write_beside(case: Written, root: Path, target: Path, said: dict[str, Any]) -> None:
    fields = arguments(case, said)
    if case.writer == "nemo":
        (root / "context").mkdir()
        text = yaml.safe_dump(
            {"_target_": "nemo.collections.llm.gpt.model.qwen3.Qwen3Model", "config": _provider(fields)}
        )
        (root / "context" / "model.yaml").write_text(text)
        return
    (root / "latest_checkpointed_iteration.txt").write_text("release" if case.release else "100")
    if case.writer == "bridge":
        torch.save({"step": torch.tensor(100)}, root / "latest_train_state.pt")
        (root / "latest_checkpointed_iteration.txt").unlink()
        model = {"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider", **_provider(fields)}
        (target / "run_config.yaml").write_text(yaml.safe_dump({"model": model, "checkpoint": {"save_rng": True}}))


def arguments(case: Written, said: dict[str, Any]) -> dict[str, Any]:
    """What Megatron-LM's arguments say of the model."""
    rope = said.get("rope_parameters") or {}
    experts = said.get("num_local_experts") or said.get("num_experts")
    heads = said["num_attention_heads"]
    return {
        "num_layers": said["num_hidden_layers"],
        "hidden_size": said["hidden_size"],
        "ffn_hidden_size": said["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": said["num_key_value_heads"] != heads,
        "num_query_groups": said["num_key_value_heads"] if said["num_key_value_heads"] != heads else 1,
        "kv_channels": said.get("head_dim") or said["hidden_size"] // heads,
        "padded_vocab_size": padded(said["vocab_size"], case.tensor),
        "rotary_base": int(rope.get("rope_theta", said.get("rope_theta", 10_000))),
        "rotary_percent": 1.0,
        "use_rope_scaling": rope.get("rope_type") == "llama3",
        "rope_scaling_factor": 8.0,
        "norm_epsilon": said["rms_norm_eps"],
        "normalization": "RMSNorm",
        "qk_layernorm": case.family.startswith("qwen3"),
        "add_qkv_bias": case.family.startswith("qwen2"),
        "add_bias_linear": False,
        "swiglu": True,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": not said.get("tie_word_embeddings", False),
        "num_experts": experts,
        "moe_ffn_hidden_size": said.get("moe_intermediate_size", said["intermediate_size"]) if experts else None,
        "moe_router_topk": said.get("num_experts_per_tok", 2),
        "moe_router_pre_softmax": experts is not None and not said.get("norm_topk_prob", True),
        "tensor_model_parallel_size": case.tensor,
        "pipeline_model_parallel_size": case.pipeline,
        "params_dtype": torch.float32,
        "ckpt_format": "torch_dist",
    }


def _provider(fields: dict[str, Any]) -> dict[str, Any]:
    """The same in the words of megatron-core's configuration."""
    renamed = {"norm_epsilon": "layernorm_epsilon", "swiglu": "gated_linear_unit", "num_experts": "num_moe_experts"}
    found = {renamed.get(name, name): value for name, value in fields.items() if name != "params_dtype"}
    found["share_embeddings_and_output_weights"] = not found.pop("untie_embeddings_and_output_weights")
    found["num_query_groups"] = (
        found["num_query_groups"] if found.pop("group_query_attention") else found["num_attention_heads"]
    )
    return found


def padded(vocab_size: int, tensor: int) -> int:
    return -(-vocab_size // (PAD * tensor)) * PAD * tensor


# --------------------------------------------------------------------------- the model, by plain megatron-core


def _build(case: Written, said: dict[str, Any], hf: dict[str, Tensor]) -> list[Any]:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe import grouped_gemm_util

    grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
    config = _config(case, arguments(case, said))
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=case.grouped,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    spec = copy.deepcopy(spec)
    if case.local_names:
        spec.submodules.sharded_state_dict_keys_map = {}
    elif case.family.startswith("qwen3-moe"):  # as under Transformer Engine, where no matrix follows this norm
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    models = []
    for stage in range(case.virtual):
        number = stage if case.virtual > 1 else None
        model = GPTModel(
            config,
            spec,
            vocab_size=padded(said["vocab_size"], case.tensor),
            max_sequence_length=said["max_position_embeddings"],
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
            share_embeddings_and_output_weights=said.get("tie_word_embeddings", False),
            position_embedding_type="rope",
            rotary_base=arguments(case, said)["rotary_base"],
            vp_stage=number,
        )
        _fill(model, hf, config, said)
        models.append(model)
    return models


def _config(case: Written, fields: dict[str, Any]) -> Any:
    from megatron.core.transformer import TransformerConfig

    experts = {
        "num_moe_experts": fields["num_experts"],
        "moe_ffn_hidden_size": fields["moe_ffn_hidden_size"],
        "moe_router_topk": fields["moe_router_topk"],
        "moe_grouped_gemm": case.grouped,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": case.expert,
    }
    return TransformerConfig(
        **{name: fields[name] for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")},
        num_query_groups=fields["num_query_groups"] if fields["group_query_attention"] else None,
        kv_channels=fields["kv_channels"],
        normalization="RMSNorm",
        layernorm_epsilon=fields["norm_epsilon"],
        qk_layernorm=fields["qk_layernorm"],
        add_qkv_bias=fields["add_qkv_bias"],
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.pipeline,
        virtual_pipeline_model_parallel_size=case.virtual if case.virtual > 1 else None,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **(experts if fields["num_experts"] else {}),
    )


@torch.no_grad()
def _fill(model: Any, hf: dict[str, Tensor], config: Any, said: dict[str, Any]) -> None:
    """Give every parameter its slice of the Hugging Face weights."""
    from megatron.core import parallel_state

    rank, size = parallel_state.get_tensor_model_parallel_rank(), config.tensor_model_parallel_size
    first_expert = parallel_state.get_expert_model_parallel_rank() * (
        (config.num_moe_experts or 0) // config.expert_model_parallel_size
    )
    for name, parameter in model.named_parameters():
        layer = None
        if name.startswith("decoder.layers."):
            number, rest = name.removeprefix("decoder.layers.").split(".", 1)
            layer, name = model.decoder.layers[int(number)].layer_number - 1, rest
        parameter.copy_(_slice(name, layer, hf, config, said, rank=rank, size=size, first_expert=first_expert))


def _slice(
    name: str,
    layer: int | None,
    hf: dict[str, Tensor],
    config: Any,
    said: dict[str, Any],
    *,
    rank: int,
    size: int,
    first_expert: int,
) -> Tensor:
    if layer is None:
        if name == "decoder.final_layernorm.weight":
            return hf["model.norm.weight"]
        own = (
            "lm_head.weight"
            if name == "output_layer.weight" and "lm_head.weight" in hf
            else "model.embed_tokens.weight"
        )
        rows = padded(said["vocab_size"], size) - said["vocab_size"]
        # what lies in the padding is no row of the model: a number that would show
        return torch.cat([hf[own], hf[own].new_full((rows, hf[own].shape[1]), 7.0)]).chunk(size)[rank]
    at = f"model.layers.{layer}."
    plain = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    }
    if name in plain:
        return hf[at + plain[name]]
    if name.startswith("self_attention.linear_qkv."):
        kind = name.rsplit(".", 1)[1]
        q, k, v = (hf[f"{at}self_attn.{letter}_proj.{kind}"] for letter in "qkv")
        groups = said["num_key_value_heads"]
        parts = [torch.cat([one.chunk(groups)[group] for one in (q, k, v)]) for group in range(groups)]
        return torch.cat(parts).chunk(size)[rank]
    if name == "self_attention.linear_proj.weight":
        return hf[f"{at}self_attn.o_proj.weight"].chunk(size, 1)[rank]
    if name == "mlp.linear_fc1.weight":
        return torch.cat([hf[f"{at}mlp.{half}_proj.weight"].chunk(size)[rank] for half in ("gate", "up")])
    if name == "mlp.linear_fc2.weight":
        return hf[f"{at}mlp.down_proj.weight"].chunk(size, 1)[rank]
    return _expert_slice(name, at, hf, config, rank=rank, size=size, first=first_expert)


def _expert_slice(
    name: str, at: str, hf: dict[str, Tensor], config: Any, *, rank: int, size: int, first: int
) -> Tensor:
    mixtral = f"{at}block_sparse_moe.gate.weight" in hf
    block, names = (
        ("block_sparse_moe", ("w1", "w3", "w2")) if mixtral else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    )
    if name == "mlp.router.weight":
        return hf[f"{at}{block}.gate.weight"]
    gate, up, down = names

    def of(expert: int, what: str) -> Tensor:
        return hf[f"{at}{block}.experts.{expert}.{what}.weight"]

    def fc1(expert: int) -> Tensor:
        return torch.cat([of(expert, half).chunk(size)[rank] for half in (gate, up)])

    def fc2(expert: int) -> Tensor:
        return of(expert, down).chunk(size, 1)[rank]

    here = range(first, first + config.num_moe_experts // config.expert_model_parallel_size)
    if name == "mlp.experts.weight1":  # [hidden, experts * 2 * ffn], read as [experts, hidden, 2 * ffn]
        return torch.stack([fc1(expert).T for expert in here]).reshape(config.hidden_size, -1)
    if name == "mlp.experts.weight2":
        return torch.cat([fc2(expert).T for expert in here])
    number, what = name.removeprefix("mlp.experts.local_experts.").split(".", 1)
    return (fc1 if what == "linear_fc1.weight" else fc2)(first + int(number))


def row_of(case: Written) -> str:
    """The first cells of a case in the table of docs/conversion.md."""
    axes = {"TP": case.tensor, "PP": case.pipeline, "VPP": case.virtual, "EP": case.expert}
    layout = ", ".join(f"{name} {size}" for name, size in axes.items() if size > 1) or "DP 2"
    own = "of their own" if case.singleton else "grouped" if case.grouped else "one by one"
    experts = own if case.family.startswith(("qwen3-moe", "mixtral")) else "-"
    writer = {"megatron-lm": "Megatron-LM", "bridge": "Megatron-Bridge", "nemo": "NeMo 2"}[case.writer]
    layers = "numbered" if case.singleton or not case.stacked else "stacked"
    names = "local" if case.local_names else "TE's"
    return " | ".join((writer, case.family, layout, layers, experts, names))
