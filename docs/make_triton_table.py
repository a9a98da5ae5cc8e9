"""Compile the Triton kernels for an A100 and an H100, without either, and write docs/triton.md.

``python docs/make_triton_table.py``: needs the package triton, whose wheel holds the assembler; minutes on one core.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llama_attn.engines import _triton_kernels as kernels
from llama_attn.engines.triton import HEAD_DIMS


@dataclass(frozen=True)
class Device:
    """What the estimate needs to know of a GPU, from its vendor's data sheet.

    Args:
        name: As it is sold.
        capability: Compute capability × 10.
        peak: Of the tensor cores in bfloat16 [FLOP/s].
        bandwidth: Of the memory [byte/s].
        multiprocessors: How many there are.
        tensor: Of one multiprocessor in a clock [FLOP].
        lanes: Float32 operations of one multiprocessor in a clock.
        shared: Shared memory of one multiprocessor [KiB].
    """

    name: str
    capability: int
    peak: float
    bandwidth: float
    multiprocessors: int
    tensor: int
    lanes: int
    shared: int

    @property
    def clocks(self) -> float:
        """Of all multiprocessors together [1/s]."""
        return self.peak / self.tensor


A100 = Device("A100", 80, 312e12, 2.0e12, 108, 2048, 64, 164)
H100 = Device("H100", 90, 989e12, 3.35e12, 132, 4096, 128, 228)
DEVICES = (A100, H100)
ELEMENTS = ("bf16", "fp16")
KERNELS = tuple(dict.fromkeys(kernel for kernel, _ in kernels.TILES))
# What the forward is compiled for: inside the model, and beside another backend.
FORWARD_MODES = {
    "fused": {"HAS_VALUE": True, "MEASURE": True},
    "fused, padded": {"HAS_VALUE": True, "MEASURE": True},
    "fused, one query": {"HAS_VALUE": True, "MEASURE": True, "num_queries": 1},
    "output only": {"HAS_VALUE": True, "MEASURE": False},
    "observed": {"HAS_VALUE": False, "MEASURE": True},
}
VARIANTS = tuple(
    (kernel, mode) for kernel in KERNELS for mode in (FORWARD_MODES if kernel == "attention_forward" else ("",))
)
# Exponentials of a multiprocessor in a clock, on both.
EXPONENTIALS = 16
# Arithmetic on every score beside the products. Forward: scale, maximum, subtract, convert, and one each for Σ e,
# Σ e (s − m), Σ e², |i − j| and Σ e |i − j|. Received: scale and subtract in one, two comparisons, select, add.
# Attention alone: scale and subtract in one, maximum, convert, Σ e.
OPERATIONS = {"forward": 9, "received": 5, "attention": 4}
HEADS, KV_HEADS = 32, 8


@dataclass(frozen=True)
class Usage:
    """What one program of a compiled kernel takes.

    Args:
        kernel: Its name.
        mode: What the forward was asked for; empty for the others.
        device: For which.
        head_dim: Channels per head.
        element: Of query, key and value.
        registers: Of each thread.
        stack: Where registers are spilled to, of each thread [byte].
        shared: Shared memory [byte].
        warps: Of 32 threads.
    """

    kernel: str
    mode: str
    device: Device
    head_dim: int
    element: str
    registers: int
    stack: int
    shared: int
    warps: int

    @property
    def programs_per_multiprocessor(self) -> int:
        """How many run at once, by registers (65,536) and shared memory, of which the system takes 1 KiB for each."""
        return min(65536 // (self.registers * 32 * self.warps), self.device.shared * 1024 // (self.shared + 1024))


def compile_kernel(kernel: str, mode: str, device: Device, head_dim: int, element: str) -> Usage:
    """Compile one kernel ahead of time and read what the assembler says."""
    function = getattr(kernels, kernel)
    options = kernels.options(kernel, head_dim, element_size=2, has_value=mode != "observed")
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    constants = options | (FORWARD_MODES[mode] if kernel == "attention_forward" else {})
    if "position_step" in function.arg_names:
        # Triton makes a constant of every integer that is 1 in a launch.
        constants |= {"position_step": 1}
    if "real_ptr" in function.arg_names and mode != "fused, padded":
        constants |= {"real_ptr": None}
    if not constants.get("HAS_VALUE", True):
        constants |= {"value_ptr": None, "output_ptr": None, "value_strides": None, "output_strides": None}
    if not constants.get("MEASURE", True):
        constants |= {"statistics_ptr": None}
    signature, aligned = {}, {}
    for index, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else argument_type(name, element)
        # PyTorch aligns memory to 16 bytes, and rows of 64, 96 or 128 channels are multiples of 16 elements.
        if name.endswith("_ptr"):
            aligned[index,] = [["tt.divisibility", 16]]
        elif name.endswith("_strides") and name not in constants:
            aligned |= {(index, axis): [["tt.divisibility", 16]] for axis in range(3)}
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", device.capability, 32), options=launch)
    registers, stack = resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    return Usage(kernel, mode, device, head_dim, element, registers, stack, shared, launch["num_warps"])


def argument_type(name: str, element: str) -> str | tuple[str, ...]:
    """Triton's word for the type of an argument."""
    if name.endswith("_strides"):
        return ("i32", "i32", "i32")
    if name in ("scaling", "score_scale"):
        return "fp32"
    if not name.endswith("_ptr"):
        return "i32"
    if name == "real_ptr":
        return "*i8"
    if name.startswith(("first_", "stop_")):
        return "*i32"
    return "*fp32" if name in ("logsumexp_ptr", "statistics_ptr", "received_ptr", "shift_ptr") else f"*{element}"


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack of the one kernel in ``cubin``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG and STACK, got {report!r}")
    return int(found[1]), int(found[2])


