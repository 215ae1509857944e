"""Every launch of a Triton kernel is one that a CUDA driver accepts, at ordinary and at extreme sizes, and Triton's."""

import ctypes

import pytest

from fastlm.ops._triton import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("triton, which launches the kernels, is not installed", allow_module_level=True)

from tests.support import cuda_stand_in
from tests.support.launches import results_of_a_fresh_process

SUCCESS, INVALID_VALUE, INVALID_CONTEXT, INVALID_HANDLE, NOT_SUPPORTED = 0, 1, 201, 400, 801
CLUSTER_DIMENSION, MAX_DYNAMIC_SHARED_SIZE = 4, 8  # attributes of a launch and of a function
KIB = 1024


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        *[(name, ctypes.c_uint) for name in ("x", "y", "z", "block_x", "block_y", "block_z", "shared")],
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint * 16))


@pytest.fixture
def cuda():
    """The library, its device of sm_90 current."""
    library = ctypes.CDLL(str(cuda_stand_in.build()))
    library.cuCtxSetCurrent(ctypes.c_void_p(90))
    return library


@pytest.fixture
def function(cuda):
    module, found = ctypes.c_void_p(), ctypes.c_void_p()
    assert cuda.cuModuleLoadData(ctypes.byref(module), b"image") == SUCCESS
    assert cuda.cuModuleGetFunction(ctypes.byref(found), module, b"kernel") == SUCCESS
    return found


def launch(cuda, function, cluster: int = 0, **fields) -> int:
    config = LaunchConfig(**{"x": 1, "y": 1, "z": 1, "block_x": 128, "block_y": 1, "block_z": 1} | fields)
    if cluster:
        attribute = Attribute(id=CLUSTER_DIMENSION, value=(cluster, 1, 1))
        config.attributes, config.num_attributes = ctypes.addressof(attribute), 1
    return cuda.cuLaunchKernelEx(ctypes.byref(config), function, None, None)


def violation(cuda) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(INVALID_VALUE, ctypes.byref(text))
    return text.value.decode()


def test_a_driver_accepts_every_launch():
    results = results_of_a_fresh_process()
    assert not results["wrong"], "\n".join(results["wrong"])
    assert results["never launched"] == []
    assert results["launches"] > 1000


@pytest.fixture(scope="module")
def kept():
    return results_of_a_fresh_process("--kept")


def test_launches_by_kept_launchers_are_those_by_triton(kept):
    assert not kept["different"], "\n".join(kept["different"])
    assert len(kept["kernels"]) > 12
    assert kept["launches"] > 1000


def test_launches_by_kept_launchers_are_seen_by_hooks(kept):
    assert kept["seen by hooks"] == {"launch_enter_hook": 2, "launch_exit_hook": 2}


def test_launchers_are_kept_once_per_compilation(kept):
    assert kept["launchers"] == kept["compilations"]


def test_a_launcher_kept_by_less_than_it_depends_on_launches_something_else(kept):
    found = kept["differences by wrong keys"]
    assert len(found) == 5
    assert all(found.values()), found


@pytest.mark.soak
def test_a_driver_accepts_every_launch_of_compiled_kernels():
    results = results_of_a_fresh_process("--compile")
    assert not results["wrong"], "\n".join(results["wrong"])


def test_launches_that_a_driver_refuses_raise():
    errors = results_of_a_fresh_process("--planted")
    expected = {
        "launch_too_wide_a_grid": "grid y is 65544, expected 1 to 65535",
        "launch_with_a_host_pointer": "cannot be accessed from Triton (cpu tensor?)",
        "launch_with_a_misaligned_stride": "stride of 260 bytes of dimension 1, expected a multiple of 16 below 2^40",
        "launch_with_too_much_shared_memory": "101377 bytes of shared memory, a block of sm_86 has 101376",
        "launch_too_large_a_block": "Required: 2048, Hardware limit: 1024",
    }
    assert errors.keys() == expected.keys()
    for name, text in expected.items():
        assert text in errors[name], name


@pytest.mark.parametrize(
    "fields",
    [{}, {"x": 2**31 - 1, "y": 65535, "z": 65535}, {"block_x": 1024}, {"shared": 48 * KIB}, {"cluster": 8, "x": 16}],
)
def test_stand_in_accepts_what_a_driver_accepts(cuda, function, fields):
    before = ctypes.c_long.in_dll(cuda, "stand_in_launches").value
    assert launch(cuda, function, **fields) == SUCCESS
    assert ctypes.c_long.in_dll(cuda, "stand_in_launches").value == before + 1


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"x": 0}, INVALID_VALUE, "grid x is 0"),
        ({"x": 2**31}, INVALID_VALUE, "grid x is 2147483648, expected 1 to 2147483647"),
        ({"y": 65536}, INVALID_VALUE, "grid y is 65536, expected 1 to 65535"),
        ({"z": 65536}, INVALID_VALUE, "grid z is 65536, expected 1 to 65535"),
        ({"block_x": 1056}, INVALID_VALUE, "a block has 1056 x 1 x 1 threads"),
        ({"block_x": 512, "block_y": 3}, INVALID_VALUE, "a block has 512 x 3 x 1 threads"),
        ({"block_x": 1, "block_z": 65}, INVALID_VALUE, "a block has 1 x 1 x 65 threads"),
        (
            {"shared": 48 * KIB + 1},
            INVALID_VALUE,
            "49153 bytes of dynamic shared memory, the function is allowed 49152",
        ),
        ({"shared": 227 * KIB + 1}, INVALID_VALUE, "232449 bytes of shared memory, a block of sm_90 has 232448"),
        ({"stream": 64}, INVALID_HANDLE, "stream 0x40, which does not exist"),
        ({"cluster": 9, "x": 9}, 912, "a cluster has 9 x 1 x 1 blocks, at most 8"),
        ({"cluster": 2, "x": 3}, INVALID_VALUE, "a grid of 3 x 1 x 1 blocks is no multiple of a cluster of 2 x 1 x 1"),
    ],
)
def test_stand_in_refuses_a_launch_that_a_driver_refuses(cuda, function, fields, code, text):
    assert launch(cuda, function, **fields) == code
    assert text in violation(cuda)


