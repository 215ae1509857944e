"""The model of a kernel's time: a copy is predicted to run like a copy, and each resource binds where it should."""

import math

import pytest

from benchmarks.predicted import COPY, RATES, Code, Counts, Kernel, Line, Needs, attention_lines, needs_of, read_code

# A thread of a copy: eight 16-bit elements in, eight out.
COPY_CODE = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   S2R R3, SR_CTAID.X ;
        /*0020*/                   LEA R0, R3, R0, 0x7 ;
        /*0030*/                   IMAD.WIDE R2, R0, 0x10, R4 ;
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0050*/                   IMAD.WIDE R4, R0, 0x10, R6 ;
        /*0060*/                   STG.E.128 desc[UR4][R4.64], R8 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
"""
LOOP_CODE = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0020*/                   MUFU.EX2 R4, R5 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8] ;
        /*0040*/                   FADD R4, R4, R5 ;
        /*0050*/              @!P0 BRA 0x10 ;
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2 ;
        /*0070*/              @!P0 BRA 0x60 ;
        /*0080*/                   EXIT ;
"""
N = 2**30  # elements


def copy_kernel(code: Code) -> Kernel:
    return Kernel("copy", {"num_warps": 4}, N // (8 * 128), code, {})


def test_a_copy_is_predicted_to_take_the_time_of_a_copy():
    line = Line("copy", needs_of(copy_kernel(read_code(COPY_CODE)), [], 4.0 * N), 4 * N / COPY)
    assert line.needs.binding == "bytes"
    assert line.share == 1.0
    assert line.needs.time == 4 * N / COPY
    assert line.needs.issue == 9 * N / 8 / 32  # nine instructions for eight elements of each of 32 lanes


def test_a_planted_count_of_instructions_is_no_longer_a_copy():
    code = read_code(COPY_CODE)
    planted = code._replace(whole=code.whole.plus(Counts(issue=8 * 40)))
    line = Line("copy", needs_of(copy_kernel(planted), [], 4.0 * N), 4 * N / COPY)
    assert line.needs.binding == "issue"
    assert line.share < 0.7


def test_loops_count_as_often_as_they_turn():
    code = read_code(LOOP_CODE)
    assert code == Code(Counts(9, 1, 2 * 64 * 128 * 16), [Counts(5, 1, 2 * 64 * 128 * 16)])  # the other loop waits
    assert code.executed([10.0]) == Counts(4 + 50, 10, 10 * 2 * 64 * 128 * 16)
    needs = needs_of(Kernel("", {"num_warps": 8}, 3, code, {}), [10.0], 1.0)
    assert needs == Needs(1.0, 54 * 24, 32 * 10 * 24, 10 * 2 * 64 * 128 * 16 * 6)  # two warp groups a program


@pytest.mark.parametrize("name", RATES)
def test_the_resource_that_takes_longest_binds(name):
    needs = Needs(**{other: rate * (1e-6 if other != name else 1e-3) for other, rate in RATES.items()})
    assert needs.binding == name
    assert math.isclose(needs.time, 1e-3)


def test_blocks_of_causal_attention_are_counted_once():
    whole, edge = Counts(issue=10, tensor=1), Counts(issue=20, tensor=1)
    code = Code(Counts(issue=30, tensor=2), [whole, edge])
    for name, tile in (("forward_kernel", (128, 64)), ("dkdv_kernel", (64, 128)), ("dq_kernel", (64, 64))):
        M, N = tile
        programs = 1024 // (N if name == "dkdv_kernel" else M)
        kernel = Kernel(name, {"num_warps": 4, "BLOCK_M": M, "BLOCK_N": N}, programs, code, {})
        (line,) = attention_lines(64, 1, 1024, 1, [kernel])
        touched = sum(j * N < (i + 1) * M for i in range(1024 // M) for j in range(1024 // N))
        hidden = sum((j + 1) * N - 1 > i * M for i in range(1024 // M) for j in range(1024 // N)) - (
            1024 // M * (1024 // N) - touched
        )
        assert line.needs.tensor == touched
        assert line.needs.issue == 4 * (10 * (touched - hidden) + 20 * hidden)