def resource_rows(kernel: str, mode: str) -> Iterator[str]:
    """The rows of the table for one kernel: the larger of bfloat16 and float16."""
    for head_dim in HEAD_DIMS:
        cells = []
        for device in DEVICES:
            usages = [compile_kernel(kernel, mode, device, head_dim, element) for element in ELEMENTS]
            cells += [
                max(usage.registers for usage in usages),
                max(usage.stack for usage in usages),
                f"{max(usage.shared for usage in usages) / 1024:.0f}",
                min(usage.programs_per_multiprocessor for usage in usages),
            ]
        name = f"{kernel}, {mode}" if mode else kernel
        yield f"| {name} | {head_dim} | " + " | ".join(map(str, cells)) + " |"


@dataclass(frozen=True)
class Bound:
    """The least time of a pass over all pairs of query and key [s], and what sets it."""

    seconds: float
    limit: str


def bound(device: Device, head_dim: int, length: int, products: int, operations: int, moved: int) -> Bound:
    """The slowest of tensor cores, exponentials, arithmetic and memory, none of which can be beaten.

    Args:
        device: On which.
        head_dim: Channels per head.
        length: Tokens, T.
        products: Matrix products of T × T × channels.
        operations: Arithmetic on every score.
        moved: Bytes that are read or written at least once.
    """
    pairs = HEADS * length * (length + 1) / 2
    channels = triton.next_power_of_2(head_dim)
    times = {
        "tensor cores": 2 * products * channels * pairs / device.peak,
        "exponentials": pairs / EXPONENTIALS / device.clocks,
        "arithmetic": operations * pairs / device.lanes / device.clocks,
        "memory": moved / device.bandwidth,
    }
    limit = max(times, key=lambda name: times[name])
    return Bound(times[limit], limit)


def roofline_rows() -> Iterator[str]:
    """The rows of the estimate."""
    for head_dim in HEAD_DIMS:
        for length in (2048, 8192, 32768):
            query_bytes, key_bytes = (2 * heads * length * head_dim for heads in (HEADS, KV_HEADS))
            row_bytes = 4 * HEADS * length
            cells = []
            for device in DEVICES:
                moved = 2 * query_bytes + 2 * key_bytes
                forward = bound(device, head_dim, length, 2, OPERATIONS["forward"], moved + 9 * row_bytes)
                received = bound(
                    device, head_dim, length, 1, OPERATIONS["received"], query_bytes + key_bytes + 2 * row_bytes
                )
                alone = bound(device, head_dim, length, 2, OPERATIONS["attention"], moved)
                cells += [
                    f"{1e3 * forward.seconds:.3g} ({forward.limit})",
                    f"{1e3 * received.seconds:.3g} ({received.limit})",
                    f"{1e3 * alone.seconds:.3g} ({alone.limit})",
                ]
            yield f"| {head_dim} | {length:,} | " + " | ".join(cells) + " |"


