"""Which implementation runs a call, and why: one decision, one table of thresholds.

Every public function asks `route` once; a raw op, reached only where a kernel supports the call, asks `use_cpp` whether
that is C++ or Triton's. `explain` tells a user the answer; `fastlm doctor`, README.md and docs/ print
`table`. Kernels take plain float32, float16 and bfloat16 tensors on a GPU or a CPU. PyTorch's own code runs all else,
small CPU tensors, for which the overhead of a call dominates, programs of torch.export, and second derivatives.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlm.ops import _library, _torch
from fastlm.ops._device import OLDEST, OLDEST_WITH_DOT, is_older
from fastlm.ops._triton import CAN_INTERPRET, HAS_TRITON, interprets
from fastlm.ops.attention_reference import UNLIMITED, Inputs, Options, has_plain_scores, is_misaligned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the tensors that kernels take; they compute in float32

TRITON, CPP, CUDA, CHUNKED, FLASH_ATTN, TORCH = "triton", "cpp", "cuda", "chunked", "flash_attn", "torch"

# Elements of the first tensor below which PyTorch's CPU code is faster than C++: per-call overhead dominates, and ours
# is higher. benchmarks/NOTES.md says how these were found.
CPU_MIN_NUMEL = {
    "layer_norm": 1 << 20,
    "add_layer_norm": 1 << 18,
    "rms_norm": 1 << 15,
    "add_rms_norm": 1 << 15,
    "softmax": math.inf,  # always: PyTorch's own is as fast
    "log_softmax": 1 << 20,
    "softmax with options": 0,  # scaled, masked or causal, of either kind
    "gelu none": 1 << 23,
    "gelu tanh": 1 << 15,
    "bias_gelu": 1 << 16,
    "swiglu": 1 << 17,
    "geglu": 1 << 16,
    "rotary": 1 << 14,
}
LOG_SOFTMAX_MIN_COLUMNS = 256  # along shorter rows PyTorch's is faster however many the rows are
# Of float32, up to which PyTorch's cross entropy is faster, also of a linear layer; in 16 bits its sums may overflow.
CROSS_ENTROPY_FEW_LOGITS = 1 << 16
# Attention of plain scores (at most causal) in C++ against ATen's fused kernel, which has no other scores:
ATTENTION_MAX_SEQLEN = 512  # tokens of a sequence up to which C++ is faster
ATTENTION_MAX_SEQLEN_AVX512 = 4096  # the same where it runs in AVX-512, for causal scores
ATTENTION_MIN_SEQLEN = 96  # tokens of the rows of a dense batch from which on it is
ATTENTION_MIN_SEQLEN_IN_TRAINING = 64  # the same with gradients
ATTENTION_MIN_MACS = 1 << 22  # multiply-adds of q and k in a dense batch from which on it is, as with dropout
ATTENTION_MIN_MACS_OF_16_BITS = 1 << 20  # with gradients in 16 bits, of any length: ATen's backward pass is slow
ENCODER_LAYER_MIN_SEQLEN = 192  # tokens from which on our layer is faster in evaluation than PyTorch's in one call


# Attention in Triton
ATTENTION_MAX_D = 256
ATTENTION_MIN_SCALE = 2.0**-40  # scores are divided by it where ALiBi joins them
OLDEST_OF_FLASH_ATTN = 80  # sm_80: of that package, and of PyTorch's copy of its kernels
HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


# The same in words.
LONGEST_IN_CPP = f"{ATTENTION_MAX_SEQLEN} tokens (causal {ATTENTION_MAX_SEQLEN_AVX512:,} with AVX-512)"
SHORTEST_IN_CPP = (
    f"{ATTENTION_MIN_SEQLEN} tokens ({ATTENTION_MIN_SEQLEN_IN_TRAINING} in training) or {ATTENTION_MIN_MACS:,} "
    f"multiply-adds (any length and {ATTENTION_MIN_MACS_OF_16_BITS:,} in training in 16 bits)"
)


class Route(NamedTuple):
    """An implementation and the reason for it.

    implementation  "triton", "cuda" or "cpp", kernels of ours; "chunked", PyTorch's products on chunks of rows with our
                    cross entropy between them; "torch", PyTorch's own code; "flash_attn", that package
    """

    implementation: str
    reason: str


ON_GPU = Route(TRITON, "a CUDA tensor")
INTERPRETED = Route(TRITON, "TRITON_INTERPRET=1")
ON_CPU = Route(CPP, "a CPU tensor")
ON_GPU_BY_CUDA = Route(CUDA, "a CUDA tensor")
BY_CHUNKS = Route(CHUNKED, "class indices and one floating dtype")
NO_TRITON = Route(TORCH, "triton is not installed")
NO_LIBRARY = Route(TORCH, "the compiled library of this device is not loaded; `fastlm doctor` says why")
EXPORTED = Route(TORCH, "torch.export traces: its programs hold PyTorch's own ops")
OTHER_DEVICE = Route(TORCH, "the kernels run on a GPU or a CPU")
OLD_GPU = Route(TORCH, f"a GPU older than sm_{OLDEST}, the oldest that the kernels are compiled for")
OLD_TENSOR_CORES = Route(TORCH, f"a GPU older than sm_{OLDEST_WITH_DOT}, whose tensor cores Triton does not use")
OTHER_DTYPE = Route(TORCH, "the kernels take float32, float16 and bfloat16")
NOT_PLAIN = Route(TORCH, "a tensor subclass, a nested tensor, torch.jit.trace or a transform such as torch.func's")
OTHER_DIM = Route(TORCH, "the kernels work along the last dimension")
SHORT_ROWS = Route(TORCH, f"rows of fewer than {LOG_SOFTMAX_MIN_COLUMNS} elements: PyTorch's is as fast")
NO_ROWS = Route(TORCH, "normalized_shape is no sequence of sizes above 0")
FEW_LOGITS = Route(
    TORCH, f"up to {CROSS_ENTROPY_FEW_LOGITS:,} float32 logits on a CPU: the overhead of a call dominates"
)
BY_FLASH_ATTN = Route(FLASH_ATTN, "the chosen backend")
VARLEN = Route(CPP, f"a CPU tensor; plain sequences beyond {LONGEST_IN_CPP} run ATen's fused kernel")
WITH_SCORE_MOD = Route(CPP, "a CPU tensor, with a score mod, a window, sinks, dropout or lse")
PLAIN_SCORES = Route(
    TORCH,
    f"plain scores on a CPU: ATen's fused kernel is as fast below {SHORTEST_IN_CPP}, and beyond {LONGEST_IN_CPP}",
)
FEW_DROPPED = Route(
    TORCH, f"dropout of fewer than {ATTENTION_MIN_MACS:,} multiply-adds on a CPU: the overhead of a call dominates"
)
FEW_PADDED = Route(
    TORCH,
    f"padding on a CPU: a mask is as fast below {SHORTEST_IN_CPP}, and without dropout beyond {LONGEST_IN_CPP}",
)
SHORT_IN_EVALUATION = Route(
    TORCH, f"evaluation of fewer than {ENCODER_LAYER_MIN_SEQLEN} tokens on a CPU: PyTorch's layer is one call"
)
FLOAT32_SCORES = Route(
    TORCH, "plain float32 scores without gradients on a GPU: PyTorch's products run on tensor cores, in three of tf32"
)
ONE_QUERY = Route(TORCH, "one query without gradients on a GPU: PyTorch's kernels divide its keys among programs")
WITH_MASK = Route(TORCH, "an attn_mask")
OTHER_FORM = Route(TORCH, "not (B, H, T, D) tensors of one dtype, or causal with other numbers of keys than queries")
NO_ELEMENTS = Route(TORCH, "no elements")
NOT_INDICES = Route(TORCH, "the kernels take logits (N, V) and class indices (N,)")
WEIGHT_APART = Route(TORCH, "the class weights need a gradient or are on another device")
SMALL = {
    op: Route(TORCH, f"fewer than {numel:,} elements on a CPU: the overhead of a call dominates")
    if numel < math.inf
    else Route(TORCH, "no kernel is faster on a CPU")
    for op, numel in CPU_MIN_NUMEL.items()
}


def is_exporting() -> bool:
    """Whether torch.export is tracing: the program it makes then holds PyTorch's own ops instead of ours.

    It knows no autograd.Function, so gradients of ours would be lost without an error, and the size from which our code
    is faster would become a constraint on the sizes that the program takes.
    """
    return torch.compiler._is_exporting_flag  # is_exporting() itself is always true in what torch.compile 2.11 traces


def use_triton(tensor: Tensor) -> bool:
    """Whether kernels for this tensor are Triton's: of a CUDA tensor, or of a CPU tensor under TRITON_INTERPRET=1.

    The knob is read at every call, so a program that had it on at first can turn it off and on again.
    """
    if is_exporting():
        return False
    if tensor.is_cuda:
        return HAS_TRITON
    return CAN_INTERPRET and tensor.is_cpu and interprets()


def use_cpp(tensor: Tensor) -> bool:
    """Whether a raw op given this tensor runs C++: of a CPU tensor, unless Triton's interpreter takes its place."""
    return tensor.is_cpu and not (CAN_INTERPRET and interprets())


