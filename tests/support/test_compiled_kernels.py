"""Every GPU kernel, compiled here for each architecture we support, holds what its design promises."""

import re
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch

from fastlm.ops._triton import HAS_TRITON, tl
from tests.support.compiled_kernels import (
    CHIPS,
    IMAGES,
    OPS,
    RECORD,
    ROOT,
    ROWS,
    Launch,
    Layout,
    Limits,
    Report,
    judged,
    judged_layout,
    make_hashes_reproducible,
    parse_machine_code,
    recorded_facts,
    results_of_a_fresh_process,
    triton_source,
)

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton, which brings the compiler, is not installed"),
    pytest.mark.timeout(1800),  # hundreds of compilations, where the cache is cold
]

SASS = """
        code for sm_90
                Function : _kernel
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0025*/                   LDGDEPBAR ;
        /*0030*/                   STL [R1], R4 ;
        /*0040*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R4, gdesc[UR4] ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/              @!P0 BRA 0x50 ;
        /*0080*/                   FADD R4, R4, R5 ;
        /*0090*/              @UP1 BRA 0x20 ;
        /*00a0*/                   BRA 0xa0;
        /*00b0*/                   NOP;
"""
USAGE = """
Fatbin elf code:
arch = sm_90
 Function _kernel:
  REG:72 STACK:8 SHARED:64 LOCAL:0 CONSTANT[0]:580 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
FACTS = {
    "kernel": "_kernel", "arch": 90, "registers": 72, "spills": 1, "shared": 64,
    "wide_loads": 2, "narrow_loads": 1, "wide_stores": 0, "narrow_stores": 1, "tensor_cores": 1,
    "barriers": 1, "instructions": 12, "loop": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return results_of_a_fresh_process()


def test_compiled_kernels_hold_their_design(results):
    reports = [Report(*fields) for fields in results["reports"]]
    failures = [f"{r.op} {r.kernel} {r.tile} sm_{r.arch}: {', '.join(r.failures)}" for r in reports if r.failures]
    assert not failures, "\n".join(failures)
    assert {(r.op, r.arch) for r in reports} >= {(op.name, arch) for op in OPS for _, arch in op.tasks()}
    if new := {r.key for r in reports} - recorded_facts().keys():
        warnings.warn(
            f"{len(new)} sources are not in {RECORD.name}: `make kernels ARGS=--record` adds them", stacklevel=1
        )


def test_every_chip_has_reports():
    assert {arch for op in OPS for _, arch in op.tasks()} == CHIPS.keys()


def test_images_of_cuda_code_are_those_that_setup_builds():
    built = re.findall(r"code=\[?sm_(\d+)", (ROOT / "setup.py").read_text())
    assert {int(arch) for arch in built} == set(IMAGES.values())


@pytest.mark.soak
def test_sm_89_runs_the_machine_code_of_sm_86():
    unlike = results_of_a_fresh_process("--sm-89")["unlike"]
    assert len(unlike) > 30
    assert not any(unlike), unlike


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, which compiles CUDA C++, is missing")
def test_cross_entropy_stages_rows_of_real_vocabularies(results):
    layouts = [Layout(*fields) for fields in results["layouts"]]
    failures = [f"{x.V} {x.dtype} sm_{x.arch}: {', '.join(x.failures)}" for x in layouts if x.failures]
    assert not failures, "\n".join(failures)
    assert [(x.V, x.dtype, x.arch) for x in layouts] == ROWS
    clusters = {(x.V, x.dtype): x.cluster for x in layouts if x.arch == 90 and x.V > 50257 and x.dtype != "__half"}
    assert clusters == {
        (50304, "float"): 2, (50304, "__nv_bfloat16"): 1, (128256, "float"): 8, (128256, "__nv_bfloat16"): 4,
    }  # fmt: skip


def test_launchers_choose_only_compiled_tiles(results):
    assert results["unlisted"] == {op.name: [] for op in OPS}


def test_recorded_kernels_are_what_the_compiler_makes(results):
    assert results["misrecorded"] == {op.name: [] for op in OPS}


@pytest.mark.parametrize(
    "change",
    [
        {"arch": 80},
        {"kernel": SimpleNamespace(cache_key="another source")},
        {"args": (torch.empty(8, dtype=torch.float16, device="meta"), 7)},
        {"args": (torch.empty(9, device="meta")[1:], 7)},  # no longer on 16 bytes
        {"args": (torch.empty(8, device="meta"), 8)},
        {"options": {"num_warps": 8}},
    ],
    ids=["architecture", "source", "dtype", "alignment", "number", "warps"],
)
def test_a_kernel_is_known_by_all_that_it_is_compiled_from(change):
    def key(arch=90, **fields):
        kernel, args = SimpleNamespace(cache_key="source"), (torch.empty(8, device="meta"), 7)
        return triton_source(Launch(**{"kernel": kernel, "args": args, "options": {"num_warps": 4}} | fields), arch).key

    assert key() == key()
    assert key(**change) != key()


def test_hash_of_a_kernel_is_the_same_whatever_was_hashed_before():
    from triton.runtime.jit import JITFunction

    make_hashes_reproducible()
    FACTOR = tl.constexpr(2)

    def scaled(x):
        return x * FACTOR

    scaled, hashes = JITFunction(scaled), []
    for called_first in (False, True):

        def kernel(x):
            scaled(x)

        scaled.hash, scaled.used_global_vals = None, {}
        if called_first:
            assert scaled.cache_key
        hashes.append(JITFunction(kernel).cache_key)
    assert hashes[0] == hashes[1]


def test_machine_code_is_read_for_what_it_does():
    assert parse_machine_code(USAGE, SASS) == [FACTS]


@pytest.mark.parametrize(
    ("change", "limits", "failure"),
    [
        ({}, Limits(), "1 spills"),
        ({"shared": 228 * 1024}, Limits(), "233472 bytes of shared memory, the chip has 232448"),
        ({}, Limits(wide_stores=True), "no 16-byte stores"),
        ({}, Limits(narrow_loads=0), "1 loads of less than 16 bytes, at most 0 expected"),
        ({"tensor_cores": 0}, Limits(tensor_cores=True), "no tensor-core instruction"),
    ],
)
def test_a_kernel_that_misses_its_design_is_reported(change, limits, failure):
    assert failure in judged("op", "kernel", "", 90, FACTS | change, limits).failures


@pytest.mark.parametrize(("arch", "most"), [(75, 64), (80, 163), (86, 99), (90, 227), (103, 227), (120, 99)])
def test_shared_memory_is_held_to_that_of_the_chip(arch, most):
    for spare, failures in ((0, ()), (-1, (f"{most * 1024 + 1} bytes of shared memory, the chip has {most * 1024}",))):
        facts = FACTS | {"spills": 0, "shared": most * 1024 - spare}
        assert judged("op", "kernel", "", arch, facts, Limits()).failures == failures


@pytest.mark.parametrize(
    ("launch", "change", "failure"),
    [
        ((512, 1, 1, 50304, 50304, 100624), {"spills": 3}, "3 spills"),
        ((512, 1, 1, 120000, 120000, 240016), {}, "240304 bytes of shared memory, the chip has 232448"),
        ((512, 1, 1, 50304, 50000, 100016), {}, "304 elements of a block's 50304 are read twice"),
        (
            (512, 1, 1, 50304, 50304, 100624),
            {"registers": 72},
            "one block on a multiprocessor, which idles between its passes",
        ),
    ],
)
def test_a_layout_that_misses_its_design_is_reported(launch, change, failure):
    facts = FACTS | {"registers": 64, "spills": 0, "shared": 288} | change
    variants = [judged("op", "kernel", "", 90, facts, Limits())] * 4
    assert judged_layout(50304, "__nv_bfloat16", 90, launch, variants).failures[0] == failure


def test_a_kernel_that_holds_its_design_is_not():
    assert judged("op", "kernel", "", 90, FACTS | {"spills": 0}, Limits(wide_loads=True, narrow_loads=1)).failures == ()
