// Cross entropy on a GPU: a row is read from memory once, in 16-byte pieces, and kept in shared memory while its
// statistics are taken; from there its gradient is made, and written once. What is here moves data: the formulas are in
// cross_entropy_math.h, and how many threads and blocks share a row in cross_entropy_launch.h.
#include "cross_entropy.h"
#include "cross_entropy_launch.h"
#include "cross_entropy_math.h"

#include <cassert>
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HAS_CLUSTERS
#endif

namespace fastlm {
namespace {

constexpr int kWarp = 32;
constexpr int kMostInFlight = 4;        // pieces that a thread requests before it waits for the first
constexpr int kResidentThreads = 1024;  // of a multiprocessor, for which registers must suffice: 64 for each
constexpr int64_t kMostBlocks = 0x7fffffff;
constexpr int64_t kMostColumns = 1 << 30;  // 64-bit indices within a row would cost registers, and spill

template <int kRowThreads>
constexpr int kBlockThreads = kRowThreads == kShortRowThreads ? kRowThreads * kShortRowsPerBlock : kRowThreads;

__device__ __forceinline__ int at_most(int64_t n, int64_t limit) { return static_cast<int>(n < limit ? n : limit); }

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

// Kept in words: as an array of 16-bit elements each of these would take a register.
template <class T>
struct alignas(kPieceBytes) Piece {
  static constexpr int kSize = kPieceBytes / sizeof(T);
  static constexpr int kWordSize = sizeof(uint32_t) / sizeof(T);
  uint32_t words[kPieceBytes / sizeof(uint32_t)];

  __device__ __forceinline__ T operator[](int e) const {
    const uint32_t word = words[e / kWordSize] >> (e % kWordSize * 16);
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }

  // Of the elements of(0), of(1), ...
  template <class Of>
  static __device__ __forceinline__ Piece made(Of of) {
    Piece piece;
#pragma unroll
    for (int e = 0; e < kSize; e += kWordSize) {
      T values[kWordSize];
#pragma unroll
      for (int k = 0; k < kWordSize; ++k) values[k] = of(e + k);
      std::memcpy(&piece.words[e / kWordSize], values, sizeof values);
    }
    return piece;
  }
};

template <class T>
__device__ __forceinline__ Piece<T> load(const T* address) { return *reinterpret_cast<const Piece<T>*>(address); }
template <class T>
__device__ __forceinline__ void store(T* address, const Piece<T>& piece) {
  *reinterpret_cast<Piece<T>*>(address) = piece;
}

template <class T>
__device__ __forceinline__ int misaligned_bytes(const T* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % kPieceBytes);
}

// The threads of a block that share a row.
template <int kRowThreads>
struct Team {
  static __device__ __forceinline__ int number() { return threadIdx.x / kRowThreads; }
  static __device__ __forceinline__ int thread() { return threadIdx.x % kRowThreads; }
  static __device__ __forceinline__ void sync() {
    if constexpr (kRowThreads == kWarp) {
      __syncwarp();  // the other warps of the block have rows of their own, and may have left
    } else {
      __syncthreads();
    }
  }
};

// n elements at any address, cut into head, whole pieces and tail: head and tail are shorter than a piece.
template <class T>
struct Cut {
  int n;
  int head;
  int pieces;
  __device__ __forceinline__ Cut(const T* address, int n) : n(n) {
    head = (kPieceBytes - misaligned_bytes(address)) % kPieceBytes / sizeof(T);
    if (head > n) head = n;
    pieces = (n - head) / Piece<T>::kSize;
  }
  __device__ __forceinline__ int tail() const { return head + pieces * Piece<T>::kSize; }
};

// Up to kInFlight pieces that one thread handles together; each neighbour in a warp has the piece beside.
template <int kRowThreads, int kInFlight, class T>
struct Group {
  const Cut<T>& cut;
  int first;
  // Calls use(k, i) for the k-th piece, which starts at element i.
  template <class Use>
  __device__ __forceinline__ void for_each(Use use) const {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int piece = first + k * kRowThreads;
      if (piece < cut.pieces) use(k, cut.head + piece * Piece<T>::kSize);
    }
  }
};