def is_plain_tensor(*tensors: Tensor | None) -> bool:
    """Only strided tensors, and no transform active: an autograd.Function over kernels supports no others.

    False for subclasses, nested or MKL-DNN tensors, functorch transforms, forward-mode AD, is_grads_batched and
    torch.jit.trace.
    """
    if torch.compiler.is_compiling():
        return not (is_exporting() or is_transformed())
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_nested
        ):
            return False
    return not is_transformed()


@_torch.assume_constant_result
def is_transformed() -> bool:
    """Whether torch.func, forward mode or torch.jit.trace is active.

    torch.compile enters the first two as it traces, and guards them itself. A trace would hold an autograd.Function as
    a call of Python, which no other process can load.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor is. A meta tensor's device has no autocast, and PyTorch raises there.

    torch.amp.is_autocast_available would say so, but torch.compile of PyTorch 2.11 cannot trace it.
    """
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast casts the operands of a product to; None where it is off, and of float64, which it leaves alone."""
    if not is_autocast(tensor) or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(tensor.device.type)


def is_one_of(size: int, *sizes: int) -> bool:
    """Whether a size equals one of these; `in` does not say so of a symbolic size, as torch.compile has them."""
    return any(size == other for other in sizes)


# The decision


def route(op: str, tensors: Sequence[Tensor | None], call: tuple[Any, ...] = ()) -> Route:
    """Which implementation runs a call of an op, and why.

    op       a name in CPU_MIN_NUMEL, or "cross_entropy", "linear_cross_entropy", "linear_logprobs", "attention",
             "scaled_dot_product_attention", "padded attention" or "encoder layer"
    tensors  floating-point tensors that a kernel would read; the first one's device decides
    call     what else the op's function below depends on; as arguments by name it would weigh on small calls
    """
    found = DECISIONS[op](op, tensors, call)
    if explained:
        for routes in explained:
            routes.append((op, found))
    return found


def default_route(op: str, tensors: Sequence[Tensor | None], call: tuple[()] = ()) -> Route:
    """The route of an op whose kernels support every form of a call, in any mixture of dtypes."""
    first = tensors[0]
    if not isinstance(first, Tensor):
        raise TypeError(f"{op.split()[0]}: its input is a {type(first).__name__}, expected a tensor")
    if torch.compiler._is_exporting_flag:  # is_exporting(), whose call would weigh on small ones
        return EXPORTED
    if first.is_cuda:
        if is_older(first, OLDEST):
            return OLD_GPU
        found = ON_GPU if HAS_TRITON else NO_TRITON
    elif not first.is_cpu:
        return OTHER_DEVICE
    elif CAN_INTERPRET and interprets():
        found = INTERPRETED
    elif first.numel() < CPU_MIN_NUMEL.get(op, 0):
        return SMALL[op]
    else:
        found = ON_CPU if _library.is_loaded("cpu") else NO_LIBRARY
    if not all(tensor is None or tensor.dtype in DTYPES for tensor in tensors):
        return OTHER_DTYPE
    return found if is_plain_tensor(*tensors) else NOT_PLAIN


def norm_route(op: str, tensors: Sequence[Tensor | None], call: tuple[Sequence[int], torch.dtype | None]) -> Route:
    found, (normalized_shape, dtype) = default_route(op, tensors), call
    if found.implementation == TORCH:
        return found
    if isinstance(normalized_shape, int) or not math.prod(normalized_shape) > 0:
        return NO_ROWS
    return found if dtype is None or dtype in DTYPES else OTHER_DTYPE


def softmax_route(
    op: str, tensors: Sequence[Tensor | None], call: tuple[Tensor | None, int, torch.dtype | None]
) -> Route:
    found, (input,), (mask, dim, dtype) = default_route(op, tensors), tensors, call
    if found.implementation == TORCH or input is None:
        return found
    if input.dim() == 0 or dim not in (-1, input.dim() - 1):
        return OTHER_DIM
    if found.implementation == CPP and op != "softmax with options" and input.shape[-1] < LOG_SOFTMAX_MIN_COLUMNS:
        return SHORT_ROWS
    if not (dtype is None or dtype in DTYPES) or not (mask is None or mask.dtype in (torch.bool, *DTYPES)):
        return OTHER_DTYPE
    return found if mask is None or is_plain_tensor(mask) else NOT_PLAIN


def cross_entropy_route(
    op: str, tensors: Sequence[Tensor | None], call: tuple[Tensor, Tensor | None, bool, bool]
) -> Route:
    (input,), (target, weight, inplace, is_torchs_form) = tensors, call
    assert input is not None, "a loss has logits"
    if is_exporting():
        return EXPORTED
    few = input.is_cpu and input.numel() <= CROSS_ENTROPY_FEW_LOGITS and input.dtype == torch.float32
    if few and target.dtype == torch.int64 and is_torchs_form and not inplace:
        return FEW_LOGITS
    if input.dim() != 2 or target.dim() != 1 or target.dtype not in (torch.int64, torch.int32):
        return NOT_INDICES
    if target.device != input.device:
        return OTHER_DEVICE
    if weight is not None and (weight.device != input.device or weight.requires_grad):
        return WEIGHT_APART
    if input.dtype not in DTYPES:
        return OTHER_DTYPE
    if not _library.is_loaded(input.device.type):
        return NO_LIBRARY if input.is_cpu or input.is_cuda else OTHER_DEVICE
    if is_older(input, OLDEST):
        return OLD_GPU
    if not is_plain_tensor(input):
        return NOT_PLAIN
    return ON_GPU_BY_CUDA if input.is_cuda else ON_CPU


def linear_cross_entropy_route(
    op: str, tensors: Sequence[Tensor | None], call: tuple[Tensor, Tensor | None, int | None]
) -> Route:
    """The last of call is the number of classes if PyTorch's functions compute the call too, else None."""
    (input, linear_weight), (target, weight, num_classes) = tensors, call
    assert input is not None, "a linear layer has an input"
    assert linear_weight is not None, "a linear layer has a weight"
    if target.shape != input.shape[:-1] or target.is_floating_point() or linear_weight.dim() != 2:
        return NOT_INDICES
    if not is_plain_tensor(input, linear_weight):
        return NOT_PLAIN
    if input.dtype == torch.float64:
        return OTHER_DTYPE
    if is_older(input, OLDEST):
        return OLD_GPU
    if weight is not None and weight.requires_grad:  # which PyTorch refuses, in its own words
        return WEIGHT_APART
    if num_classes is None or not input.is_cpu or input.dtype != torch.float32 or is_autocast(input):
        return BY_CHUNKS
    return FEW_LOGITS if target.numel() * num_classes <= CROSS_ENTROPY_FEW_LOGITS else BY_CHUNKS


