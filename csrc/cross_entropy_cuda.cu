// Cross entropy on a GPU: a row is read from memory once, in 16-byte vectors, and kept in shared memory while its
// statistics are computed; from there its gradient is computed, and written once. This file moves data: the formulas
// are in cross_entropy_math.h, and how many threads and blocks share a row in cross_entropy_launch.h.
#include "cross_entropy.h"
#include "cross_entropy_launch.h"
#include "cross_entropy_math.h"

#include <cassert>
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <type_traits>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HAS_CLUSTERS
#endif

namespace fastlm {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxInFlight = 4;  // loads of vectors that a thread issues before it waits for the first
// Of a multiprocessor at least, so 64 registers for each; 80 where 64 would spill: sm_75 and sm_120 with both options.
constexpr int resident_threads([[maybe_unused]] bool softcap, [[maybe_unused]] bool smoothing) {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1200)
  if (softcap && smoothing) return 768;
#endif
  return 1024;
}
constexpr int64_t kMaxBlocks = 0x7fffffff;
constexpr int64_t kScaleBlocks = 2048;    // that scale rows: several for each place on a multiprocessor
constexpr int64_t kMaxColumns = 1 << 30;  // 64-bit indices within a row would spill registers

template <int kRowThreads>
constexpr int kBlockThreads = kRowThreads == kShortRowThreads ? kRowThreads * kShortRowsPerBlock : kRowThreads;

__device__ __forceinline__ int at_most(int64_t n, int64_t limit) { return static_cast<int>(n < limit ? n : limit); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) return __float2half(x);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16(x);
  if constexpr (std::is_same_v<T, float>) return x;
}

// 16 bytes, for one load or store. An array of 16-bit elements instead of words would take a register for each.
template <class T>
struct alignas(kVectorBytes) AlignedVector {
  static constexpr int kSize = kVectorBytes / sizeof(T);
  static constexpr int kWordSize = sizeof(uint32_t) / sizeof(T);
  uint32_t words[kVectorBytes / sizeof(uint32_t)];

  __device__ __forceinline__ T operator[](int e) const {
    const uint32_t word = words[e / kWordSize] >> (e % kWordSize * 16);
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }

  // The vector of the elements element(0), element(1), ...
  template <class Element>
  static __device__ __forceinline__ AlignedVector generate(Element element) {
    AlignedVector vector;
#pragma unroll
    for (int e = 0; e < kSize; e += kWordSize) {
      T values[kWordSize];
#pragma unroll
      for (int k = 0; k < kWordSize; ++k) values[k] = element(e + k);
      std::memcpy(&vector.words[e / kWordSize], values, sizeof values);
    }
    return vector;
  }
};

template <class T>
__device__ __forceinline__ AlignedVector<T> load(const T* address) {
  return *reinterpret_cast<const AlignedVector<T>*>(address);
}
template <class T>
__device__ __forceinline__ void store(T* address, const AlignedVector<T>& vector) {
  *reinterpret_cast<AlignedVector<T>*>(address) = vector;
}

// The same to global memory. In a loop over rows nvcc made four stores of 4 bytes of the other one.
template <class T>
__device__ __forceinline__ void store_to_global(T* address, const AlignedVector<T>& vector) {
  const auto& words = vector.words;
  __stwb(reinterpret_cast<uint4*>(address), make_uint4(words[0], words[1], words[2], words[3]));
}

template <class T>
__device__ __forceinline__ int misaligned_bytes(const T* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % kVectorBytes);
}

// The threads of a block that share a row.
template <int kRowThreads>
struct RowGroup {
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

// n elements at any address, split into head, aligned vectors and tail; head and tail are shorter than a vector.
template <class T>
struct AlignedSpan {
  int n;
  int head;
  int vectors;
  __device__ __forceinline__ AlignedSpan(const T* address, int n) : n(n) {
    head = (kVectorBytes - misaligned_bytes(address)) % kVectorBytes / sizeof(T);
    if (head > n) head = n;
    vectors = (n - head) / AlignedVector<T>::kSize;
  }
  __device__ __forceinline__ int tail() const { return head + vectors * AlignedVector<T>::kSize; }
};

// Up to kInFlight vectors that one thread handles together; the threads of a warp have adjacent vectors.
template <int kRowThreads, int kInFlight, class T>
struct VectorBatch {
  const AlignedSpan<T>& cut;
  int first;
  // Calls use(k, i) for the k-th vector, which starts at element i.
  template <class Use>
  __device__ __forceinline__ void for_each(Use use) const {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int vector = first + k * kRowThreads;
      if (vector < cut.vectors) use(k, cut.head + vector * AlignedVector<T>::kSize);
    }
  }
};

