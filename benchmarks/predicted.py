"""python -m benchmarks.predicted [CHECKOUT]: what each kernel should take on an H200, by its machine code.

Needs no GPU: the first measurement confirms or refutes a number that stands in a file. A kernel's time is that of the
resource which it needs longest, each at its full rate, all beside each other:

    bytes     what it reads and writes                          / 4.3e12 a second
    issue     instructions x warps                              / (132 SMs x 4 schedulers x clock)
    special   MUFU instructions x 32 lanes x warps              / (132 SMs x 16 lanes x clock)
    tensor    2 m n k of its HGMMA instructions x warp groups   / 780e12 a second

    clock     1.755 GHz, the lower of those that an H200 has been seen to run at under load (1.755 to 1.98)
    4.3e12    bytes read and written by a copy, read on an H200 in 2026; its datasheet says 4.8e12 for the memory
    780e12    FLOPs of a bare product of random bfloat16 there, read beside it (769 to 798); the datasheet says 989e12

Instructions are read from the code that Triton or nvcc makes for sm_90: those outside the innermost loops once, each
innermost loop times its trips. Both sides of a branch count: an upper bound. Loops that wait for memory do not count.
Attention has a loop for blocks that are visible in part, the longest, and one for whole blocks, the shortest. Of cross
entropy only its two loops count: most of what lies around them is for other forms of a call.

`share` is the time of a copy of the bytes that must be moved, each tensor once, or of the useful FLOPs at the rate of a
bare product, over the predicted time. The kernel reaches it if nothing but that one resource holds it up. Left out are
latency, barriers, occupancy, the L2 cache, launches, and the last wave of programs: where a measured share is below the
predicted one, it is by these.

With CHECKOUT the kernels of that tree are counted beside ours: instructions, registers, spills, before and after.
"""

import argparse
import datetime
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
ARCH = 90
SMS, CLOCK = 132, 1.755e9
COPY, MM = 4.3e12, 780e12  # bytes and FLOPs a second
RATES = {"bytes": COPY, "issue": SMS * 4 * CLOCK, "special": SMS * 16 * CLOCK, "tensor": MM}
BF16 = torch.bfloat16
ROWS = [(65536, 768), (65536, 1024), (32768, 1600), (16384, 4096), (16384, 8192)]  # of norms
SOFTMAX_ROWS = [(65536, 1024), (16384, 4096), (8192, 16384), (4096, 50304)]
CROSS_ENTROPY_ROWS = [(8192, 50304, 1), (8192, 128256, 4)]  # with the blocks that share a row, of compiled-layers.txt
ATTENTION = [(64, 64, 1024, 12), (64, 4, 8192, 16), (128, 4, 8192, 16)]  # D, B, T, H
LINEAR = [(8192, 768, 50304), (8192, 4096, 128256)]  # N, C, V: of the same rows
TENSORS = {  # (N, C) tensors that forward and backward of a row op move, each once
    "layer_norm": (2, 3),
    "rms_norm": (2, 3),
    "add_layer_norm": (4, 4),
    "add_rms_norm": (4, 4),
    "softmax": (2, 3),
}


class Counts(NamedTuple):
    """Of one thread, or for tensor of one warp group."""

    issue: float = 0
    special: float = 0
    tensor: float = 0  # FLOPs

    def plus(self, other: "Counts", times: float = 1) -> "Counts":
        return Counts(*(a + times * b for a, b in zip(self, other, strict=True)))


class Code(NamedTuple):
    """A kernel's machine code: all of it, and its innermost loops."""

    whole: Counts
    loops: list[Counts]

    def executed(self, trips: list[float]) -> Counts:
        """What a thread executes if each loop takes so many trips."""
        found = self.whole
        for loop, times in zip(self.loops, trips, strict=True):
            found = found.plus(loop, times - 1)
        return found


class Kernel(NamedTuple):
    """One launch, as counted."""

    name: str
    tile: dict[str, Any]
    programs: int
    code: Code
    facts: dict[str, Any]  # of compiled_kernels


