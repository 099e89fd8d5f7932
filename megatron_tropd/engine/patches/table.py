"""Every attribute of Megatron-Core and torch that is changed here, why, and when the change can go.

``tests/unit/engine/test_patches.py`` compares the table with the code: an assignment to a foreign attribute that is not
listed fails, and so does a target that the pinned version no longer has. Patches of Megatron-Core are in this folder.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignPatch:
    """One changed attribute of somebody else's module or object."""

    target: str  # dotted name
    file: str  # of the package
    reason: str
    upstream: str  # the issue or pull request that would end it; empty: none is known
    ends: str  # when it can go, and the test that would say so


_NO_CUDA = "Megatron-Core names CUDA where the machine has none; inert where there is CUDA"
_CPU_TESTS = "when Megatron-Core asks the model for its device; ranks/test_engine_layouts.py without the patch"

PATCHES = (
    ForeignPatch(
        target="torch.compile",
        file="engine/patches/compiler.py",
        reason="Megatron-Core compiles what it only defines, and so imports the compiler; while it is imported, alone",
        upstream="",
        ends="when importing megatron.core leaves torch._dynamo out; unit/engine/test_compiler.py without the patch",
    ),
    ForeignPatch(
        target="torch.cuda.current_device",
        file="engine/patches/cuda_calls.py",
        reason=_NO_CUDA,
        upstream="",
        ends=_CPU_TESTS,
    ),
    ForeignPatch(
        target="torch.cuda.synchronize",
        file="engine/patches/cuda_calls.py",
        reason=_NO_CUDA,
        upstream="",
        ends=_CPU_TESTS,
    ),
    ForeignPatch(
        target="megatron.core.optimizer.clip_grads.l2_norm_impl",
        file="engine/patches/cuda_calls.py",
        reason="torch.norm sums a large CPU tensor in fp32: a gradient norm of 124 million numbers is 1.4 % too small",
        upstream="",
        ends="when torch sums it in fp64; unit/engine/test_gradient_norm.py without the patch",
    ),
    ForeignPatch(
        target="megatron.core.pipeline_parallel.schedules.torch",
        file="engine/patches/cuda_calls.py",
        reason="schedules make their token count on device 'cuda'; a mode for that would wrap every call of a step",
        upstream="",
        ends=_CPU_TESTS,
    ),
    ForeignPatch(
        target="megatron.core.optimizer.optimizer.get_grad_norm_fp32",
        file="engine/patches/cuda_calls.py",
        reason="it names device 'cuda'; the mode that answers for it is active in this call alone",
        upstream="",
        ends=_CPU_TESTS,
    ),
    ForeignPatch(
        target="megatron.core.optimizer.optimizer.clip_grad_by_total_norm_fp32",
        file="engine/patches/cuda_calls.py",
        reason="it compares the names of tensor types with CUDA's, as its neighbor",
        upstream="",
        ends=_CPU_TESTS,
    ),
    ForeignPatch(
        target="megatron.core.tensor_parallel.random._get_cuda_rng_state",
        file="engine/patches/cuda_calls.py",
        reason="recompute saves the CUDA RNG state; there is no dropout, so there is nothing to save",
        upstream="",
        ends="as above; the recompute rows of ranks/test_engine_layouts.py",
    ),
    ForeignPatch(
        target="megatron.core.tensor_parallel.random._set_cuda_rng_state",
        file="engine/patches/cuda_calls.py",
        reason="as its neighbor",
        upstream="",
        ends="as its neighbor",
    ),
    ForeignPatch(
        target="megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream",
        file="engine/patches/cuda_calls.py",
        reason="the dispatcher makes a CUDA stream to copy split sizes to the host, where they are already",
        upstream="",
        ends="as above; the expert rows of ranks/test_families.py",
    ),
    ForeignPatch(
        target="megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
        file="engine/patches/cuda_calls.py",
        reason="as its neighbor",
        upstream="",
        ends="as its neighbor",
    ),
    ForeignPatch(
        target="megatron.core.tensor_parallel.mappings._gather_along_first_dim",
        file="engine/patches/cuda_calls.py",
        reason="gloo gathers equal parts only; tensor ranks of a mixture of experts hold unequal ones",
        upstream="",
        ends="when gloo takes unequal parts; the expert rows of ranks/test_families.py under TP 2",
    ),
    ForeignPatch(
        target="megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim",
        file="engine/patches/cuda_calls.py",
        reason="as its neighbor",
        upstream="",
        ends="as its neighbor",
    ),
    ForeignPatch(
        target="megatron.core.parallel_state",
        file="engine/patches/parallel_state.py",
        reason="a few places still read the global groups; with another layout's they are silently wrong",
        upstream="",
        ends="when every read takes a ProcessGroupCollection; ranks/test_engine_layouts.py with two layouts",
    ),
    ForeignPatch(
        target="megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue",
        file="engine/patches/checkpoint_writer.py",
        reason="a manager process per rank takes seconds, imports __main__ again and outlives killed ranks",
        upstream="https://github.com/NVIDIA/Megatron-LM/issues/2422",
        ends="when a synchronous save starts no process; runs/test_train_resume.py leaves processes behind",
    ),
    ForeignPatch(
        target="megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync"
        ".write_preloaded_data_multiproc",
        file="engine/patches/checkpoint_writer.py",
        reason="it forks two writers on every rank, and waits for ever for one that is killed alone",
        upstream="",
        ends="when a synchronous save starts no process; unit/engine/test_checkpoint_disk.py without the patch",
    ),
    ForeignPatch(
        target="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states",
        file="engine/patches/optimizer_states.py",
        reason="over torch's Adam, loading fails with KeyError 'step'",
        upstream="https://github.com/NVIDIA/Megatron-LM/pull/5742",
        ends="when state keys come from the optimizer; ranks/test_engine_layouts.py, distributed optimizer rows",
    ),
    ForeignPatch(
        target="megatron.core.transformer.moe.moe_utils.te_general_gemm",
        file="engine/patches/router_gemm.py",
        reason="the router checks whether it is None, but it is defined only with Transformer Engine",
        upstream="",
        ends="when moe_utils defines it always; the expert rows of ranks/test_families.py",
    ),
    ForeignPatch(
        target="torch.distributed.checkpoint.default_planner.DefaultLoadPlanner.load_bytes",
        file="engine/metadata.py",
        reason="objects of a checkpoint are pickles: only plain ones may be built, and only within a block",
        upstream="",
        ends="when torch loads them with weights_only; unit/convert and runs/test_convert_commands.py on harmful ones",
    ),
    ForeignPatch(
        target="torch.set_num_threads",
        file="vllm_bridge/local_engine.py",
        reason="vLLM for CPUs replaces it when it is built; it is put back",
        upstream="",
        ends="when vLLM leaves it alone; vllm/test_vllm.py",
    ),
    ForeignPatch(
        target="vllm.v1.engine.core.cleanup_dist_env_and_memory",
        file="vllm_bridge/local_engine.py",
        reason="an engine that ends destroys every process group of the process, the trainer's too",
        upstream="",
        ends="when vLLM ends its own groups only; vllm/test_vllm.py",
    ),
)
