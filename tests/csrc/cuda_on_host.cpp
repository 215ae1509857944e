// Runs csrc/cross_entropy_cuda.cu where there is no GPU, and compares it with plain loops in double.
//
// A block is an OS thread, whose thread_local variables are its shared memory; its threads are fibers, which give way
// at barriers only, the first or the last of them first: where one is missing, something is read too early or too late.
// Once a row is staged its logits are overwritten with NaN, as is all that surrounds rows: a second read of them shows.
// A barrier that not all threads reach ends in SIGALRM. -fsanitize=alignment stands in for a GPU's misaligned address.
#include <atomic>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <type_traits>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

#include "../../csrc/cross_entropy.h"
#include "../../csrc/cross_entropy_launch.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))

namespace fastlm {
namespace {
thread_local __align__(16) unsigned char shared_rows[1 << 18];
}
}  // namespace fastlm

namespace fastlm::host {

struct Barrier {
  int waiting = 0, generation = 0;
};

constexpr size_t kStackBytes = 1 << 15, kBeyond = 1 << 10;

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started = false, done = false;
  int cluster_generation = -1;                           // of the barrier it has arrived at and not waited for
  std::unique_ptr<char[]> stack{new char[kStackBytes]};  // not a vector, which would touch it all
};

struct Cluster {
  std::atomic<int> arrived{0}, generation{0};
  int threads;
  std::vector<unsigned char*> shared;
};

struct Block {
  std::vector<Fiber> fibers;
  Barrier all, warps[32];
  float lanes[32][32];
  bool forgotten[32];
  jmp_buf scheduler;
  Cluster* cluster;
  unsigned rank;
  std::function<void()> kernel;
};
thread_local Block* block;

}  // namespace fastlm::host

struct Index {
  unsigned x;
};
thread_local Index threadIdx, blockIdx, gridDim;

