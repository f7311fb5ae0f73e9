"""A recorded launch, as machine code of an architecture, and the figures of that code. Needs triton, and no GPU.

Triton's own launcher compiles (`JITFunction.warmup`), under a driver that names an architecture and has no device, so
that argument types, divisibility and ones are specialised as they would be on that GPU.
"""

import contextlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from pear_kernels.backends.triton.launch import OPTIONS

INSTRUCTION_BYTES = 16
MNEMONIC = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.MULTILINE)
MATRIX_OR_COPY = re.compile(r"\bw?g?mma\.|\btcgen05\.mma|\bcp\.async")
RESOURCES = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")


class Chip(NamedTuple):
    shared_limit: int  # bytes that a block may ask for
    matrix: str  # its matrix instruction, as PTX calls it
    matrix_sass: str  # the same as machine code calls it, a regular expression


CHIPS = {
    80: Chip(163 * 1024, "mma.sync", r"HMMA"),
    90: Chip(227 * 1024, "wgmma", r"HGMMA"),
    100: Chip(227 * 1024, "tcgen05", r"UTC[A-Z]MMA"),
}
TENSOR_MEMORY_LIMIT = 512  # columns, on sm_100
LOADS = {"TMA": r"UTMALDG|UBLKCP", "cp.async": r"LDGSTS"}  # how a kernel fetches ahead of its use


class Figures(NamedTuple):
    """Of one kernel in one configuration on one architecture."""

    registers: int  # a thread
    spills: int  # bytes a thread, all of its local memory
    shared: int  # bytes a block
    instructions: int  # of machine code, its padding included
    matrix: str  # "wgmma" and the like; "none"
    loads: str  # "TMA", "cp.async"; "none" for plain loads
    kind: str  # "product"; "float32 product" in full precision, which no matrix unit has; "rows" has no `tl.dot`
    tensor_memory: int  # columns


class Machine:
    """As much of a triton driver as compiling takes."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # triton keeps what it compiled by device: no other device has this number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[None]:
    driver.set_active(Machine(arch))
    try:
        yield
    finally:
        driver.set_active(None)  # found again when it is next asked for


def warmup(launch, arch: int):
    """The compiled kernel of a `pear_kernels.backends.triton.launch.Launch`."""
    with compiling_for(arch):
        return launch.kernel.warmup(
            *launch.args,
            grid=launch.grid,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **OPTIONS,
            **launch.constexprs,
        )


class Variant(NamedTuple):
    """What tells one machine code of a kernel from another: launches with equal variants share it."""

    kernel: str
    config: str  # dtypes, tile, options, warps, stages
    key: str  # triton's own


def variant(launch, arch: int) -> Variant:
    """Nothing is compiled: triton is stopped when it has worked out types and specialisations."""
    found = {}

    def stop(*, key, compile, **_) -> bool:
        found.update(compile, key=key)
        return True

    launch.kernel.device_caches.pop(arch, None)  # triton asks the hook only of what it has not compiled yet
    knobs.runtime.jit_cache_hook, before = stop, knobs.runtime.jit_cache_hook
    try:
        warmup(launch, arch)
    finally:
        knobs.runtime.jit_cache_hook = before
    return Variant(launch.kernel.__name__, describe(launch, found["signature"], found["configs"][0]), found["key"])


def describe(launch, signature: dict[str, str], attributes: dict[tuple, list]) -> str:
    """A configuration in a line: "bf16,i64,fp32 128x256x64 SOFTCAP -bias D%16 w8 s3"."""
    parameters = {parameter.name: number for number, parameter in enumerate(launch.kernel.params)}
    given = dict(zip(parameters, launch.args, strict=False)) | launch.constexprs
    dtypes, tile, options, remarks = [], [], [], []
    for name, kind in signature.items():
        parameter = launch.kernel.params[parameters[name]]
        value, divisible = given.get(name), bool(attributes.get((parameter.num,)))
        if kind == "constexpr":
            if name.startswith("BLOCK") and isinstance(value, int):
                tile.append(str(value))
            elif parameter.is_constexpr and value is True:
                options.append(name)
            elif parameter.is_constexpr and value is not False and value is not None and not name.endswith("_RULE"):
                options.append(f"{name}={value}")
            elif value is None:
                remarks.append(f"-{name}")
            elif not parameter.is_constexpr:
                remarks.append(f"{name}=1")
        elif kind.startswith("*") or kind.startswith("tensordesc"):
            dtype = re.match(r"(?:\*k?|tensordesc<)(\w+)", kind).group(1)
            dtypes += [dtype] * (dtypes[-1:] != [dtype])
            if kind.startswith("*") and not divisible:
                remarks.append(f"{name} misaligned")
        elif kind in ("i32", "i64", "u64") and not parameter.do_not_specialize:
            remarks += [f"{name}%16"] * (not divisible) + [f"{name}:{kind}"] * (kind != "i32")
    parts = [",".join(dtypes), "x".join(tile), *options, *remarks, f"w{launch.num_warps}", f"s{launch.num_stages}"]
    return " ".join(filter(None, parts))


def inspect(launch, arch: int) -> Figures:
    """Compile, and read the machine code."""
    compiled = warmup(launch, arch)
    binary, kind = compiled.asm["cubin"], kind_of(compiled.asm["ttir"])
    resources = dict(RESOURCES.findall(cuobjdump(binary, "--dump-resource-usage")))
    # a disassembler takes most of a second to start: what PTX has no trace of, its assembler does not add
    names = MNEMONIC.findall(cuobjdump(binary, "-sass")) if MATRIX_OR_COPY.search(compiled.asm["ptx"]) else []

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in set(names))

    matrix = [chip.matrix for chip in CHIPS.values() if has(chip.matrix_sass)]
    loads = [name for name, pattern in LOADS.items() if has(pattern)]
    return Figures(
        registers=int(resources["REG"]),
        spills=max(int(resources["STACK"]), int(resources["LOCAL"])),
        shared=compiled.metadata.shared,
        instructions=code_bytes(binary) // INSTRUCTION_BYTES,
        matrix="+".join(matrix) or "none",
        loads="+".join(loads) or "none",
        kind=kind,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
    )


def cuobjdump(binary: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def code_bytes(binary: bytes) -> int:
    """Of the sections ".text.<kernel>" of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", binary, 0x28)
    size, count, names = struct.unpack_from("<HHH", binary, 0x3A)
    # of each section: where its name stands, (type, flags, address,) its offset, its bytes
    sections = [struct.unpack_from("<I20xQQ", binary, table + number * size) for number in range(count)]
    texts = sections[names][1]
    return sum(length for name, _, length in sections if binary.startswith(b".text.", texts + name))


def kind_of(ttir: str) -> str:
    dots = [line for line in ttir.splitlines() if re.search(r"\btt\.dot\b", line)]
    if not dots:
        return "rows"
    # ieee precision is the default, and not printed
    exact = all("xf32> *" in line and not re.search(r"inputPrecision = (?!ieee)", line) for line in dots)
    return "float32 product" if exact else "product"