// Calls on_group for the pieces of this thread, and on_single(i) for its elements of head and tail.
template <int kRowThreads, int kInFlight, class T, class OnGroup, class OnSingle>
__device__ __forceinline__ void for_own_elements(const Cut<T>& cut, OnGroup on_group, OnSingle on_single) {
  const int thread = Team<kRowThreads>::thread();
#pragma unroll 1
  for (int piece = thread; piece < cut.pieces; piece += kInFlight * kRowThreads)
    on_group(Group<kRowThreads, kInFlight, T>{cut, piece});
  if (thread < cut.head) on_single(thread);
  if (cut.tail() + thread < cut.n) on_single(cut.tail() + thread);
}

template <int kRowThreads, class T>
__device__ __forceinline__ void write_zeros(T* y, int n) {
  const T zero = from_float<T>(0.0f);
  const Piece<T> zeros = Piece<T>::made([&](int) { return zero; });
  for_own_elements<kRowThreads, kMostInFlight>(
      Cut<T>(y, n), [&](auto group) { group.for_each([&](int, int i) { store(y + i, zeros); }); },
      [&](int i) { y[i] = zero; });
}

// Of the first kLanes lanes, for all. Lane 0's result is handed round: the others add in another order, and would round
// otherwise.
template <bool kSmoothing, int kLanes>
__device__ __forceinline__ Statistics merge_over_lanes(Statistics own) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    Statistics other = no_logits();
    other.max = __shfl_down_sync(~0u, own.max, distance);
    other.sum = __shfl_down_sync(~0u, own.sum, distance);
    if constexpr (kSmoothing) other.weight = __shfl_down_sync(~0u, own.weight, distance);
    if constexpr (kSmoothing) other.weighted = __shfl_down_sync(~0u, own.weighted, distance);
    own = merge<kSmoothing>(own, other);
  }
  own.max = __shfl_sync(~0u, own.max, 0);
  own.sum = __shfl_sync(~0u, own.sum, 0);
  if constexpr (kSmoothing) own.weight = __shfl_sync(~0u, own.weight, 0);
  if constexpr (kSmoothing) own.weighted = __shfl_sync(~0u, own.weighted, 0);
  return own;
}

// After it all threads of the row also see what the others have staged, and have read what will be overwritten.
template <bool kSmoothing, int kRowThreads>
__device__ __forceinline__ Statistics merge_over_team(Statistics own) {
  constexpr int kWarps = kRowThreads / kWarp;
  __shared__ Statistics of_warp[kBlockThreads<kRowThreads> / kWarp];
  own = merge_over_lanes<kSmoothing, kWarp>(own);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) of_warp[threadIdx.x / kWarp] = own;
  Team<kRowThreads>::sync();
  return merge_over_lanes<kSmoothing, kWarps>(of_warp[Team<kRowThreads>::number() * kWarps + lane % kWarps]);
}

// All blocks merge in the order of their ranks, and so get the same bits.
template <bool kSmoothing>
__device__ __forceinline__ Part merge_over_cluster(Part part, int blocks) {
#ifdef HAS_CLUSTERS
  __shared__ Part of_block;
  const auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) of_block = part;
  cluster.sync();
  part = *cluster.map_shared_rank(&of_block, 0);
  for (int rank = 1; rank < blocks; ++rank) part = merge<kSmoothing>(part, *cluster.map_shared_rank(&of_block, rank));
  cluster.barrier_arrive();
#endif
  return part;
}

// A block that left earlier would take its shared memory away from those that still read it.
__device__ __forceinline__ void leave_cluster() {
#ifdef HAS_CLUSTERS
  cooperative_groups::this_cluster().barrier_wait();
#endif
}

// What one team does: a slice of a row.
template <class T, bool kSoftcap, bool kSmoothing, int kRowThreads>
struct Slice {
  static constexpr int kInFlight = kSoftcap ? 1 : kMostInFlight;  // the tanh of more elements at once would spill

  const CrossEntropy& call;
  const T* x;
  T* y;                 // gradient; of no use where none is wanted
  const float* weight;  // of the classes of x; null means 1
  int n;
  T* copy;              // of the first `staged` elements, in shared memory, as far from alignment as x
  int staged;           // n, or up to a piece's end
  int padding;          // elements that follow x and are no classes: their gradient is 0