// Calls on_batch for the vectors of this thread, and on_single(i) for its elements of head and tail.
template <int kRowThreads, int kInFlight, class T, class OnGroup, class OnSingle>
__device__ __forceinline__ void for_own_elements(const AlignedSpan<T>& cut, OnGroup on_batch, OnSingle on_single) {
  const int thread = RowGroup<kRowThreads>::thread();
#pragma unroll 1
  for (int vector = thread; vector < cut.vectors; vector += kInFlight * kRowThreads)
    on_batch(VectorBatch<kRowThreads, kInFlight, T>{cut, vector});
  if (thread < cut.head) on_single(thread);
  if (cut.tail() + thread < cut.n) on_single(cut.tail() + thread);
}

template <int kRowThreads, class T>
__device__ __forceinline__ void write_zeros(T* y, int n) {
  const T zero = from_float<T>(0.0f);
  const AlignedVector<T> zeros = AlignedVector<T>::generate([&](int) { return zero; });
  for_own_elements<kRowThreads, kMaxInFlight>(
      AlignedSpan<T>(y, n), [&](auto batch) { batch.for_each([&](int, int i) { store(y + i, zeros); }); },
      [&](int i) { y[i] = zero; });
}

// Merges the first kLanes lanes of a warp, for all lanes. Lane 0's result is broadcast: the other lanes add in another
// order, and would round differently.
template <bool kSmoothing, int kLanes>
__device__ __forceinline__ LogitStats merge_over_lanes(LogitStats own) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    LogitStats other = no_logits();
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

// Also a barrier: then the staged copies of all threads of the row are visible, and no thread still reads the input.
template <bool kSmoothing, int kRowThreads>
__device__ __forceinline__ LogitStats merge_over_row_group(LogitStats own) {
  constexpr int kWarps = kRowThreads / kWarp;
  __shared__ LogitStats of_warp[kBlockThreads<kRowThreads> / kWarp];
  own = merge_over_lanes<kSmoothing, kWarp>(own);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) of_warp[threadIdx.x / kWarp] = own;
  RowGroup<kRowThreads>::sync();
  return merge_over_lanes<kSmoothing, kWarps>(of_warp[RowGroup<kRowThreads>::number() * kWarps + lane % kWarps]);
}

// Every block merges in the order of the ranks, and so gets the same bits.
template <bool kSmoothing>
__device__ __forceinline__ PartialStats merge_over_cluster(PartialStats own, int blocks) {
#ifdef HAS_CLUSTERS
  __shared__ PartialStats of_block;
  const auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) of_block = own;
  cluster.sync();
  own = *cluster.map_shared_rank(&of_block, 0);
  for (int rank = 1; rank < blocks; ++rank) own = merge<kSmoothing>(own, *cluster.map_shared_rank(&of_block, rank));
  cluster.barrier_arrive();
#endif
  return own;
}

// Without it a block could exit, and free its shared memory, while others still read it.
__device__ __forceinline__ void leave_cluster() {
#ifdef HAS_CLUSTERS
  cooperative_groups::this_cluster().barrier_wait();
#endif
}

// The part of a row that one row group processes.
template <class T, bool kSoftcap, bool kSmoothing, int kRowThreads>
struct Slice {
  static constexpr bool kIsShort = sizeof(T) == 2;
  static constexpr int kInFlight = kSoftcap && !kIsShort ? 1 : kMaxInFlight;  // tanhf of more at once would spill

  const CrossEntropyParams& params;
  const T* x;
  T* y;                 // gradient; invalid where none is wanted
  const float* weight;  // of the classes of x; null means 1
  int n;
  T* copy;      // of the first `staged` elements, in shared memory, with the misalignment of x
  int staged;   // n, or a number that ends at the end of a vector
  int padding;  // elements that follow x and are no classes: their gradient is 0

  __device__ __forceinline__ float class_weight(int i) const { return weight == nullptr ? 1.0f : weight[i]; }

  __device__ __forceinline__ Logit<float> capped(float z) const {
    if constexpr (kSoftcap && kIsShort) return apply_softcap_of_16_bits(z, params.softcap);
    return apply_softcap<kSoftcap>(z, params.softcap);
  }
  __device__ __forceinline__ Logit<float> logit(T z) const { return capped(to_float(z)); }