def attention_route(op: str, inputs: Inputs, call: tuple[Options, str, bool, bool]) -> Route:
    """The route of attention. Raises ValueError if the chosen backend refuses."""
    options, backend, has_seed, return_lse = call
    by_triton = triton_refusal(inputs, options)
    if backend in ("auto", "triton") and by_triton is None:
        by_torch = faster_in_torch_on_gpu(inputs, options, return_lse) if backend == "auto" else None
        return by_torch or (ON_GPU if inputs.q.is_cuda else INTERPRETED)
    if backend in ("triton", "flash_attn"):
        by_flash_attn = flash_attn_refusal(inputs, options, has_seed, return_lse)
        if backend == "flash_attn" and by_flash_attn is None:
            return BY_FLASH_ATTN
        refusals = {"triton": by_triton, "torch": None, "flash_attn": by_flash_attn}
        known = "; ".join(f"{name}: {reason or 'supports this call'}" for name, reason in refusals.items())
        raise ValueError(f"attention: backend {backend!r} does not support this call. {known}")
    if inputs.q.is_cpu:
        return cpu_attention_route(inputs, options, return_lse)
    return Route(TORCH, by_triton or "the chosen backend")


def triton_refusal(inputs: Inputs, options: Options) -> str | None:
    """Why the Triton kernels do not support a call of attention, or None."""
    q = inputs.q
    if not HAS_TRITON:
        return NO_TRITON.reason
    if not use_triton(q):
        return f"q is on {q.device}, where the kernels run only under TRITON_INTERPRET=1"
    if is_older(q, OLDEST_WITH_DOT):
        return OLD_TENSOR_CORES.reason
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}, the kernels take float32, float16 and bfloat16"
    if not 1 <= q.shape[-1] <= ATTENTION_MAX_D:
        return f"D is {q.shape[-1]}, the kernels take 1 to {ATTENTION_MAX_D}"
    if options.scale < ATTENTION_MIN_SCALE and not options.softcap:
        return f"scale is {options.scale}, the kernels take positive ones"
    return None if is_plain_tensor(*inputs) else NOT_PLAIN.reason