namespace fastlm::host {

void give_way() {
  if (!_setjmp(block->fibers[threadIdx.x].at)) _longjmp(block->scheduler, 1);
}

// The thread that arrives last calls then() before all go on.
template <class Then>
void wait(Barrier& barrier, int threads, Then then) {
  const int generation = barrier.generation;
  if (++barrier.waiting < threads) {
    while (barrier.generation == generation) give_way();
    return;
  }
  then();
  barrier.waiting = 0;
  ++barrier.generation;
}

Barrier& warp_barrier() { return block->warps[threadIdx.x / 32]; }

float exchanged(float value, unsigned lane) {
  float* lanes = block->lanes[threadIdx.x / 32];
  lanes[threadIdx.x % 32] = value;
  wait(warp_barrier(), 32, [] {});
  const float result = lane < 32 ? lanes[lane] : value;
  wait(warp_barrier(), 32, [] {});
  return result;
}

void run_fiber() {
  block->kernel();
  block->fibers[threadIdx.x].done = true;
  if (block->fibers[threadIdx.x].cluster_generation >= 0) std::abort();  // it left others who still read its memory
  _longjmp(block->scheduler, 1);
}

void resume(unsigned thread) {
  Fiber& fiber = block->fibers[thread];
  if (fiber.done) return;
  threadIdx.x = thread;
  if (_setjmp(block->scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack = {fiber.stack.get(), 0, kStackBytes};
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

bool last_first = false;  // order of threads and blocks
size_t used_shared;

void run_block(Block& own, unsigned number) {
  block = &own;
  blockIdx.x = number;
  std::memset(shared_rows, 0xFF, used_shared + kBeyond);
  std::memset(own.forgotten, 0, sizeof own.forgotten);
  for (Fiber& fiber : own.fibers) fiber.started = fiber.done = false;
  const unsigned threads = own.fibers.size();
  for (bool done = false; !done;) {
    done = true;
    for (unsigned k = 0; k < threads; ++k) resume(last_first ? threads - 1 - k : k);
    for (Fiber& fiber : own.fibers) done = done && fiber.done;
    if (own.cluster->shared.size() > 1) std::this_thread::yield();
  }
  for (size_t i = used_shared; i < used_shared + kBeyond; ++i)
    if (shared_rows[i] != 0xFF) std::printf("shared memory is written beyond %zu bytes\n", used_shared), std::exit(1);
}

void run_grid(unsigned blocks, unsigned threads, unsigned cluster_size, const std::function<void()>& kernel) {
  Cluster cluster;
  cluster.threads = threads * cluster_size;
  cluster.shared.resize(cluster_size);
  std::atomic<unsigned> ready{0};
  const auto run = [&](unsigned rank) {
    Block own;
    own.fibers.resize(threads);
    own.cluster = &cluster;
    own.rank = rank;
    own.kernel = kernel;
    cluster.shared[rank] = shared_rows;
    gridDim.x = blocks;
    for (++ready; ready < cluster_size;) std::this_thread::yield();
    for (unsigned k = 0; k < blocks / cluster_size; ++k)
      run_block(own, (last_first ? blocks / cluster_size - 1 - k : k) * cluster_size + rank);
  };
  std::vector<std::thread> ranks;
  for (unsigned rank = 0; rank < cluster_size; ++rank) ranks.emplace_back(run, rank);
  for (std::thread& rank : ranks) rank.join();
}

// The call whose kernel runs.
CrossEntropyParams current;
Launch layout;
int largest_cluster = 0, partly_staged = 0;

void note(const CrossEntropyParams& of, const Launch& with) {
  current = of, layout = with;
  largest_cluster = largest_cluster > with.cluster ? largest_cluster : with.cluster;
  partly_staged += with.staged > 0 && with.staged < with.slice;
}
void note(const ScaleRowsParams&) { layout.staged = 0; }

// Once a barrier says that the group's slice is staged, its logits in global memory are needed no more.
void forget_staged(int group) {
  if (layout.staged == 0 || block->forgotten[group]) return;
  block->forgotten[group] = true;
  const int64_t size = current.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t row = current.rows - 1 - (blockIdx.x / layout.cluster * layout.rows_per_block + group);
  const int64_t begin = smaller(block->rank * layout.slice, current.num_classes);
  const int64_t n = smaller(layout.slice, current.num_classes - begin);
  auto* x = static_cast<unsigned char*>(const_cast<void*>(current.input)) + (row * current.input_stride + begin) * size;
  // Where only a part is staged, a piece of the gradient may lie astride of its end, and is then read again.
  const int64_t staged = layout.staged - (reinterpret_cast<uintptr_t>(x) % 16 + 16) / size;
  std::memset(x, 0xFF, (layout.staged >= n ? n : staged < 0 ? 0 : staged) * size);
}

}  // namespace fastlm::host

using namespace fastlm;
using namespace fastlm::host;

void __syncthreads() {
  wait(block->all, block->fibers.size(), [] { forget_staged(0); });
}
void __syncwarp() {
  wait(warp_barrier(), 32, [] { forget_staged(threadIdx.x / 32); });
}
float __shfl_sync(unsigned, float value, int lane) { return exchanged(value, lane); }
float __shfl_down_sync(unsigned, float value, int by) { return exchanged(value, threadIdx.x % 32 + by); }

namespace cooperative_groups {

struct ClusterGroup {
  void barrier_arrive() const {
    Cluster& cluster = *block->cluster;
    block->fibers[threadIdx.x].cluster_generation = cluster.generation;
    if (++cluster.arrived < cluster.threads) return;
    cluster.arrived = 0;
    ++cluster.generation;
  }
  void barrier_wait() const {
    int& generation = block->fibers[threadIdx.x].cluster_generation;
    while (block->cluster->generation == generation) give_way();
    generation = -1;
  }
  void sync() const { barrier_arrive(), barrier_wait(); }
  // Thread-local variables lie equally far from each other in all threads.
  template <class T>
  T* map_shared_rank(T* own, int rank) const {
    return reinterpret_cast<T*>(block->cluster->shared[rank] + (reinterpret_cast<unsigned char*>(own) - shared_rows));
  }
};
ClusterGroup this_cluster() { return {}; }

}  // namespace cooperative_groups

struct __half {
  _Float16 value;
};
float __half2float(__half x) { return x.value; }
__half __float2half(float x) { return {static_cast<_Float16>(x)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
__nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {static_cast<uint16_t>(x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
void __stwb(uint4* address, uint4 value) { *address = value; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeNone, cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

Chip chip;
size_t granted_shared;

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int64_t values[] = {chip.shared_per_block, chip.shared_per_multiprocessor, chip.major};
  return *value = static_cast<int>(values[attribute]), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return granted_shared = bytes, cudaSuccess;
}
template <class Kernel, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, Arguments... arguments) {
  if (config->dynamicSmemBytes > granted_shared) return cudaErrorInvalidValue;
  const unsigned cluster = config->numAttrs > 0 ? config->attrs->val.clusterDim.x : 1;
  if (config->gridDim.x % cluster != 0 || (cluster > 1 && chip.major < 9)) return cudaErrorInvalidConfiguration;
  note(arguments...);
  used_shared = config->dynamicSmemBytes;
  run_grid(config->gridDim.x, config->blockDim.x, cluster, [&] { kernel(arguments...); });
  return cudaSuccess;
}

#include "../../csrc/cross_entropy_cuda.cu"

namespace {

template <class T>
constexpr bool kIsHalf = std::is_same_v<T, __half>;
template <class T>
constexpr DType kDType = sizeof(T) == 4 ? DType::kFloat32
                         : kIsHalf<T>   ? DType::kFloat16
                                        : DType::kBFloat16;
template <class T>
constexpr double kRounding = sizeof(T) == 4 ? 0x1p-20
                             : kIsHalf<T>   ? 0x1p-10
                                            : 0x1p-7;

std::mt19937 generator(1);
int64_t any(int64_t from, int64_t to) { return std::uniform_int_distribution<int64_t>(from, to)(generator); }
bool chance(double p) { return std::bernoulli_distribution(p)(generator); }
double normal() { return std::normal_distribution<double>()(generator); }

// Rows of a matrix, at any distance from alignment and from each other.
template <class T>
struct Rows {
  int64_t offset = any(0, 9), stride;
  std::vector<unsigned char> bytes;
  Rows(int64_t rows, int64_t columns, int filler) : stride(columns + (chance(0.5) ? 0 : any(1, 9))) {
    bytes.assign((rows * stride + 24) * sizeof(T), filler);
  }
  T* data() { return reinterpret_cast<T*>(bytes.data() + (-reinterpret_cast<uintptr_t>(bytes.data()) & 15)) + offset; }
  T* row(int64_t i) { return data() + i * stride; }
};

struct Outcome {
  std::vector<float> losses;
  std::vector<unsigned char> gradient;
  bool operator==(const Outcome& other) const {
    return std::memcmp(losses.data(), other.losses.data(), losses.size() * 4) == 0 && gradient == other.gradient;
  }
};

enum Mode { kGradient, kInPlace, kLosses, kShards, kShardsInPlace, kShardLosses };

[[noreturn]] void fail(const CrossEntropyParams& call, int mode, const char* what, int64_t row = 0, int64_t column = 0,
                       double got = 0, double want = 0) {
  std::printf("%s at row %ld, column %ld: %g, expected %g; ", what, row, column, got, want);
  std::printf("mode %d, dtype %d, %ld classes in %ld columns, %ld rows, smoothing %g, softcap %g, weight %d, ", mode,
              static_cast<int>(call.dtype), call.num_classes, call.columns, call.rows, call.label_smoothing,
              call.softcap, call.weight != nullptr);
  std::printf("shared memory %ld, sm_%d0, cluster %d, staged %ld\n", chip.shared_per_multiprocessor, chip.major,
              layout.cluster, layout.staged);
  std::exit(1);
}

void run(const CrossEntropyParams& call) {
  if (cross_entropy_cuda(call, nullptr) != cudaSuccess) fail(call, -1, "refused");
}

// The same as `run`, of shards of the columns: first their parts, then, with these given, losses and gradient.
template <class T>
void run_sharded(const CrossEntropyParams& whole, const std::vector<int64_t>& cuts) {
  const int64_t shards = cuts.size() - 1;
  std::vector<PartialStats> parts(shards * whole.rows);
  for (const bool finishing : {false, true}) {
    for (int64_t s = 0; s < shards; ++s) {
      CrossEntropyParams shard = whole;
      shard.first_class = cuts[s];
      shard.num_classes = cuts[s + 1] - cuts[s];
      shard.columns = s + 1 == shards ? whole.columns - cuts[s] : shard.num_classes;
      shard.input = static_cast<const T*>(whole.input) + cuts[s];
      if (whole.weight != nullptr) shard.weight = whole.weight + cuts[s];
      if (whole.gradient != nullptr) shard.gradient = static_cast<T*>(whole.gradient) + cuts[s];
      if (finishing) shard.partial_stats = parts.data(), shard.num_partial_stats = shards;
      if (!finishing) shard.partial_stats_out = parts.data() + s * whole.rows;
      run(shard);
    }
  }
}

template <class T>
void check_values(const CrossEntropyParams& call, int mode, Rows<T>& x, Rows<T>& y, const Outcome& outcome) {
  for (int64_t row = 0; row < call.rows; ++row) {
    std::vector<double> logits(call.num_classes), slopes(call.num_classes, 1.0);
    double max = -INFINITY, sum = 0, weights = 0, weighted = 0;
    for (int64_t c = 0; c < call.num_classes; ++c) {
      logits[c] = to_float(x.row(row)[c]);
      if (call.softcap != 0) logits[c] = call.softcap * std::tanh(logits[c] / call.softcap);
      if (call.softcap != 0) slopes[c] = 1 - std::pow(logits[c] / call.softcap, 2);
      max = std::fmax(max, logits[c]);
    }
    const auto weight = [&](int64_t c) { return call.weight == nullptr ? 1.0 : call.weight[c]; };
    for (const double logit : logits) sum += std::exp(logit - max);
    const double lse = max + std::log(sum);
    for (int64_t c = 0; c < call.num_classes; ++c) weights += weight(c), weighted += weight(c) * (lse - logits[c]);
    const int64_t target = call.target[row];
    const bool is_valid = target != call.ignore_index;
    const double a = is_valid ? (1.0 - call.label_smoothing) * weight(target) : 0;
    const double b = double(call.label_smoothing) / call.total_classes;
    double loss = is_valid ? a * (lse - logits[target]) + call.z_loss * lse * lse : 0;
    if (is_valid && b != 0) loss += b * weighted;
    const auto compare = [&](const char* what, int64_t column, double got, double want, double tolerance) {
      const bool same = got == want || std::fabs(got - want) <= tolerance || (std::isnan(got) && std::isnan(want));
      if (!same) fail(call, mode, what, row, column, got, want);
    };
    compare("loss", -1, outcome.losses[row], loss, 2e-5 * (1 + std::fabs(loss)));
    if (call.gradient == nullptr) continue;
    const double scale = call.scale == nullptr ? 1 : call.scale[row * call.scale_stride];
    const int64_t begin = reinterpret_cast<unsigned char*>(y.row(row)) - y.bytes.data();
    const T* got = reinterpret_cast<const T*>(outcome.gradient.data() + begin);
    for (int64_t c = 0; c < call.columns; ++c) {
      double want = 0, size = 0;
      if (is_valid && c < call.num_classes) {
        const double t = a + b * weights + 2 * call.z_loss * lse, p = std::exp(logits[c] - lse) * t;
        want = (p - (b == 0 ? 0 : b * weight(c)) - (c == target) * a) * scale * slopes[c];
        size = std::fabs(p * scale) + std::fabs(want);
      }
      const double smallest = sizeof(T) == 4 ? 0 : 6e-8;  // of float16
      compare("gradient", c, to_float(got[c]), want, kRounding<T> * std::fabs(want) + 2e-5 * size + smallest);
    }
  }
}

template <class T>
void check(int64_t classes, int64_t rows, Mode mode, bool special) {
  CrossEntropyParams call = {};
  const bool in_place = mode == kInPlace || mode == kShardsInPlace;
  const bool sharded = mode >= kShards;
  call.dtype = kDType<T>;
  call.rows = rows;
  call.num_classes = call.total_classes = classes;
  call.columns = classes + (chance(0.5) ? 0 : any(1, 40));
  call.ignore_index = -100;
  if (chance(0.4)) call.label_smoothing = 0.1f;
  if (chance(0.4)) call.softcap = 5.0f;
  if (chance(0.4)) call.z_loss = 0.01f;
  Rows<T> x(rows, call.columns, 0xFF), y(rows, call.columns, 0xAB);
  const int64_t finite = special ? classes * 2 / 3 : 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < classes; ++c) x.row(i)[c] = from_float<T>(c < finite ? -INFINITY : 2 * normal());
  if (special) x.row(rows / 2)[classes - 1] = from_float<T>(NAN);
  std::vector<int64_t> targets(rows);
  for (int64_t& target : targets) target = chance(0.2) ? -100 : chance(0.3) ? classes - 1 : any(finite, classes - 1);
  std::vector<float> weight(classes), scale(rows);
  for (float& w : weight) w = 0.5f + any(0, 3);
  for (float& s : scale) s = any(1, 4) * 0.5f;
  call.target = targets.data();
  if (chance(0.5)) call.weight = weight.data();
  if (chance(0.6)) call.scale = scale.data(), call.scale_stride = any(0, 1);
  const std::vector<int64_t> cuts = {0, any(0, classes), classes};
  Outcome outcomes[2];
  for (const bool order : {false, true}) {
    last_first = order;
    Rows<T> input = x, gradient = y;
    Rows<T>& written = in_place ? input : gradient;
    call.input = input.data(), call.input_stride = input.stride;
    if (mode != kLosses && mode != kShardLosses) call.gradient = written.data(), call.gradient_stride = written.stride;
    outcomes[order].losses.assign(rows, 1e30f);
    call.losses = outcomes[order].losses.data();
    sharded ? run_sharded<T>(call, cuts) : run(call);
    outcomes[order].gradient = written.bytes;
    if (call.gradient == nullptr) continue;
    const int filler = in_place ? 0xFF : 0xAB;
    for (int64_t i = 0; i < rows; ++i)
      std::memset(static_cast<void*>(written.row(i)), filler, call.columns * sizeof(T));
    for (const unsigned char byte : written.bytes)
      if (byte != filler) fail(call, mode, "a byte outside the rows is written");
  }
  if (!(outcomes[0] == outcomes[1])) fail(call, mode, "other bits in another order of threads");
  check_values<T>(call, mode, x, in_place ? x : y, outcomes[0]);
}

template <class T>
void check_scale_rows(int64_t rows, int64_t columns, bool one_for_all) {
  Rows<T> x(rows, columns, 0xAB);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < columns; ++c) x.row(i)[c] = from_float<T>(normal());
  Rows<T> scaled = x;
  std::vector<float> scale(rows);
  for (int64_t i = 0; i < rows; ++i) scale[i] = one_for_all ? 0.5f * (columns % 3) : 0.5f * (1 + i % 3);
  const ScaleRowsParams call = {.dtype = kDType<T>,
                                .input = scaled.data(),
                                .stride = scaled.stride,
                                .scale = scale.data(),
                                .scale_stride = one_for_all ? 0 : 1,
                                .rows = rows,
                                .columns = columns};
  bool same = scale_rows_cuda(call, nullptr) == cudaSuccess;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < columns; ++c) x.row(i)[c] = from_float<T>(to_float(x.row(i)[c]) * scale[i]);
  if (!same || x.bytes != scaled.bytes) std::printf("scale_rows differs: %ld x %ld\n", rows, columns), std::exit(1);
}

template <class T>
void check_all() {
  const int64_t kib = 1024, size = sizeof(T);
  const int64_t lengths[] = {1,
                             2,
                             7,
                             63,
                             500,
                             4 * kib / size,
                             4 * kib / size + 1,
                             13 * kib / size + 5,
                             16 * kib / size + 1,
                             40 * kib / size + 3};
  for (const int64_t classes : lengths) {
    for (const int64_t shared : {14, 28, 228}) {
      for (const int major : {8, 9}) {
        const bool is_long = classes * size > 16 * kib;
        if (!is_long && (major == 9 || shared == 28)) continue;
        chip = {shared * kib - kib, shared * kib, major};
        for (const Mode mode : {kGradient, kInPlace, kLosses, kShards, kShardsInPlace, kShardLosses})
          check<T>(classes, is_long ? any(1, 2) : any(1, 19), mode, classes > 1 && chance(0.2));
      }
    }
    for (const bool one_for_all : {false, true}) check_scale_rows<T>(3, classes, one_for_all);
  }
}

// Of 7 classes.
void try_target(int64_t target) {
  float logits[7] = {}, loss;
  chip = {1 << 16, 1 << 16, 8};
  CrossEntropyParams call = {};
  call.input = logits, call.target = &target, call.losses = &loss;
  call.rows = 1, call.columns = call.num_classes = call.total_classes = 7, call.ignore_index = -100;
  run(call);
}

}  // namespace

int main(int, char** arguments) {
  alarm(250);
  if (arguments[1] != nullptr) return try_target(std::atoll(arguments[1])), 0;
  check_all<float>();
  check_all<__half>();
  check_all<__nv_bfloat16>();
  check_scale_rows<float>(kScaleBlocks + 3, 9, false);
  std::printf("largest cluster %d, %d launches staged in part\n", largest_cluster, partly_staged);
  return largest_cluster == kMaxCluster && partly_staged > 0 ? 0 : 1;
}