def test_stand_in_refuses_a_launch_without_function_or_context(cuda, function):
    assert launch(cuda, None) == INVALID_HANDLE
    cuda.cuCtxSetCurrent(None)
    assert launch(cuda, function) == INVALID_CONTEXT


def test_stand_in_has_no_clusters_before_sm_90(cuda, function):
    cuda.cuCtxSetCurrent(ctypes.c_void_p(86))
    assert launch(cuda, function, cluster=2, x=2) == NOT_SUPPORTED


@pytest.mark.parametrize(("arch", "kib"), [(75, 64), (80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)])
def test_stand_in_allows_the_shared_memory_of_the_architecture(cuda, function, arch, kib):
    cuda.cuCtxSetCurrent(ctypes.c_void_p(arch))
    assert cuda.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE, kib * KIB + 1) == INVALID_VALUE
    assert cuda.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE, kib * KIB) == SUCCESS
    assert launch(cuda, function, shared=kib * KIB) == SUCCESS
    assert launch(cuda, function, shared=kib * KIB + 1) == INVALID_VALUE


BFLOAT16, SWIZZLE_128B = 9, 3  # of cuda.h
MAP = {
    "type": BFLOAT16, "rank": 2, "address": 1 << 20, "dims": (64, 100), "strides": (128,), "box": (64, 32),
    "element_strides": (1, 1), "interleave": 0, "swizzle": SWIZZLE_128B,
}  # fmt: skip


def encode(cuda, **changes) -> int:
    """cuTensorMapEncodeTiled of a sound map (100, 64) but for the changes."""
    given = {**MAP, **changes}
    room = ctypes.create_string_buffer(256)
    arrays = [
        (kind * 6)(*given[name])
        for name, kind in (
            ("dims", ctypes.c_uint64),
            ("strides", ctypes.c_uint64),
            ("box", ctypes.c_uint32),
            ("element_strides", ctypes.c_uint32),
        )
    ]
    return cuda.cuTensorMapEncodeTiled(
        ctypes.c_void_p(-(-ctypes.addressof(room) // 128) * 128),
        given["type"],
        given["rank"],
        ctypes.c_void_p(given["address"]),
        *arrays,
        given["interleave"],
        given["swizzle"],
        0,
        0,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dims": (1 << 32, 1)},
        {"strides": ((1 << 40) - 16,)},
        {"box": (8, 256), "swizzle": 0},
        {
            "rank": 5,
            "dims": (64, 1, 1, 1, 1),
            "strides": (128,) * 4,
            "box": (64, 1, 1, 1, 1),
            "element_strides": (1,) * 5,
        },
    ],
)
def test_stand_in_accepts_a_tensor_map_that_a_driver_accepts(cuda, changes):
    assert encode(cuda, **changes) == SUCCESS


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rank": 6}, "rank 6, expected 1 to 5"),
        ({"address": 8}, "base address 0x8, expected a multiple of 16"),
        ({"dims": (64, 0)}, "size 0 of dimension 1, expected 1 to 2^32"),
        ({"dims": (64, (1 << 32) + 1)}, "size 4294967297 of dimension 1"),
        ({"strides": (136,)}, "stride of 136 bytes of dimension 1, expected a multiple of 16 below 2^40"),
        ({"strides": (1 << 40,)}, "stride of 1099511627776 bytes of dimension 1"),
        ({"box": (64, 257)}, "box of 257 in dimension 1, expected 1 to 256"),
        ({"box": (64, 0)}, "box of 0 in dimension 1"),
        ({"box": (4, 32)}, "a box's inner dimension has 8 bytes, expected a multiple of 16"),
        ({"box": (128, 32)}, "a box's inner dimension has 256 bytes, the swizzle 128"),
        ({"box": (32, 32), "swizzle": 1}, "a box's inner dimension has 64 bytes, the swizzle 32"),
        ({"element_strides": (1, 9)}, "element stride 9 of dimension 1, expected 1 to 8"),
    ],
)
def test_stand_in_refuses_a_tensor_map_that_a_driver_refuses(cuda, changes, text):
    assert encode(cuda, **changes) == INVALID_VALUE
    assert text in violation(cuda)
