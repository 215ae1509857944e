"""Makes Triton's interpreter compute bfloat16 and FMA as a GPU does, and spares it work that it repeats.

The interpreter (triton 3.6 to 3.9) keeps a bfloat16 as the uint16 of its bits, because NumPy has no such type, and then
adds, multiplies and reduces those integers; its casts from float32 truncate: a bfloat16 test would mean nothing.
`repair_bfloat16` widens every bfloat16 operand to float32 before the arithmetic and rounds the result to nearest even,
as the hardware does. test_interpreter.py holds that each of these is right with it and wrong without it.

`repair_fma` rounds once: the interpreter rounds the product too, which an FMA is there to avoid.

`spare_repeated_work` changes no result: it leaves out what the interpreter does again at every call and every value.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

ARITHMETIC = ("binary_op", "unary_op", "create_clampf", "create_fma", "create_dot", "create_erf", "create_rsqrt")
CASTS = ("cast_impl", "create_fp_to_fp")


def repair_bfloat16() -> None:
    """Patch the interpreter of this process; a second call changes nothing."""
    if hasattr(InterpreterBuilder.cast_impl, "__wrapped__"):
        return
    for name in ARITHMETIC:
        setattr(InterpreterBuilder, name, computed_in_float32(getattr(InterpreterBuilder, name)))
    for name in CASTS:
        setattr(InterpreterBuilder, name, rounding_to_nearest(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.get_bf16 = bfloat16_constant
    ReduceScanOpInterface.apply = reduced_in_float32(ReduceScanOpInterface.apply)


def is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def widen(handle: Any) -> Any:
    """The float32 handle of a bfloat16 one: its bits are the upper half. Anything else comes back as it is."""
    if not is_bfloat16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrow(handle: TensorHandle) -> TensorHandle:
    """The bfloat16 handle of a float32 one, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # without the last term ties would always round up
    rounded = np.where(np.isnan(handle.data), 0x7FC0, rounded)  # adding to a NaN's bits could turn it into infinity
    return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