class Needs(NamedTuple):
    """What a kernel takes of each resource."""

    bytes: float
    issue: float  # instructions of warps
    special: float  # of lanes
    tensor: float  # FLOPs

    @property
    def seconds(self) -> dict[str, float]:
        return {name: getattr(self, name) / rate for name, rate in RATES.items()}

    @property
    def binding(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def time(self) -> float:
        return max(self.seconds.values())


class Line(NamedTuple):
    """A line of the report."""

    name: str
    needs: Needs
    floor: float  # seconds of a copy, or of a bare product

    @property
    def share(self) -> float:
        return self.floor / self.needs.time


# Reading machine code


def read_code(sass: str) -> Code:
    """Counts of one kernel out of what cuobjdump prints."""
    instructions = [
        (int(match[1], 16), match[2], match[3])
        for match in map(reader().INSTRUCTION.search, sass.splitlines())
        if match
    ]
    back = [
        (int(to[1], 16), address)
        for address, name, rest in instructions
        if name == "BRA" and (to := re.search(r"\b0x([0-9a-f]+)", rest)) and int(to[1], 16) < address
    ]
    innermost = [a for a in back if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in back)]

    def counts(first: int, last: int) -> Counts:
        own = [(name, rest) for address, name, rest in instructions if first <= address <= last]
        shapes = (re.match(r"\.(\d+)x(\d+)x(\d+)", rest) for name, rest in own if name == "HGMMA")
        flops = sum(2 * math.prod(map(int, shape.groups())) for shape in shapes if shape)
        return Counts(len(own), sum(name == "MUFU" for name, _ in own), flops)

    loops = [counts(*loop) for loop in innermost]
    return Code(counts(0, instructions[-1][0]), [loop for loop in loops if loop.issue > 4])  # shorter ones wait


def reader() -> Any:
    """This tree's compiled_kernels, also where another tree's is imported."""
    name = "compiled_kernels_of_this_tree"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "support" / "compiled_kernels.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# What is compiled


def cases() -> list[tuple[str, tuple[Any, ...]]]:
    """(op of compiled_kernels, sizes of its launcher): the shapes of the benchmarks."""
    return [
        *(("norms", (N, C, BF16, form)) for form in list(TENSORS)[:-1] for N, C in ROWS),
        *(("softmax", (N, C, BF16, "plain")) for N, C in SOFTMAX_ROWS),
        *(("attention", (D, BF16, "causal")) for D in (64, 128)),
    ]


def further_cases() -> list[tuple[str, tuple[Any, ...]]]:
    """Those without a model of their time: packed attention, and the activations and rotations of GPT-2 and Llama."""
    return [
        *(("attention", (D, BF16, "causal, packed")) for D in (64, 128)),
        *((name, (65536, 3072, BF16, "tanh")) for name in ("gelu", "bias_gelu")),
        ("swiglu", (12288, 8192, BF16)),  # glu's name in older trees
        ("glu", (12288, 8192, BF16, "silu")),
        ("rotary", (12288, 64, 64, "half, in place", BF16)),
    ]


def attention_cases() -> list[tuple[str, tuple[Any, ...]]]:
    return [("attention", (D, BF16, "causal", B, T, H, H)) for D, B, T, H in ATTENTION]