def faster_in_torch_on_gpu(inputs: Inputs, options: Options, return_lse: bool) -> Route | None:
    """The route of a call that PyTorch's kernels are known to compute faster on a GPU, whatever the GPU; else None.

    Only without gradients, which PyTorch's kernels add up in another order on every run. Times taken on a GPU may name
    more such calls.
    """
    q, k, v = inputs[:3]
    is_plain = inputs.cu_seqlens_q is None and has_plain_scores(inputs, options) and not return_lse
    if not q.is_cuda or not is_plain or (options.causal and is_misaligned(q, k)) or not (q.numel() and k.numel()):
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    is_aligned = q.shape[3] % (16 // q.element_size()) == 0 and q.stride(3) == k.stride(3) == v.stride(3) == 1
    if not is_aligned:  # PyTorch would copy k and v
        return None
    if q.dtype == torch.float32:  # of grouped heads PyTorch forms every score
        return FLOAT32_SCORES if q.shape[2] == k.shape[2] else None
    return ONE_QUERY if q.shape[1] == 1 else None


def flash_attn_refusal(inputs: Inputs, options: Options, has_seed: bool, return_lse: bool) -> str | None:
    """Why the flash_attn package does not support a call, or None."""
    q = inputs.q
    if not HAS_FLASH_ATTN:
        return "the flash_attn package is not installed"
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype} on {q.device}, flash_attn takes float16 and bfloat16 on a GPU"
    if is_older(q, OLDEST_OF_FLASH_ATTN):
        return f"flash_attn takes GPUs from sm_{OLDEST_OF_FLASH_ATTN} on"
    if q.shape[-1] > 256:
        return f"D is {q.shape[-1]}, flash_attn takes up to 256"
    if inputs.sinks is not None:
        return "flash_attn does not support sinks"
    if inputs.alibi_slopes is not None and inputs.alibi_slopes.requires_grad:
        return "flash_attn has no gradient of the slopes"
    if options.scale <= 0:
        return f"scale is {options.scale}, flash_attn takes positive ones"
    if options.dropout_p and (options.softcap or has_seed):
        return "flash_attn draws its own dropout, and takes none with a softcap"
    if options.dropout_p == 1:
        return "flash_attn takes a dropout_p below 1"
    return "the lse of flash_attn has no gradient" if return_lse else None