def computed_in_float32(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """An arithmetic method of the builder on widened operands; its result has the type of its last operand."""

    @functools.wraps(method)
    def arithmetic(self: InterpreterBuilder, *args: Any, **kwargs: Any) -> TensorHandle:
        operands = [arg for arg in args if isinstance(arg, TensorHandle)]
        if not any(map(is_bfloat16, operands)):
            return method(self, *args, **kwargs)
        result = method(self, *map(widen, args), **kwargs)
        is_comparison = result.data.dtype == np.bool_
        return narrow(result) if is_bfloat16(operands[-1]) and not is_comparison else result

    return arithmetic


def rounding_to_nearest(cast: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """A cast of the builder that goes by way of float32 when either side is bfloat16."""

    @functools.wraps(cast)
    def rounding_cast(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype, *args: Any) -> TensorHandle:
        if source.dtype.scalar == to.scalar:
            return source
        source = widen(source)
        if to.scalar != tl.bfloat16:
            return source if source.dtype.scalar == to.scalar else cast(self, source, to, *args)
        return narrow(source if source.dtype.scalar == tl.float32 else cast(self, source, tl.float32, *args))

    return rounding_cast


def reduced_in_float32(apply: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction or scan on widened blocks; results that were to be bfloat16 are narrowed."""

    @functools.wraps(apply)
    def reduction(self: ReduceScanOpInterface, blocks: Any) -> Any:
        if not isinstance(blocks, tuple) or not any(is_bfloat16(block.handle) for block in blocks):
            return apply(self, blocks)
        results = apply(self, tuple(retyped(block, widen(block.handle)) for block in blocks))
        return tuple(
            retyped(result, narrow(result.handle)) if result.dtype == tl.float32 else result for result in results
        )

    return reduction


def retyped(block: tl.tensor, handle: TensorHandle) -> tl.tensor:
    """The block with another handle, and a type to match it."""
    dtype = handle.dtype.scalar
    return tl.tensor(handle, tl.block_type(dtype, list(block.shape)) if block.type.is_block() else dtype)


def bfloat16_constant(self: InterpreterBuilder, value: float) -> TensorHandle:
    """What the builder lacks: a Python number beside a bfloat16 tensor."""
    return narrow(TensorHandle(np.array([value], dtype=np.float32), tl.float32))


def repair_fma() -> None:
    """Patch the interpreter of this process, before `repair_bfloat16` if that is called too."""
    InterpreterBuilder.create_fma = fma_rounded_once


def fma_rounded_once(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """In float64 the product of two float32 is exact, and the rounding of the sum too small to count."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def spare_repeated_work() -> None:
    """Patch the interpreter of this process; to be called once."""
    interpreter._patch_lang = unless_patched(interpreter._patch_lang)
    interpreter._get_np_dtype = once_per_scalar_type(interpreter._get_np_dtype)
    # Without its debug option it forms every sum and product of integers once more in int64, and then asserts nothing.
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, operation: None
    tl.tensor.__init__ = tensor_of_known_shape
    tl.block_type.__init__ = block_type_of_known_shape
    tl.block_type.name = property(name_of_block_type)
    if not hasattr(tl.core.tuple_type, "name"):  # triton 3.6 writes out the name, which nobody reads, of every shape
        tl.core.tuple_type.__init__ = tuple_type_without_name
        tl.core.tuple_type.name = property(name_of_tuple_type)


def unless_patched(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton's functions are replaced when a kernel starts; a function it calls then finds its own replaced as well."""

    @functools.wraps(patch)
    def patch_once(function: Any) -> Any:
        languages = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        to_do = not languages or any(tl.core.is_builtin(language.load) for language in languages)
        return patch(function) if to_do else interpreter._LangPatchScope()

    return patch_once


def once_per_scalar_type(numpy_dtype_of: Callable[[tl.dtype], np.dtype]) -> Callable[[tl.dtype], np.dtype]:
    """Triton writes its table of types anew at every look into it."""
    known: dict[str, np.dtype] = {}

    @functools.wraps(numpy_dtype_of)
    def look_up(dtype: tl.dtype) -> np.dtype:
        name = dtype.scalar.name
        if name not in known:
            known[name] = numpy_dtype_of(dtype)
        return known[name]

    return look_up


class Shape(NamedTuple):
    """What is the same for every tensor and every type of a shape."""

    sizes: tl.tuple
    constants: tl.tuple
    numel: tl.constexpr

    @classmethod
    @functools.cache
    def of(cls, sizes: tuple[int, ...]) -> "Shape":
        numel = tl.core.validate_block_shape(sizes)
        return cls(tl.tuple(sizes), tl.tuple([tl.constexpr(n) for n in sizes]), tl.constexpr(numel))


def tensor_of_known_shape(self: tl.tensor, handle: TensorHandle, type: tl.dtype) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    _, self.shape, self.numel = Shape.of(tuple(type.shape.values) if type.is_block() else ())


def block_type_of_known_shape(self: tl.block_type, element_ty: tl.dtype, shape: Sequence[Any]) -> None:
    """Triton checks the shape, and writes out the name, which nobody reads, of every block."""
    known = Shape.of(tuple(n.value if isinstance(n, tl.constexpr) else n for n in shape))
    self.element_ty, self.shape, self.numel = element_ty, known.sizes, known.numel.value


def name_of_block_type(self: tl.block_type) -> str:
    return f"<{self.shape}, {self.element_ty}>"


def tuple_type_without_name(self: tl.core.tuple_type, types: list, fields: list[str] | None = None) -> None:
    self.types = types
    self.fields = fields or [""] * len(types)


def name_of_tuple_type(self: tl.core.tuple_type) -> str:
    return "[" + ",".join(f"{field}:{kind}" for field, kind in zip(self.fields, self.types, strict=True)) + "]"