def count(checkout: Path, wanted: list[tuple[str, tuple[Any, ...]]]) -> list[list[Kernel]]:
    """The kernels of each case as that tree launches and this compiler compiles them, in a process of its own."""
    sizes = [(op, [str(size) for size in given]) for op, given in wanted]
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(checkout)]
    done = subprocess.run(command, input=json.dumps(sizes), cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return [
        [
            Kernel(name, tile, programs, Code(Counts(*whole), [Counts(*loop) for loop in loops]), facts)
            for name, tile, programs, (whole, loops), facts in kernels
        ]
        for kernels in json.loads(done.stdout)
    ]


def answer(checkout: Path) -> None:
    """The worker: this process imports the fastlm of that tree."""
    sys.path[0] = str(checkout)
    os.environ["TRITON_CACHE_DIR"] = str(reader().CACHE / "triton")
    here = (checkout / "tests" / "support" / "compiled_kernels.py").exists()
    theirs = importlib.import_module("tests.support.compiled_kernels" if here else "tests.compiled_kernels")
    for module in ("norm_triton", "_norm", "activations"):  # of meta tensors they would take the interpreter's number
        try:
            importlib.import_module(f"fastlm.ops.{module}").num_sms = lambda device: SMS  # type: ignore[attr-defined]
        except ImportError:
            continue
    given = json.loads(sys.stdin.read())
    parsed = [(op, [_parsed(size) for size in sizes]) for op, sizes in given]
    found = [
        _cross_entropy(checkout) if op == "cross_entropy" else _launched(theirs, op, sizes) for op, sizes in parsed
    ]
    print(json.dumps(found))


def _parsed(size: str) -> Any:
    return (
        getattr(torch, size.removeprefix("torch."))
        if size.startswith("torch.")
        else int(size)
        if size.isdigit()
        else size
    )


def _launched(theirs: Any, name: str, sizes: list[Any]) -> list[Kernel]:
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(theirs.ClaimedDriver(ARCH))
    asked: list[tuple[Any, ...]] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        asked.append((kernel, args, grid, options))

    original, JITFunction.run = JITFunction.run, note
    try:
        for op in theirs.OPS:
            if op.name == name:
                op.launch(*sizes)
    finally:
        JITFunction.run = original
    return [_compiled(kernel, args, grid, options) for kernel, args, grid, options in asked]


def _compiled(kernel: Any, args: tuple[Any, ...], grid: Any, options: dict[str, Any]) -> Kernel:
    compiled = kernel.run(*args, grid=(1,), warmup=True, **options)
    with tempfile.NamedTemporaryFile() as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = reader().cuobjdump("-sass", file.name)
        (facts,) = reader().parse_machine_code(reader().cuobjdump("-res-usage", file.name), sass)
    named = dict(zip(kernel.arg_names, args, strict=False))
    tile = {"num_warps": 4} | {key: value for key, value in options.items() if isinstance(value, (int, bool))}
    tile |= {key: named[key] for key in ("P",) if isinstance(named.get(key), int)}
    facts["shared"] = compiled.metadata.shared
    return Kernel(kernel.__name__, tile, math.prod(grid), read_code(sass), facts)


def _cross_entropy(checkout: Path) -> list[Kernel]:
    """The kernel of bfloat16 rows of 512 threads, with neither softcap nor label smoothing."""
    source = checkout / "csrc" / "cross_entropy_cuda.cu"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        command = ["nvcc", "-std=c++20", "-O3", "-cubin", f"-arch=sm_{ARCH}a", str(source), "-o", file.name]
        subprocess.run(command, check=True, capture_output=True)
        sass = reader().cuobjdump("-sass", file.name)
        facts = {
            one["kernel"]: one for one in reader().parse_machine_code(reader().cuobjdump("-res-usage", file.name), sass)
        }
    texts = {part.split("\n", 1)[0].strip(): part for part in sass.split("Function : ")[1:]}
    wanted = re.compile("cross_entropy_kernelI13__nv_bfloat16Lb0ELb0ELi512")
    return [
        Kernel("cross_entropy_kernel", {"num_warps": 16}, 1, read_code(text), facts[name])
        for name, text in texts.items()
        if wanted.search(name)
    ]


# The model


def needs_of(kernel: Kernel, trips: list[float], moved: float, programs: int | None = None) -> Needs:
    executed = kernel.code.executed(trips)
    warps = kernel.tile["num_warps"] * (kernel.programs if programs is None else programs)
    return Needs(moved, executed.issue * warps, 32 * executed.special * warps, executed.tensor * warps / 4)


def row_lines(name: str, N: int, C: int, kernels: list[Kernel]) -> list[Line]:
    """Of a norm or softmax, forward and backward."""
    lines = []
    for kernel, tensors in zip(kernels, TENSORS[name], strict=False):
        tile, moved = kernel.tile, 2.0 * tensors * N * C
        floor = moved / COPY
        if tile.get("NUM_BLOCKS") == 0 or tile.get("MULTI_BLOCK"):
            turns = float(math.ceil(C / tile["BLOCK_C"]))
            moved += 2.0 * (tensors - 1) * N * C  # what is read is read twice
        else:
            turns = math.ceil(N / tile["BLOCK_N"]) / kernel.programs  # of programs that share the rows
        needs = needs_of(kernel, [turns] * len(kernel.code.loops), moved)
        lines.append(Line(f"{name} {kernel.name}, {N} x {C}", needs, floor))
    for kernel in kernels[2:]:  # sums of a norm's partial gradients of weight and bias
        sums = 2 if "layer" in name else 1
        turns = math.ceil(kernel.tile["P"] / kernel.tile["BLOCK_P"])
        needs = needs_of(kernel, [turns] * len(kernel.code.loops), 4.0 * sums * kernel.tile["P"] * C)
        lines.append(Line(f"{name} {kernel.name}, {kernel.tile['P']} x {C}", needs, needs.bytes / COPY))
    return lines


def attention_lines(D: int, B: int, T: int, H: int, kernels: list[Kernel]) -> list[Line]:
    """Causal; forward, delta, dk and dv, dq."""
    lines, of = [], f"D {D}, B {B} T {T} H {H}"
    tensor, useful = 2.0 * B * T * H * D, 2.0 * B * H * T * T * D  # 4 T^2 D, of which causality takes half
    for kernel in kernels:
        M, N = kernel.tile.get("BLOCK_M", 0), kernel.tile.get("BLOCK_N", 0)
        if kernel.name == "delta_kernel":
            needs = needs_of(kernel, [], 2 * tensor)
            lines.append(Line(f"attention {kernel.name}, {of}", needs, needs.bytes / COPY))
            continue
        if kernel.name == "dkdv_kernel":
            steps = [T // M - j * N // M for j in range(T // N)]
            whole = [T // M - math.ceil((j + 1) * N / M) for j in range(T // N)]
        else:
            steps = [math.ceil((i + 1) * M / N) for i in range(T // M)]
            whole = [(i * M + 1) // N for i in range(T // M)]
        trips = [0.0] * len(kernel.code.loops)
        by_length = sorted(range(len(trips)), key=lambda loop: kernel.code.loops[loop].issue)
        trips[by_length[0]] = sum(whole) / len(whole)
        trips[by_length[-1]] += (sum(steps) - sum(whole)) / len(steps)
        tensors, products = {"forward_kernel": (4, 1.0), "dkdv_kernel": (6, 1.5), "dq_kernel": (5, 1.0)}[kernel.name]
        needs = needs_of(kernel, trips, tensors * tensor)
        lines.append(Line(f"attention {kernel.name}, {of}", needs, products * useful / MM))
    return lines


def cross_entropy_line(N: int, V: int, blocks: int, kernel: Kernel) -> Line:
    """In place: a loop reads the row into shared memory, one writes the gradient from there."""
    threads = 32 * kernel.tile["num_warps"]
    vectors, turn = V / 8 / blocks, 4 * threads  # of 8 elements; a thread takes four in a turn
    trips = vectors // turn + min(1, vectors % turn / threads)  # warps without a vector leave
    reads, writes = sorted(kernel.code.loops, key=lambda loop: loop.issue)[-2:]
    executed = kernel._replace(code=Code(Counts().plus(reads, trips).plus(writes, trips), []))
    needs = needs_of(executed, [], 4.0 * N * V, programs=N * blocks)
    return Line(f"cross_entropy in place, {N} x {V}", needs, needs.bytes / COPY)


def together(name: str, lines: list[Line], floor: float) -> str:
    """One measured case, whose kernels follow one another."""
    time = sum(line.needs.time for line in lines)
    return _columns(name, ["", "", "", "", f"{1e6 * time:.1f}", "", f"{floor / time:.0%}"])


def predictions() -> list[str]:
    wanted = [case for case in cases() if case[0] != "attention"] + attention_cases() + [("cross_entropy", ())]
    *counted, ce = count(ROOT, wanted)
    text = [
        _columns("kernel", ["bytes us", "issue us", "special us", "tensor us", "predicted us", "bound by", "share"])
    ]
    for (op, sizes), kernels in zip(wanted, counted, strict=False):
        if op == "attention":
            D, _, _, B, T, H, _ = sizes
            lines = attention_lines(D, B, T, H, kernels)
            title, floor = f"attention forward + backward, D {D}, B {B} T {T} H {H}", 7.0 * B * H * T * T * D / MM
        else:
            N, C, _, form = sizes
            name = "softmax" if op == "softmax" else form
            lines = row_lines(name, N, C, kernels)
            title, floor = f"{name} forward + backward, {N} x {C}", 2.0 * sum(TENSORS[name]) * N * C / COPY
        text += [*map(_line, lines), together(title, lines, floor)]
    (kernel,) = ce
    losses = [cross_entropy_line(N, V, blocks, kernel) for N, V, blocks in CROSS_ENTROPY_ROWS]
    text += map(_line, losses)
    for (N, C, V), line in zip(LINEAR, losses, strict=True):
        products, loss = 6.0 * N * C * V / MM, line.needs.time
        text.append(
            f"linear_cross_entropy {N} x {C} by {V}: products {1e6 * products:.1f} us at the rate of mm, cross entropy "
            f"{1e6 * loss:.1f} us, together {(products + loss) / products:.2f} times the products"
        )
    return text


def _line(line: Line) -> str:
    times = [f"{1e6 * seconds:.1f}" for seconds in line.needs.seconds.values()]
    return _columns(line.name, [*times, f"{1e6 * line.needs.time:.1f}", line.needs.binding, f"{line.share:.0%}"])


def _columns(name: str, values: list[str]) -> str:
    return f"{name:<66}" + "".join(f"{value:>18}" for value in values).rstrip()


def before_and_after(checkout: Path) -> list[str]:
    """Both trees' kernels, a line each; the kernels of a case are told apart by name, "-" is one that a tree lacks."""
    wanted = [*cases(), *further_cases(), ("cross_entropy", ())]
    text = [_columns("kernel", ["instructions", "longest loop", "elements a thread", "registers", "spills", "shared"])]
    for (op, sizes), *trees in zip(wanted, *(count(tree, wanted) for tree in (checkout, ROOT)), strict=True):
        of = " ".join(str(size).removeprefix("torch.") for size in sizes[1 if op != "attention" else 0 :])
        for name in dict.fromkeys(kernel.name for kernels in trees for kernel in kernels):
            both = [next((kernel for kernel in kernels if kernel.name == name), None) for kernels in trees]
            text.append(
                _columns(
                    f"{op} {name}, {of}".removesuffix(", "),
                    [
                        _change(both, fact)
                        for fact in ("instructions", "loop", "elements", "registers", "spills", "shared")
                    ],
                )
            )
    return text


def _change(kernels: list[Kernel | None], fact: str) -> str:
    found = []
    for kernel in kernels:
        tile = {} if kernel is None else kernel.tile
        elements = tile.get("BLOCK_N", 0) * tile.get("BLOCK_C", 0) * max(1, tile.get("NUM_BLOCKS", 1))
        number = (
            "-"
            if kernel is None
            else elements // (32 * tile["num_warps"])
            if fact == "elements"
            else kernel.facts[fact]
        )
        found.append(str(number))
    return " > ".join(found)


def main(argv: list[str] | None = None) -> None:
    summary, _, explained = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=summary)
    parser.add_argument("checkout", nargs="?", type=Path, metavar="CHECKOUT", help="count its kernels beside ours")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the text too")
    arguments = parser.parse_args(argv)
    from benchmarks import machine

    command = f"python -m benchmarks.predicted{' CHECKOUT' if arguments.checkout else ''}"
    head = f"{command}, {datetime.date.today()}, {machine.commit_of(ROOT)}"
    if arguments.checkout:
        lines = [f"{head} (after) beside {machine.commit_of(arguments.checkout)} (before); sm_{ARCH}, one compiler", ""]
        lines += before_and_after(arguments.checkout.resolve())
    else:
        lines = [head, *explained.rstrip().splitlines(), "", *predictions()]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        answer(Path(sys.argv[2]))
    else:
        main()