INTRODUCTION = """# The Triton engine

`attn_implementation="streaming_triton"`, or `AttentionStatsConfig(engine="triton")` beside another backend, on Linux
with a CUDA device: `pip install 'llama_attn[triton]'`. It is never chosen by itself.

**Not yet timed on a GPU.** What is below was compiled or computed without one. The kernels are tested against float64
in Triton's interpreter (`tests/test_triton.py`). On a machine with a GPU, one command of at most eight minutes does the
rest:

```
make gpu
```

It checks engines, backends (FlashAttention 2 and 3 where they are installed) and models against float64, times the kernels
against those of PyTorch and Llama-3-8B's shape against stock sdpa, and measures memory at 32,768 and 131,072 tokens; what
it found stands in [Benchmarks](benchmarks.md) then. `python benchmarks/gpu.py --dry-run` rehearses it on a CPU.

| | |
|---|---|
| statistics | the default set, `effective_keys`, `received_total`; others are observed beside it by the torch engine |
| input | bfloat16, float16 (float32 for tests: it spills registers), head sizes 64, 96 and 128, any group size |
| who sees whom | causal or not, cache, padding, packed sequences, `query_stride` |
| refused, with a ValueError | a 4-D mask of one's own, other head sizes, float64 |
| gradients | two kernels; no atomic additions, so they are the same every time |
| not made for | decoding: one query fills a tile of 128, and no two programs share the keys of a head |

This page is written by `docs/make_triton_table.py` with Triton {version}.

## What the kernels take

Compiled ahead of time for sm_80 (A100) and sm_90 (H100): registers of a thread, bytes of it that are spilled, shared
memory of a program [KiB], and how many programs a multiprocessor holds. A head size of 96 is computed as 128.

| kernel | head size | A100: registers | spilled | shared | programs | H100: registers | spilled | shared | programs |
|---|---|---|---|---|---|---|---|---|---|
"""
ESTIMATE = """
## What they could take: an estimate

A lower bound of the time, not a measurement: milliseconds for one layer of {heads} heads and {kv_heads} KV heads,
batch 1, causal. With P = heads × T (T + 1) / 2 pairs and D channels (96 counts as 128) a pass takes at least the largest
of

- tensor cores: 2 × products × D × P / peak, 2 products in the forward and 1 for what is received;
- exponentials: P / (16 × multiprocessors × clock);
- arithmetic: operations × P / (lanes × multiprocessors × clock), {forward} operations on each score in the forward,
  {received} for what is received, {attention} in attention without statistics; 64 lanes on A100, 128 on H100;
- memory: bytes read and written once / bandwidth.

A100: 312 TFLOP/s, 2.0 TB/s, 108 multiprocessors at {a100:.2f} GHz. H100: 989 TFLOP/s, 3.35 TB/s, 132 at {h100:.2f} GHz.

| head size | T | A100: forward | received | attention alone | H100: forward | received | attention alone |
|---|---|---|---|---|---|---|---|
"""


def page() -> str:
    """The page of the documentation."""
    resources = [row for kernel, mode in VARIANTS for row in resource_rows(kernel, mode)]
    clocks = {device.name.lower(): device.clocks / device.multiprocessors / 1e9 for device in DEVICES}
    estimate = ESTIMATE.format(heads=HEADS, kv_heads=KV_HEADS, **OPERATIONS, **clocks)
    lines = [INTRODUCTION.format(version=triton.__version__) + "\n".join(resources), *roofline_rows()]
    return lines[0] + "\n" + estimate + "\n".join(lines[1:]) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "triton.md").write_text(page())
