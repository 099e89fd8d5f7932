"""Compiles every kernel for Hopper, which needs no GPU: the interpreter accepts much that the compiler refuses.

``main`` prints a line per variant (registers, widest load and store) and fails on the first that spills registers or
reads its tiles in pieces of less than 16 bytes. Run by ``test_kernels.py`` in a process whose Triton is a compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_tropd.losses.vocab_parallel.backends.triton.kernels import divergence, gradient, statistics, topk

# logits are fp32, and so are numbers per token; a gradient has the dtype of the next product's factors
TYPES = {"ids_ptr": "*i64", "keys_ptr": "*i64", "count_ptr": "*i32", "scale": "fp32", "beta": "fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
VARIANTS: list[tuple[Any, int, dict[str, Any]]] = [
    *((statistics._statistics_kernel, 8, {"MASK": mask, "IDS": 64, "BLOCK": 4096}) for mask in (False, True)),
    *(
        (gradient._gradient_kernel, 8, {"HAS_SLOPE": slope, "MASKED_LISTED": slope, "IDS": ids, "BLOCK": 4096})
        for slope, ids in ((False, 64), (True, 64), (True, 0))
    ),
    (gradient._fold_kernel, 1, {"IDS": 64}),
    *(
        (topk._topk_kernel, 8, {"TAIL": tail, "IDS": 16, "ROOM": 256, "PART": 256, "BLOCK": 4096})
        for tail in (False, True)
    ),
    (divergence._pair_kernel, 8, {"BLOCK": 2048}),
    (divergence._mixture_kernel, 8, {"BLOCK": 2048}),
    *((divergence._gradient_kernel, 8, {"KIND": kind, "BLOCK": 2048}) for kind in range(3)),
]


def type_of(name: str, factors: str) -> str:
    return factors if name == "out_ptr" else TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")


def assembly(kernel: Any, warps: int, constants: dict[str, Any], *, factors: str = "*bf16") -> str:
    """Compile one variant, for rows whose length is a multiple of 16: resource usage and instructions."""
    names = kernel.arg_names
    aligned = [i for i, n in enumerate(names) if n.endswith(("_ptr", "_stride")) or n == "width"]
    source = ASTSource(
        kernel,
        signature={n: "constexpr" if n in constants else type_of(n, factors) for n in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        options = ["--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run([CUOBJDUMP, *options], capture_output=True, text=True, check=True).stdout


def widest(code: str, instruction: str) -> int:
    """Bytes of the widest access of its kind."""
    widths = re.findall(rf"\b{instruction}\.E(?:\.[A-Z]\w*)*?(?:\.(64|128))?(?=[ .])", code)
    return max((int(width or 32) // 8 for width in widths), default=0)


def main() -> None:
    for kernel, warps, constants in VARIANTS:
        code = assembly(kernel, warps, constants)
        name = f"{kernel.__name__} {constants}"
        registers, stack, local = (int(re.search(rf"\b{w}:(\d+)", code).group(1)) for w in ("REG", "STACK", "LOCAL"))  # type: ignore[union-attr]
        loads, stores = widest(code, "LDG"), widest(code, "STG")
        print(f"{name}: {registers} registers, loads of {loads} bytes, stores of {stores}")
        assert stack == local == 0, f"{name} spills: {stack} bytes of stack, {local} of local memory"
        if kernel is not gradient._fold_kernel:
            assert loads == 16, f"{name}: its widest load has {loads} bytes"
        if "gradient" in name:
            assert stores == 16, f"{name}: its widest store has {stores} bytes"
    # factors of fp32 must compile too
    variant = {"HAS_SLOPE": True, "MASKED_LISTED": True, "IDS": 64, "BLOCK": 4096}
    code = assembly(gradient._gradient_kernel, 8, variant, factors="*fp32")
    print(f"fp32: {code.split('REG:')[1].split()[0]} registers")


if __name__ == "__main__":
    main()