  // The statistics of no logits yet, for logits whose maximum is max, ignoring NaN: a NaN shows in the sum.
  __device__ __forceinline__ LogitStats relative_to(float max) const { return {capped(max).x, 0.0f, 0.0f, 0.0f}; }

  __device__ __forceinline__ void add(LogitStats& stats, T z, int i) const {
    const float x = logit(z).x - shift(stats.max);
    stats.sum += exponential(x);
    if constexpr (kSmoothing) {
      const float w = class_weight(i);
      stats.weight += w;
      stats.weighted += w * x;
    }
  }

  // The statistics of this thread's elements, which it copies to shared memory on the way.
  __device__ __forceinline__ LogitStats read() const {
    LogitStats own = no_logits();
    for_own_elements<kRowThreads, kInFlight>(
        AlignedSpan<T>(x, n),
        [&](auto batch) {
          AlignedVector<T> vectors[kInFlight];
          batch.for_each([&](int k, int i) { vectors[k] = load(x + i); });
          batch.for_each([&](int k, int i) {
            if (i < staged) store(copy + i, vectors[k]);
          });
          float max = -INFINITY;
          batch.for_each([&](int k, int) {
#pragma unroll
            for (int e = 0; e < AlignedVector<T>::kSize; ++e) max = fmaxf(max, to_float(vectors[k][e]));
          });
          LogitStats stats = relative_to(max);
          batch.for_each([&](int k, int i) {
#pragma unroll
            for (int e = 0; e < AlignedVector<T>::kSize; ++e) add(stats, vectors[k][e], i + e);
          });
          own = merge<kSmoothing>(own, stats);
        },
        [&](int i) {
          const T z = x[i];
          if (i < staged) copy[i] = z;
          LogitStats stats = relative_to(fmaxf(-INFINITY, to_float(z)));
          add(stats, z, i);
          own = merge<kSmoothing>(own, stats);
        });
    return own;
  }

  // The vector from element i on. It is aligned in y; `aligned` says that it is in x too.
  __device__ __forceinline__ AlignedVector<T> source(int i, bool aligned) const {
    const bool is_staged = i + AlignedVector<T>::kSize <= staged;
    if (aligned) {
      if (is_staged) return load(copy + i);
      return load(x + i);
    }
    return AlignedVector<T>::generate([&](int e) { return is_staged ? copy[i + e] : x[i + e]; });
  }

  // Writes the gradient of all but the target. The stores are not streaming stores: the rows that are written last, the
  // first ones, may stay in the L2 cache for the GEMM that reads the gradient next.
  __device__ __forceinline__ void write(const RowStats& row) const {
    const bool aligned = misaligned_bytes(x) == misaligned_bytes(y);
    const float factor = gradient_factor<kSmoothing>(row);
    const auto gradient_of = [&](T z, int i) {
      const Logit<float> capped = logit(z);
      const float p_term = exponential(capped.x - row.max) * factor;
      return from_float<T>(gradient<kSmoothing, float>(p_term, class_weight(i), row, capped.slope));
    };
    for_own_elements<kRowThreads, kInFlight>(
        AlignedSpan<T>(y, n),
        [&](auto batch) {
          AlignedVector<T> vectors[kInFlight];
          batch.for_each([&](int k, int i) { vectors[k] = source(i, aligned); });
          batch.for_each([&](int k, int i) {
            store(y + i, AlignedVector<T>::generate([&](int e) { return gradient_of(vectors[k][e], i + e); }));
          });
        },
        [&](int i) { y[i] = gradient_of(i < staged ? copy[i] : x[i], i); });
    if (padding > 0) write_zeros<kRowThreads>(y + n, padding);
  }
};

template <bool kSmoothing>
__device__ __forceinline__ PartialStats merge_partial_stats(const CrossEntropyParams& params, int64_t row) {
  PartialStats whole = {no_logits(), 0.0f, 0.0f};
  for (int64_t k = 0; k < params.num_partial_stats; ++k)
    whole = merge<kSmoothing>(whole, params.partial_stats[k * params.rows + row]);
  return whole;
}