def cpu_attention_route(inputs: Inputs, options: Options, return_lse: bool) -> Route:
    """C++ or PyTorch. A dense batch runs in C++ as a varlen one, whose sequences are its rows."""
    q, k = inputs.q, inputs.k
    if q.dtype not in DTYPES:
        return OTHER_DTYPE
    if not _library.is_loaded("cpu"):
        return NO_LIBRARY
    if inputs.cu_seqlens_q is not None:  # PyTorch has no varlen op on a CPU that torch.export could take instead
        return NOT_PLAIN if is_transformed() else VARLEN
    if is_exporting():
        return EXPORTED
    if not (q.numel() and k.numel()):
        return NO_ELEMENTS
    if not is_plain_tensor(*inputs):
        return NOT_PLAIN
    if return_lse or not has_plain_scores(inputs, options):
        return WITH_SCORE_MOD
    # ATen aligns causality at the start; where that is not the alignment at the end, its kernel would need a mask.
    if (options.causal and is_misaligned(q, k)) or is_faster_in_cpp(q.dtype, options.causal, *q.shape, *k.shape[1:3]):
        return ON_CPU
    return PLAIN_SCORES


def sdpa_route(
    op: str, tensors: Sequence[Tensor | None], call: tuple[Tensor | None, float, bool, float | None, bool]
) -> Route:
    """The route of query, key and value (..., H, T, D): ours where attention computes what PyTorch's function does."""
    (query, key, value), (attn_mask, dropout_p, is_causal, scale, enable_gqa) = tensors, call
    if attn_mask is not None:
        return WITH_MASK
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return NOT_PLAIN
    if is_older(query, OLDEST_WITH_DOT):
        return OLD_TENSOR_CORES
    by_triton = use_triton(query)
    if not (by_triton or (query.is_cpu and _library.is_loaded("cpu") and query.dtype in DTYPES and not is_exporting())):
        return default_route(op, tensors)
    if not is_attention(query, key, value, dropout_p, is_causal, scale, enable_gqa):
        return OTHER_FORM
    if by_triton:
        inputs = Inputs(*(x.transpose(1, 2) for x in (query, key, value)))
        options = Options(is_causal, 1.0 if scale is None else scale, UNLIMITED, UNLIMITED, 0.0, dropout_p)
        return faster_in_torch_on_gpu(inputs, options, False) or (ON_GPU if query.is_cuda else INTERPRETED)
    # On a CPU PyTorch's kernel computes what causality hides, and has no dropout.
    (B, H, Tq, D), (_, Hk, Tk, _) = query.shape, key.shape
    if dropout_p > 0:
        return ON_CPU if B * H * Tq * Tk * D >= ATTENTION_MIN_MACS else FEW_DROPPED
    return ON_CPU if is_causal and is_faster_in_cpp(query.dtype, True, B, Tq, H, D, Tk, Hk) else PLAIN_SCORES