  __device__ __forceinline__ float class_weight(int i) const { return weight == nullptr ? 1.0f : weight[i]; }

  __device__ __forceinline__ Logit<float> logit(T z) const { return capped<kSoftcap>(to_float(z), call.softcap); }

  // Of no logits yet, relative to the maximum of those to be added. It must not be NaN; the sum will be.
  __device__ __forceinline__ Statistics relative_to(float max) const {
    return {capped<kSoftcap>(max, call.softcap).x, 0.0f, 0.0f, 0.0f};
  }

  __device__ __forceinline__ void add(Statistics& statistics, T z, int i) const {
    const float x = logit(z).x - shift(statistics.max);
    statistics.sum += exponential(x);
    if constexpr (kSmoothing) {
      const float w = class_weight(i);
      statistics.weight += w;
      statistics.weighted += w * x;
    }
  }

  // The statistics of this thread's elements, which are staged on the way.
  __device__ __forceinline__ Statistics read() const {
    Statistics own = no_logits();
    for_own_elements<kRowThreads, kInFlight>(
        Cut<T>(x, n),
        [&](auto group) {
          Piece<T> pieces[kInFlight];
          group.for_each([&](int k, int i) { pieces[k] = load(x + i); });
          group.for_each([&](int k, int i) {
            if (i < staged) store(copy + i, pieces[k]);
          });
          float max = -INFINITY;
          group.for_each([&](int k, int) {
#pragma unroll
            for (int e = 0; e < Piece<T>::kSize; ++e) max = fmaxf(max, to_float(pieces[k][e]));
          });
          Statistics statistics = relative_to(max);
          group.for_each([&](int k, int i) {
#pragma unroll
            for (int e = 0; e < Piece<T>::kSize; ++e) add(statistics, pieces[k][e], i + e);
          });
          own = merge<kSmoothing>(own, statistics);
        },
        [&](int i) {
          const T z = x[i];
          if (i < staged) copy[i] = z;
          Statistics statistics = relative_to(fmaxf(-INFINITY, to_float(z)));
          add(statistics, z, i);
          own = merge<kSmoothing>(own, statistics);
        });
    return own;
  }

  // The piece from element i on; aligned as pieces of y are, which those of x need not be.
  __device__ __forceinline__ Piece<T> source(int i, bool aligned) const {
    const bool is_staged = i + Piece<T>::kSize <= staged;
    if (aligned) {
      if (is_staged) return load(copy + i);
      return load(x + i);
    }
    return Piece<T>::made([&](int e) { return is_staged ? copy[i + e] : x[i + e]; });
  }

  // The gradient of all but the target. The stores do not stream: what is written last, the first rows, may stay in the
  // L2 cache for the GEMM that reads the gradient next.
  __device__ __forceinline__ void write(const Row& row) const {
    const bool aligned = misaligned_bytes(x) == misaligned_bytes(y);
    const float factor = gradient_factor<kSmoothing>(row);
    const auto of = [&](T z, int i) {
      const Logit<float> of_z = logit(z);
      const float part = exponential(of_z.x - row.max) * factor;
      return from_float<T>(gradient<kSmoothing, float>(part, class_weight(i), row, of_z.slope));
    };
    for_own_elements<kRowThreads, kInFlight>(
        Cut<T>(y, n),
        [&](auto group) {
          Piece<T> pieces[kInFlight];
          group.for_each([&](int k, int i) { pieces[k] = source(i, aligned); });
          group.for_each([&](int k, int i) {
            store(y + i, Piece<T>::made([&](int e) { return of(pieces[k][e], i + e); }));
          });
        },
        [&](int i) { y[i] = of(i < staged ? copy[i] : x[i], i); });
    if (padding > 0) write_zeros<kRowThreads>(y + n, padding);
  }
};

template <bool kSmoothing>
__device__ __forceinline__ Part merge_given(const CrossEntropy& call, int64_t row) {
  Part part = {no_logits(), 0.0f, 0.0f};
  for (int64_t k = 0; k < call.num_given; ++k) part = merge<kSmoothing>(part, call.given_parts[k * call.rows + row]);
  return part;
}

