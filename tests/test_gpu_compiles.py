"""Every Triton kernel compiles for the GPUs that it is meant for, and fits them."""

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

INTEGERS = {
    "width",
    "padded_width",
    "n_tokens",
    "d_sae",
    "d_in",
    "padded_d_in",
    "n_bits",
    "size",
    "k",
}
POINTERS = {
    **dict.fromkeys(("by_token", "by_feature", "words", "listed", "n_listed"), "*i32"),
    "rounded": "*bf16",
    "n_active": "*i64",
}
CONSTANTS = {
    "BLOCK": 512, "BITS": 32, "ROWS": 4, "TOKENS": 128, "FEATURES": 128, "DEPTH": 64,
    "GROUP": 32, "FACTOR": "bf16", "LEARNS_THRESHOLD": True, "IS_TIED": False,
    "HAS_UNIT_NORM": True,
}  # fmt: skip
KERNELS = ("round_rows", "peaks", "screen", "list_bits", "pre_activate", "silence_all_but",
           "decode", "accumulate", "update_features", "update_vector")  # fmt: skip


def resources(kernel_name: str, capability: int, number: str) -> str:
    """What the compiled kernel needs, in cuobjdump's words; multiples of 16 as on a real call."""
    import triton
    from triton.backends.compiler import GPUTarget

    from sparse_coding.kernels import gpu_triton

    kernel = getattr(gpu_triton, kernel_name)
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in CONSTANTS:
            constant = triton.language.bfloat16 if name == "FACTOR" else CONSTANTS[name]
            signature[name], constants[place,] = "constexpr", constant
            continue
        rounded = {"x": "*bf16", "W_enc": "*bf16"} if kernel_name in ("screen", "peaks") else {}
        signature[name] = "i32" if name in INTEGERS else (POINTERS | rounded).get(name, number)
        attributes[place,] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": 8 if kernel_name in ("screen", "peaks") else 4}
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    binary = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    listing = subprocess.check_output([tool, "-res-usage", binary], text=True)
    return f"{listing} shared memory: {compiled.metadata.shared}"


@pytest.mark.parametrize(("capability", "number"), [(80, "*fp32"), (90, "*fp32"), (90, "*fp64")])
@pytest.mark.parametrize("kernel_name", KERNELS)
def test_every_kernel_compiles_and_fits(monkeypatch, tmp_path, kernel_name, capability, number):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if kernel_name in ("screen", "peaks") and number == "*fp64":
        number = "*fp32"  # its bounds are float32 always
    listing = resources(kernel_name, capability, number)
    assert " STACK:0 " in listing, f"registers spill: {listing}"
    # What a block may have on the smallest Ampere card.
    assert int(re.search(r"shared memory: (\d+)", listing)[1]) <= 99 * 1024