def padded_route(op: str, tensors: Sequence[Tensor | None], call: tuple[tuple[int, ...], float]) -> Route:
    """The route of MultiheadAttention whose key_padding_mask may be boundaries of sequences, call (B, Tq, H, D, Tk)."""
    found, ((B, Tq, H, D, Tk), dropout_p) = default_route(op, tensors), call
    if found.implementation == TORCH or tensors[0] is None:
        return found
    if is_older(tensors[0], OLDEST_WITH_DOT):
        return OLD_TENSOR_CORES
    has_dropout = dropout_p > 0 and B * H * Tq * Tk * D >= ATTENTION_MIN_MACS
    if found.implementation == TRITON or has_dropout or is_faster_in_cpp(tensors[0].dtype, False, B, Tq, H, D, Tk, H):
        return found
    return FEW_PADDED


def encoder_layer_route(op: str, tensors: Sequence[Tensor | None], call: tuple[int]) -> Route:
    """The route of T tokens in evaluation without gradients, for which PyTorch has the whole layer as one call."""
    found, (T,) = default_route(op, tensors), call
    return SHORT_IN_EVALUATION if found.implementation == CPP and T < ENCODER_LAYER_MIN_SEQLEN else found


def is_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> bool:
    """Whether attention of these, heads and tokens exchanged, is what PyTorch's function computes."""
    for x in (query, key, value):
        if not is_plain_tensor(x) or x.dim() != 4 or x.dtype not in DTYPES or not x.numel():
            return False
    (B, H, Tq, D), (B_of_key, Hk, Tk, D_of_key) = query.shape, key.shape
    return (
        isinstance(is_causal, bool)
        and isinstance(dropout_p, int | float)
        and isinstance(scale, int | float | None)
        and key.shape == value.shape
        and (B_of_key, D_of_key) == (B, D)
        and (Hk == H or (enable_gqa and H % Hk == 0))
        and (Tq == Tk or not is_causal)
        and query.device == key.device == value.device
        and (query.dtype == key.dtype == value.dtype or is_autocast(query))
        and 0 <= dropout_p < 1
        and (scale is None or -math.inf < scale < math.inf)
    )