// The rank-th slice of a row.
template <class T, bool kSoftcap, bool kSmoothing, int kRowThreads>
__device__ __forceinline__ Slice<T, kSoftcap, kSmoothing, kRowThreads> slice_of(const CrossEntropy& call,
                                                                                const Launch& launch, int64_t row,
                                                                                int rank) {
  extern __shared__ __align__(kPieceBytes) unsigned char shared_rows[];
  const int begin = at_most(rank * launch.slice, call.num_classes);
  const int n = at_most(call.num_classes - begin, launch.slice);
  const T* x = static_cast<const T*>(call.input) + row * call.input_stride + begin;
  T* y = static_cast<T*>(call.gradient) + row * call.gradient_stride + begin;
  const float* weight = call.weight == nullptr ? nullptr : call.weight + begin;
  unsigned char* copy = shared_rows + Team<kRowThreads>::number() * launch.row_bytes + misaligned_bytes(x);
  const int whole_pieces = static_cast<int>(launch.staged) - misaligned_bytes(x) / static_cast<int>(sizeof(T));
  const int padding = rank == launch.cluster - 1 ? static_cast<int>(call.columns - call.num_classes) : 0;
  return {call, x, y, weight, n, reinterpret_cast<T*>(copy), launch.staged >= n ? n : whole_pieces, padding};
}

template <class T, bool kSoftcap, bool kSmoothing, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kResidentThreads / kBlockThreads<kRowThreads>)
    cross_entropy_kernel(CrossEntropy call, Launch launch) {
  const bool clustered = kRowThreads == kLongRowThreads && launch.cluster > 1;
  const int rank = clustered ? blockIdx.x % launch.cluster : 0;
  const int64_t number = clustered ? blockIdx.x / launch.cluster : blockIdx.x;
  // The last row first: a GEMM that has just written the logits left its last rows in the L2 cache.
  const int64_t row = call.rows - 1 - (number * launch.rows_per_block + Team<kRowThreads>::number());
  if (row < 0 || is_made(call, row)) return;
  const auto slice = slice_of<T, kSoftcap, kSmoothing, kRowThreads>(call, launch, row, rank);
  const bool speaks = rank == 0 && Team<kRowThreads>::thread() == 0;  // for the row, where one thread must

  const int64_t target = call.target[row];
  if (target == call.ignore_index) {
    if (speaks && call.parts != nullptr) call.parts[row] = {no_logits(), 0.0f, 0.0f};
    if (speaks && call.parts == nullptr) call.losses[row] = 0.0f;
    if (call.gradient != nullptr && call.parts == nullptr) write_zeros<kRowThreads>(slice.y, slice.n + slice.padding);
    return;
  }
  // One thread asserts: 512 would print as many messages.
  assert((!speaks || (target >= 0 && target < call.total_classes)) && "cross_entropy: a target is out of bounds");

  const int64_t of_slice = target - call.first_class - at_most(rank * launch.slice, call.num_classes);
  const int column = of_slice >= 0 && of_slice < slice.n ? static_cast<int>(of_slice) : -1;
  const bool here = column >= 0;
  const T target_value = here ? slice.x[column] : from_float<T>(0.0f);
  const float target_weight = here ? slice.class_weight(column) : 0.0f;
  Part part;
  if (call.given_parts != nullptr) {
    part = merge_given<kSmoothing>(call, row);
    Team<kRowThreads>::sync();  // without it a thread could read its target logit after the gradient has replaced it
  } else {
    part = {merge_over_team<kSmoothing, kRowThreads>(slice.read()), here ? slice.logit(target_value).x : 0.0f,
            target_weight};
    if (clustered) part = merge_over_cluster<kSmoothing>(part, launch.cluster);
  }
  if (call.parts != nullptr) {
    if (speaks) call.parts[row] = part;
    return;
  }

  const Row facts = finish<kSmoothing>(part, call, row_scale(call, row));
  if (speaks) call.losses[row] = facts.loss;
  if (call.gradient == nullptr) return;
  const T exact = from_float<T>(target_gradient<kSmoothing>(slice.logit(target_value), target_weight, facts));
  slice.write(facts);
  Team<kRowThreads>::sync();  // without it the thread that owns the target's column could overwrite its gradient
  if (here && Team<kRowThreads>::thread() == 0) slice.y[column] = exact;
  if (clustered) leave_cluster();
}

