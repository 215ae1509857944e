// Cross entropy on a GPU: one block of threads takes one row, reads it once in 16-byte pieces, keeps it in shared memory,
// and writes the gradient once. A row too long for shared memory is read again, mostly from the L2 cache.
#include "cross_entropy.h"
#include "cross_entropy_math.h"

#include <cassert>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fastlm {
namespace {

constexpr int kThreads = 512;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPieceBytes = 16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16(x); }

template <class T>
struct alignas(kPieceBytes) Piece {
  static constexpr int kSize = kPieceBytes / sizeof(T);
  T values[kSize];
};

// A row of n elements at any address, cut into head, whole pieces and tail: head and tail are shorter than a piece.
template <class T>
struct Cut {
  int64_t head;
  int64_t pieces;
  __device__ Cut(const T* row, int64_t n) {
    const int64_t misaligned = reinterpret_cast<uintptr_t>(row) % kPieceBytes / sizeof(T);
    head = misaligned == 0 ? 0 : Piece<T>::kSize - misaligned;
    if (head > n) head = n;
    pieces = (n - head) / Piece<T>::kSize;
  }
  __device__ int64_t tail() const { return head + pieces * Piece<T>::kSize; }
};

// Calls piece(i) for each whole piece that starts at element i, and single(i) for the elements round them; every thread
// gets the same ones each time, so none needs to wait for what another has stored.
template <class T, class OnPiece, class OnSingle>
__device__ __forceinline__ void for_own_elements(const Cut<T>& cut, int64_t n, OnPiece piece, OnSingle single) {
  for (int64_t p = threadIdx.x; p < cut.pieces; p += kThreads) piece(cut.head + p * Piece<T>::kSize);
  if (threadIdx.x < cut.head) single(static_cast<int64_t>(threadIdx.x));
  if (cut.tail() + threadIdx.x < n) single(cut.tail() + threadIdx.x);
}

__device__ Statistics merge_over_block(Statistics own) {
  __shared__ Statistics of_warp[kWarps];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    own = merge(own, {__shfl_xor_sync(~0u, own.max, distance), __shfl_xor_sync(~0u, own.sum, distance)});
  }
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = own;
  __syncthreads();
  Statistics row = of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) row = merge(row, of_warp[warp]);  // same order in all threads: same bits
  return row;
}

template <class T>
__device__ Statistics piece_statistics(const Piece<T>& piece) {
  float max = -INFINITY;
#pragma unroll
  for (int k = 0; k < Piece<T>::kSize; ++k) max = fmaxf(max, to_float(piece.values[k]));
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < Piece<T>::kSize; ++k) sum += exponential(to_float(piece.values[k]) - shift(max));
  return {max, sum};
}

// The statistics of the row; where staged is not null the row is also copied there, at the same offset from alignment.
template <class T>
__device__ Statistics read_row(const T* x, const Cut<T>& cut, int64_t n, T* staged) {
  Statistics own = {-INFINITY, 0.0f};
  for_own_elements<T>(
      cut, n,
      [&](int64_t i) {
        const Piece<T> piece = *reinterpret_cast<const Piece<T>*>(x + i);
        if (staged != nullptr) *reinterpret_cast<Piece<T>*>(staged + i) = piece;
        own = merge(own, piece_statistics(piece));
      },
      [&](int64_t i) {
        if (staged != nullptr) staged[i] = x[i];
        const float logit = to_float(x[i]);
        own = merge(own, {logit, exponential(logit - shift(logit))});
      });
  return merge_over_block(own);
}

template <class T>
__device__ void write_row(const T* source, T* y, const Cut<T>& cut, int64_t n, float max, float factor, bool whole_pieces) {
  for_own_elements<T>(
      cut, n,
      [&](int64_t i) {
        Piece<T> piece = *reinterpret_cast<const Piece<T>*>(source + i);
#pragma unroll
        for (int k = 0; k < Piece<T>::kSize; ++k) {
          piece.values[k] = from_float<T>(gradient(to_float(piece.values[k]), max, factor));
          if (!whole_pieces) y[i + k] = piece.values[k];
        }
        if (whole_pieces) *reinterpret_cast<Piece<T>*>(y + i) = piece;
      },
      [&](int64_t i) { y[i] = from_float<T>(gradient(to_float(source[i]), max, factor)); });
}