// The rank-th slice of a row.
template <class T, bool kSoftcap, bool kSmoothing, int kRowThreads>
__device__ __forceinline__ Slice<T, kSoftcap, kSmoothing, kRowThreads> slice_of(const CrossEntropyParams& params,
                                                                                const Launch& launch, int64_t row,
                                                                                int rank) {
  extern __shared__ __align__(kVectorBytes) unsigned char shared_rows[];
  const int begin = at_most(rank * launch.slice, params.num_classes);
  const int n = at_most(params.num_classes - begin, launch.slice);
  const T* x = static_cast<const T*>(params.input) + row * params.input_stride + begin;
  T* y = static_cast<T*>(params.gradient) + row * params.gradient_stride + begin;
  const float* weight = params.weight == nullptr ? nullptr : params.weight + begin;
  unsigned char* copy = shared_rows + RowGroup<kRowThreads>::number() * launch.row_bytes + misaligned_bytes(x);
  const int whole_vectors = static_cast<int>(launch.staged) - misaligned_bytes(x) / static_cast<int>(sizeof(T));
  const int padding = rank == launch.cluster - 1 ? static_cast<int>(params.columns - params.num_classes) : 0;
  return {.params = params,
          .x = x,
          .y = y,
          .weight = weight,
          .n = n,
          .copy = reinterpret_cast<T*>(copy),
          .staged = launch.staged >= n ? n : whole_vectors,
          .padding = padding};
}

template <class T, bool kSoftcap, bool kSmoothing, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>,
                                  resident_threads(kSoftcap, kSmoothing) / kBlockThreads<kRowThreads>)
    cross_entropy_kernel(CrossEntropyParams params, Launch launch) {
  const bool clustered = kRowThreads == kLongRowThreads && launch.cluster > 1;
  const int rank = clustered ? blockIdx.x % launch.cluster : 0;
  const int64_t number = clustered ? blockIdx.x / launch.cluster : blockIdx.x;
  // The last row first: the GEMM that has just written the logits left its last rows in the L2 cache.
  const int64_t row = params.rows - 1 - (number * launch.rows_per_block + RowGroup<kRowThreads>::number());
  if (row < 0 || is_gradient_stored(params, row)) return;
  const auto slice = slice_of<T, kSoftcap, kSmoothing, kRowThreads>(params, launch, row, rank);
  const bool is_leader = rank == 0 && RowGroup<kRowThreads>::thread() == 0;  // of all threads of the row

  const int64_t target = params.target[row];
  if (target == params.ignore_index) {
    if (is_leader && params.partial_stats_out != nullptr) params.partial_stats_out[row] = {no_logits(), 0.0f, 0.0f};
    if (is_leader && params.partial_stats_out == nullptr) params.losses[row] = 0.0f;
    if (params.gradient != nullptr && params.partial_stats_out == nullptr)
      write_zeros<kRowThreads>(slice.y, slice.n + slice.padding);
    return;
  }
  // One thread asserts: 512 would print 512 messages.
  assert((!is_leader || (target >= 0 && target < params.total_classes)) && "cross_entropy: a target is out of bounds");

  const int64_t target_column = target - params.first_class - at_most(rank * launch.slice, params.num_classes);
  const int column = target_column >= 0 && target_column < slice.n ? static_cast<int>(target_column) : -1;
  const bool owns_target = column >= 0;
  const T target_value = owns_target ? slice.x[column] : from_float<T>(0.0f);
  const float target_weight = owns_target ? slice.class_weight(column) : 0.0f;
  PartialStats whole;
  if (params.partial_stats != nullptr) {
    whole = merge_partial_stats<kSmoothing>(params, row);
    RowGroup<kRowThreads>::sync();  // or a thread could read its target logit after the gradient has replaced it
  } else {
    whole = {merge_over_row_group<kSmoothing, kRowThreads>(slice.read()),
             owns_target ? slice.logit(target_value).x : 0.0f, target_weight};
    if (clustered) whole = merge_over_cluster<kSmoothing>(whole, launch.cluster);
  }
  if (params.partial_stats_out != nullptr) {
    if (is_leader) params.partial_stats_out[row] = whole;
    return;
  }

  const RowStats stats = row_stats<kSmoothing>(whole, params, row_scale(params, row));
  if (is_leader) params.losses[row] = stats.loss;
  if (params.gradient == nullptr) return;
  const T dtarget = from_float<T>(target_gradient<kSmoothing>(slice.logit(target_value), target_weight, stats));
  slice.write(stats);
  RowGroup<kRowThreads>::sync();  // or the thread that writes the target's column could overwrite this gradient
  if (owns_target && RowGroup<kRowThreads>::thread() == 0) slice.y[column] = dtarget;
  if (clustered) leave_cluster();
}