def is_faster_in_cpp(dtype: torch.dtype, causal: bool, B: int, Tq: int, H: int, D: int, Tk: int, Hk: int) -> bool:
    """Whether C++ is faster for plain scores of dense (B, T, H, D) than ATen's fused kernel."""
    if is_exporting():  # a choice by sizes would hold for those of the example alone
        return False
    is_parallel = B * Hk >= num_threads()  # a thread takes all queries of a key head
    shortest, fewest = ATTENTION_MIN_SEQLEN, ATTENTION_MIN_MACS
    if torch.is_grad_enabled():
        shortest = ATTENTION_MIN_SEQLEN_IN_TRAINING
        if dtype != torch.float32:
            shortest, fewest = 0, ATTENTION_MIN_MACS_OF_16_BITS
    return is_parallel and shortest <= max(Tq, Tk) <= longest_in_cpp(causal, B * Hk) and B * H * Tq * Tk * D >= fewest


def longest_in_cpp(causal: bool, num_units: int) -> int:
    """Tokens up to which C++ is faster for plain scores of sequences with so many key heads in all than ATen's kernel.

    A thread takes all queries of a key head, so that long sequences must keep every thread busy.
    """
    is_faster_if_long = causal and num_units >= num_threads() and has_avx512()
    return ATTENTION_MAX_SEQLEN_AVX512 if is_faster_if_long else ATTENTION_MAX_SEQLEN


@_torch.assume_constant_result
def num_threads() -> int:
    """PyTorch's, whose function torch.compile does not follow."""
    return torch.get_num_threads()


@_torch.assume_constant_result
def has_avx512() -> bool:
    """Whether the C++ kernels run in AVX-512."""
    return "AVX-512" in _library.instruction_set()