template <class T>
__device__ void write_zeros(T* y, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += kThreads) y[i] = from_float<T>(0.0f);
}

template <class T, bool kStaged>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(CrossEntropy call) {
  extern __shared__ __align__(kPieceBytes) unsigned char shared_row[];
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(call.input) + row * call.input_stride;
  T* y = call.gradient == nullptr ? nullptr : static_cast<T*>(call.gradient) + row * call.gradient_stride;
  const int64_t target = call.target[row];
  if (target == call.ignore_index) {
    if (threadIdx.x == 0) call.losses[row] = 0.0f;
    if (y != nullptr) write_zeros(y, call.columns);
    return;
  }
  assert(target >= 0 && target < call.num_classes && "cross_entropy: a target is out of bounds");
  const float target_logit = to_float(x[target]);
  const int64_t misalignment = reinterpret_cast<uintptr_t>(x) % kPieceBytes;
  T* staged = kStaged ? reinterpret_cast<T*>(shared_row + misalignment) : nullptr;
  const Cut<T> cut(x, call.num_classes);
  const Statistics statistics = read_row(x, cut, call.num_classes, staged);
  if (threadIdx.x == 0) call.losses[row] = loss(statistics, target_logit);
  if (y == nullptr) return;
  const float scale = call.scale == nullptr ? 1.0f : call.scale[row * call.scale_stride];
  const bool whole_pieces = reinterpret_cast<uintptr_t>(y) % kPieceBytes == misalignment;
  write_row(kStaged ? staged : x, y, cut, call.num_classes, statistics.max, gradient_factor(statistics, scale), whole_pieces);
  write_zeros(y + call.num_classes, call.columns - call.num_classes);
  __syncthreads();  // without it the target's own gradient could be overwritten by the thread that owns its column
  if (threadIdx.x == 0) y[target] = from_float<T>(target_gradient(target_logit, statistics, scale));
}

template <class T>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(ScaleRows call) {
  const int64_t row = blockIdx.x;
  const float scale = call.scale[row * call.scale_stride];
  if (scale == 1.0f) return;
  T* x = static_cast<T*>(call.input) + row * call.stride;
  const auto scaled = [&](T value) { return from_float<T>(to_float(value) * scale); };
  for_own_elements<T>(
      Cut<T>(x, call.columns), call.columns,
      [&](int64_t i) {
        Piece<T> piece = *reinterpret_cast<const Piece<T>*>(x + i);
#pragma unroll
        for (int k = 0; k < Piece<T>::kSize; ++k) piece.values[k] = scaled(piece.values[k]);
        *reinterpret_cast<Piece<T>*>(x + i) = piece;
      },
      [&](int64_t i) { x[i] = scaled(x[i]); });
}

template <class T>
cudaError_t launch(const CrossEntropy& call, cudaStream_t stream) {
  int device, available;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  // The static shared memory of merge_over_block comes out of the same budget.
  const int64_t needed = call.num_classes * sizeof(T) + kPieceBytes;
  const bool fits = needed + static_cast<int64_t>(kWarps * sizeof(Statistics)) <= available;
  if (!fits || call.gradient == nullptr) {
    cross_entropy_kernel<T, false><<<call.rows, kThreads, 0, stream>>>(call);
    return cudaGetLastError();
  }
  error = cudaFuncSetAttribute(cross_entropy_kernel<T, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, needed);
  if (error != cudaSuccess) return error;
  cross_entropy_kernel<T, true><<<call.rows, kThreads, needed, stream>>>(call);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const ScaleRows& call, cudaStream_t stream) {
  scale_rows_kernel<T><<<call.rows, kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

template <class Call>
cudaError_t launch_for_element(const Call& call, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (call.element) {
    case Element::kFloat16:
      return launch<__half>(call, on);
    case Element::kBFloat16:
      return launch<__nv_bfloat16>(call, on);
    default:
      return launch<float>(call, on);
  }
}

}  // namespace

int cross_entropy_cuda(const CrossEntropy& call, void* stream) { return launch_for_element(call, stream); }
int scale_rows_cuda(const ScaleRows& call, void* stream) { return launch_for_element(call, stream); }

}  // namespace fastlm