// No block for each row: where every factor is 1 these would take longer to launch than to find that out.
template <class T>
__global__ void __launch_bounds__(kLongRowThreads) scale_rows_kernel(ScaleRowsParams params) {
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    const float scale = params.scale[row * params.scale_stride];
    if (scale == 1.0f && params.scale_stride == 0) return;
    if (scale == 1.0f) continue;
    T* x = static_cast<T*>(params.input) + row * params.stride;
    const auto scaled = [&](T value) { return from_float<T>(to_float(value) * scale); };
    for_own_elements<kLongRowThreads, kMaxInFlight>(
        AlignedSpan<T>(x, params.columns),
        [&](auto batch) {
          AlignedVector<T> vectors[kMaxInFlight];
          batch.for_each([&](int k, int i) { vectors[k] = load(x + i); });
          batch.for_each([&](int k, int i) {
            store_to_global(x + i, AlignedVector<T>::generate([&](int e) { return scaled(vectors[k][e]); }));
          });
        },
        [&](int i) { x[i] = scaled(x[i]); });
  }
}

struct GridShape {
  int64_t blocks;
  int threads;
  int cluster;
  int64_t shared_bytes;
};

template <class... Parameters, class... Arguments>
cudaError_t start(void (*kernel)(Parameters...), const GridShape& grid, cudaStream_t stream,
                  const Arguments&... arguments) {
  if (grid.blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;  // CUDA would take its lower 32 bits
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
cudaError_t launch_kernel(const CrossEntropyParams& params, const Launch& launch, const Chip& chip,
                          cudaStream_t stream) {
  const auto kernel = cross_entropy_kernel<T, kSoftcap, kSmoothing, kRowThreads>;
  if (launch.staged > 0) {
    // Always the maximum: another host thread could set a smaller limit between this call and its launch.
    const int most = static_cast<int>(chip.shared_per_block - kStaticBytes);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
  }
  const int64_t groups = (params.rows + launch.rows_per_block - 1) / launch.rows_per_block;
  const GridShape grid = {.blocks = groups * launch.cluster,
                          .threads = kBlockThreads<kRowThreads>,
                          .cluster = launch.cluster,
                          .shared_bytes = launch.rows_per_block * launch.row_bytes};
  return start(kernel, grid, stream, params, launch);
}

template <class T, bool kSoftcap, bool kSmoothing>
cudaError_t launch_for_length(const CrossEntropyParams& params, const Chip& chip, cudaStream_t stream) {
  const bool read_twice =
      params.gradient != nullptr && params.partial_stats_out == nullptr && params.partial_stats == nullptr;
  const Launch launch = choose_launch(params.num_classes, sizeof(T), read_twice, chip);
  switch (launch.row_threads) {
    case kShortRowThreads:
      return launch_kernel<T, kSoftcap, kSmoothing, kShortRowThreads>(params, launch, chip, stream);
    case kMediumRowThreads:
      return launch_kernel<T, kSoftcap, kSmoothing, kMediumRowThreads>(params, launch, chip, stream);
    default:
      return launch_kernel<T, kSoftcap, kSmoothing, kLongRowThreads>(params, launch, chip, stream);
  }
}

cudaError_t current_chip(Chip* chip) {
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
cudaError_t launch(const CrossEntropyParams& params, cudaStream_t stream) {
  Chip chip;
  const cudaError_t error = current_chip(&chip);
  if (error != cudaSuccess) return error;
  if (params.softcap != 0.0f) {
    return params.label_smoothing != 0.0f ? launch_for_length<T, true, true>(params, chip, stream)
                                          : launch_for_length<T, true, false>(params, chip, stream);
  }
  return params.label_smoothing != 0.0f ? launch_for_length<T, false, true>(params, chip, stream)
                                        : launch_for_length<T, false, false>(params, chip, stream);
}

template <class T>
cudaError_t launch(const ScaleRowsParams& params, cudaStream_t stream) {
  const GridShape grid = {
      .blocks = smaller(params.rows, kScaleBlocks), .threads = kLongRowThreads, .cluster = 1, .shared_bytes = 0};
  return start(scale_rows_kernel<T>, grid, stream, params);
}

template <class Params>
cudaError_t launch_for_dtype(const Params& params, void* stream) {
  if (params.columns > kMaxColumns) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::kFloat16:
      return launch<__half>(params, on);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(params, on);
    default:
      return launch<float>(params, on);
  }
}

}  // namespace

int cross_entropy_cuda(const CrossEntropyParams& params, void* stream) { return launch_for_dtype(params, stream); }
int scale_rows_cuda(const ScaleRowsParams& params, void* stream) { return launch_for_dtype(params, stream); }

}  // namespace fastlm