DECISIONS: dict[str, Callable[..., Route]] = dict.fromkeys(CPU_MIN_NUMEL, default_route) | {
    "layer_norm": norm_route,
    "add_layer_norm": norm_route,
    "rms_norm": norm_route,
    "add_rms_norm": norm_route,
    "softmax": softmax_route,
    "log_softmax": softmax_route,
    "softmax with options": softmax_route,
    "cross_entropy": cross_entropy_route,
    "linear_cross_entropy": linear_cross_entropy_route,
    "linear_logprobs": linear_cross_entropy_route,
    "attention": attention_route,
    "scaled_dot_product_attention": sdpa_route,
    "padded attention": padded_route,
    "encoder layer": encoder_layer_route,
}
explained: list[list[tuple[str, Route]]] = []  # what explain listens to; empty but for its duration


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which implementation a call takes and why, a line for each op on its way: runs the call once.

        print(explain(fastlm.ops.layer_norm, torch.randn(8, 64), (64,)))
        layer_norm: torch (fewer than 1,048,576 elements on a CPU: the overhead of a call dominates)

    function  of fastlm.ops, a module of fastlm.nn, or any function that calls them, such as a model
    """
    if not callable(function):
        raise TypeError(f"explain: function is of type {type(function).__name__}, expected a function, not its name")
    routes: list[tuple[str, Route]] = []
    explained.append(routes)
    try:
        function(*args, **kwargs)
    finally:
        explained[:] = [others for others in explained if others is not routes]
    return "\n".join(f"{op}: {found.implementation} ({found.reason})" for op, found in routes)


# The same for people


class Row(NamedTuple):
    """Which implementation the calls of some functions use that kernels support."""

    functions: str
    on_cpu: str
    on_gpu: str
    oldest_gpu: int = OLDEST  # the architecture of the oldest that runs this; older ones run PyTorch's code


def table() -> list[Row]:
    """A row for every public function, from the thresholds above."""

    def cpp_from(op: str) -> str:
        return f"C++ from {CPU_MIN_NUMEL[op]:,} elements"

    with_options = "C++ where scaled, masked or causal"
    attention = (
        f"C++; for plain scores of sequences beyond {LONGEST_IN_CPP} and of dense rows below {SHORTEST_IN_CPP} ATen's "
        "fused kernel"
    )
    few = "for plain float32 scores and single queries without gradients"
    return [
        Row("cross_entropy", f"C++, unless of up to {CROSS_ENTROPY_FEW_LOGITS:,} float32 logits", "CUDA"),
        Row(
            "linear_cross_entropy",
            f"chunks of rows, between them cross_entropy in C++, unless of up to {CROSS_ENTROPY_FEW_LOGITS:,} float32 "
            "logits",
            "the same with CUDA",
        ),
        Row("linear_logprobs", "the same; entropy by PyTorch, a few rows at a time", "the same with CUDA"),
        Row("layer_norm", cpp_from("layer_norm"), "Triton"),
        Row("rms_norm", cpp_from("rms_norm"), "Triton"),
        Row("add_layer_norm", cpp_from("add_layer_norm"), "Triton"),
        Row("add_rms_norm", cpp_from("add_rms_norm"), "Triton"),
        Row("softmax", f"{with_options}, else PyTorch", "Triton along the last dimension"),
        Row(
            "log_softmax",
            f"{with_options}, or from {CPU_MIN_NUMEL['log_softmax']:,} elements in rows of {LOG_SOFTMAX_MIN_COLUMNS} "
            "or more",
            "Triton along the last dimension",
        ),
        Row("attention, flash_attn_func and its kin", attention, f"Triton; PyTorch {few}", OLDEST_WITH_DOT),
        Row(
            "scaled_dot_product_attention",
            f"C++ from {ATTENTION_MIN_MACS:,} multiply-adds on with dropout, or causal where attention is C++; "
            "else PyTorch",
            f"Triton; PyTorch with attn_mask, and {few}",
            OLDEST_WITH_DOT,
        ),
        Row("apply_rotary", cpp_from("rotary"), "Triton"),
        Row("gelu", f"{cpp_from('gelu none')}; of the tanh form {CPU_MIN_NUMEL['gelu tanh']:,}", "Triton"),
        Row("bias_gelu", cpp_from("bias_gelu"), "Triton"),
        Row("swiglu", cpp_from("swiglu"), "Triton"),
        Row("geglu", cpp_from("geglu"), "Triton"),
    ]