template <class T>
__global__ void __launch_bounds__(kLongRowThreads) scale_rows_kernel(ScaleRows call) {
  const int64_t row = blockIdx.x;
  const float scale = call.scale[row * call.scale_stride];
  if (scale == 1.0f) return;
  T* x = static_cast<T*>(call.input) + row * call.stride;
  const auto scaled = [&](T value) { return from_float<T>(to_float(value) * scale); };
  for_own_elements<kLongRowThreads, kMostInFlight>(
      Cut<T>(x, call.columns),
      [&](auto group) {
        Piece<T> pieces[kMostInFlight];
        group.for_each([&](int k, int i) { pieces[k] = load(x + i); });
        group.for_each([&](int k, int i) {
          store(x + i, Piece<T>::made([&](int e) { return scaled(pieces[k][e]); }));
        });
      },
      [&](int i) { x[i] = scaled(x[i]); });
}

struct Grid {
  int64_t blocks;
  int threads;
  int cluster;
  int64_t shared_bytes;
};

template <class... Parameters, class... Arguments>
cudaError_t start(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream, const Arguments&... arguments) {
  if (grid.blocks > kMostBlocks) return cudaErrorInvalidConfiguration;  // CUDA would see the lower 32 bits alone
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = grid.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class T, bool kSoftcap, bool kSmoothing, int kRowThreads>
cudaError_t launch_kernel(const CrossEntropy& call, const Launch& launch, const Chip& chip, cudaStream_t stream) {
  const auto kernel = cross_entropy_kernel<T, kSoftcap, kSmoothing, kRowThreads>;
  if (launch.staged > 0) {
    // Always the most: a smaller limit for another host thread's launch could come between this limit and its launch.
    const int most = static_cast<int>(chip.shared_per_block - kStaticBytes);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
  }
  const int64_t teams = (call.rows + launch.rows_per_block - 1) / launch.rows_per_block;
  const Grid grid = {teams * launch.cluster, kBlockThreads<kRowThreads>, launch.cluster,
                     launch.rows_per_block * launch.row_bytes};
  return start(kernel, grid, stream, call, launch);
}

template <class T, bool kSoftcap, bool kSmoothing>
cudaError_t launch_for_length(const CrossEntropy& call, const Chip& chip, cudaStream_t stream) {
  const bool read_twice = call.gradient != nullptr && call.parts == nullptr && call.given_parts == nullptr;
  const Launch launch = choose_launch(call.num_classes, sizeof(T), read_twice, chip);
  switch (launch.row_threads) {
    case kShortRowThreads:
      return launch_kernel<T, kSoftcap, kSmoothing, kShortRowThreads>(call, launch, chip, stream);
    case kMediumRowThreads:
      return launch_kernel<T, kSoftcap, kSmoothing, kMediumRowThreads>(call, launch, chip, stream);
    default:
      return launch_kernel<T, kSoftcap, kSmoothing, kLongRowThreads>(call, launch, chip, stream);
  }
}

cudaError_t this_chip(Chip* chip) {
  int device, per_block, per_multiprocessor;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&chip->major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  chip->shared_per_block = per_block;
  chip->shared_per_multiprocessor = per_multiprocessor;
  return cudaSuccess;
}

template <class T>
cudaError_t launch(const CrossEntropy& call, cudaStream_t stream) {
  Chip chip;
  const cudaError_t error = this_chip(&chip);
  if (error != cudaSuccess) return error;
  if (call.softcap != 0.0f) {
    return call.label_smoothing != 0.0f ? launch_for_length<T, true, true>(call, chip, stream)
                                        : launch_for_length<T, true, false>(call, chip, stream);
  }
  return call.label_smoothing != 0.0f ? launch_for_length<T, false, true>(call, chip, stream)
                                      : launch_for_length<T, false, false>(call, chip, stream);
}

template <class T>
cudaError_t launch(const ScaleRows& call, cudaStream_t stream) {
  return start(scale_rows_kernel<T>, {call.rows, kLongRowThreads, 1, 0}, stream, call);
}

template <class Call>
cudaError_t launch_for_element(const Call& call, void* stream) {
  if (call.columns > kMostColumns) return cudaErrorInvalidValue;
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
