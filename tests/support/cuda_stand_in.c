// Stands in for libcuda.so.1, the driver's library: checks what Triton asks of the driver, and runs nothing.
//
// The driver's own rules: CUDA C++ programming guide, table "Technical Specifications per Compute Capability", and the
// CUDA driver API's pages of cuLaunchKernelEx and cuTensorMapEncodeTiled. What breaks one gets the driver's error code,
// and its sentence is what cuGetErrorString then gives, so that Triton raises it.
//
// A device is its architecture: device 90 is of sm_90, and so is the context of that number. Addresses from 2^46 on are
// the host's, unless stand_in_takes_host_memory is set. What the last launch was is kept in stand_in_last.
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#define DEFAULT_SHARED 49152  // bytes of dynamic shared memory that a launch may ask for without cuFuncSetAttribute
#define HOST_MEMORY ((CUdeviceptr)1 << 46)

long stand_in_launches = 0;
long stand_in_tensor_maps = 0;
int stand_in_takes_host_memory = 0;
char stand_in_violation[512] = "";  // the last

// The last launch. How many bytes each parameter has a driver knows from the kernel; here the caller says it, 0 at the
// end, or nothing is kept of them.
int stand_in_parameter_bytes[512] = {0};
struct {
  uint64_t function, stream;
  uint32_t grid[3], block[3], shared, attributes;
  uint32_t num_bytes;
  unsigned char parameters[8192];
} stand_in_last;

struct CUfunc_st {
  int dynamic_shared;  // bytes that it may be launched with
  int large_clusters;
};

static uintptr_t context = 0;  // of the device of that number, or 0 for none

static CUresult violation(CUresult code, const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(stand_in_violation, sizeof stand_in_violation, format, values);
  va_end(values);
  return code;
}

#define REQUIRE(condition, code, ...) \
  if (!(condition)) return violation(code, __VA_ARGS__)

// "Maximum amount of shared memory per thread block", in bytes; 0 for an architecture that is not in the table.
static int most_shared(int arch) {
  static const struct {
    int arch, kib;
  } table[] = {
      {75, 64}, {80, 163}, {86, 99}, {87, 163}, {89, 99}, {90, 227}, {100, 227}, {103, 227}, {120, 99},
  };
  for (size_t i = 0; i < sizeof table / sizeof *table; ++i)
    if (table[i].arch == arch) return 1024 * table[i].kib;
  return 0;
}

CUresult cuGetErrorString(CUresult code, const char** text) {
  *text = code ? stand_in_violation : "no error";
  return CUDA_SUCCESS;
}

// Devices and contexts

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  REQUIRE(most_shared(ordinal), CUDA_ERROR_INVALID_DEVICE, "there is no device %d", ordinal);
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = most_shared(device);
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = most_shared(device) + 1024;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    default:
      *value = 1;  // clock rates and the like, which no launch depends on
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* found, CUdevice device) {
  *found = (CUcontext)(uintptr_t)device;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* found) {
  *found = (CUcontext)context;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext chosen) {
  context = (uintptr_t)chosen;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  REQUIRE(address < HOST_MEMORY || stand_in_takes_host_memory, CUDA_ERROR_INVALID_VALUE, "the address %p is the host's",
          (void*)address);
  *(CUdeviceptr*)value = address;
  return CUDA_SUCCESS;
}

// Modules and functions. One is never unloaded, as Triton's are not.

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  REQUIRE(context, CUDA_ERROR_INVALID_CONTEXT, "a module is loaded without a context");
  REQUIRE(image, CUDA_ERROR_INVALID_VALUE, "a module is loaded from no image");
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  REQUIRE(module && *name, CUDA_ERROR_INVALID_VALUE, "a function is asked of no module, or has no name");
  *function = calloc(1, sizeof **function);
  (*function)->dynamic_shared = DEFAULT_SHARED;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  REQUIRE(function, CUDA_ERROR_INVALID_HANDLE, "an attribute is set of no function");
  if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED) function->large_clusters = value;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    int most = most_shared((int)context);
    REQUIRE(value >= 0 && value <= most, CUDA_ERROR_INVALID_VALUE,
            "%d bytes of dynamic shared memory are allowed to a function, a block of sm_%d has %d", value, (int)context,
            most);
    function->dynamic_shared = value;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int* number, CUfunction function, const CUlaunchConfig* config) {
  *number = 1;
  return CUDA_SUCCESS;
}

// Launches

static CUresult check_cluster(const CUlaunchConfig* config, const CUlaunchAttribute* attribute, CUfunction function) {
  if (attribute->id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) return CUDA_SUCCESS;
  unsigned x = attribute->value.clusterDim.x, y = attribute->value.clusterDim.y, z = attribute->value.clusterDim.z;
  unsigned most = function->large_clusters ? 16 : 8;
  REQUIRE(context >= 90, CUDA_ERROR_NOT_SUPPORTED, "sm_%d has no clusters", (int)context);
  REQUIRE(x >= 1 && y >= 1 && z >= 1 && x * y * z <= most, CUDA_ERROR_INVALID_CLUSTER_SIZE,
          "a cluster has %u x %u x %u blocks, at most %u are allowed", x, y, z, most);
  REQUIRE(config->gridDimX % x == 0 && config->gridDimY % y == 0 && config->gridDimZ % z == 0, CUDA_ERROR_INVALID_VALUE,
          "a grid of %u x %u x %u blocks is no multiple of a cluster of %u x %u x %u", config->gridDimX,
          config->gridDimY, config->gridDimZ, x, y, z);
  return CUDA_SUCCESS;
}

static void keep(const CUlaunchConfig* config, CUfunction function, void** params) {
  memset(&stand_in_last, 0, sizeof stand_in_last);
  stand_in_last.function = (uintptr_t)function;
  stand_in_last.stream = (uintptr_t)config->hStream;
  uint32_t grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  uint32_t block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  memcpy(stand_in_last.grid, grid, sizeof grid);
  memcpy(stand_in_last.block, block, sizeof block);
  stand_in_last.shared = config->sharedMemBytes;
  stand_in_last.attributes = config->numAttrs;
  for (int i = 0; stand_in_parameter_bytes[i]; ++i) {
    int bytes = stand_in_parameter_bytes[i];
    if (stand_in_last.num_bytes + bytes > sizeof stand_in_last.parameters) break;
    memcpy(stand_in_last.parameters + stand_in_last.num_bytes, params[i], bytes);
    stand_in_last.num_bytes += bytes;
  }
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params, void** extra) {
  REQUIRE(context, CUDA_ERROR_INVALID_CONTEXT, "a launch without a context");
  REQUIRE(function, CUDA_ERROR_INVALID_HANDLE, "a launch of no function");
  REQUIRE(config, CUDA_ERROR_INVALID_VALUE, "a launch without a configuration");
  // A null stream is the default one; any other is a handle, which nothing here has made.
  REQUIRE(!config->hStream, CUDA_ERROR_INVALID_HANDLE, "a launch on the stream %p, which does not exist",
          (void*)config->hStream);
  REQUIRE(config->gridDimX >= 1 && config->gridDimX <= 2147483647, CUDA_ERROR_INVALID_VALUE,
          "grid x is %u, expected 1 to 2147483647", config->gridDimX);
  REQUIRE(config->gridDimY >= 1 && config->gridDimY <= 65535, CUDA_ERROR_INVALID_VALUE,
          "grid y is %u, expected 1 to 65535", config->gridDimY);
  REQUIRE(config->gridDimZ >= 1 && config->gridDimZ <= 65535, CUDA_ERROR_INVALID_VALUE,
          "grid z is %u, expected 1 to 65535", config->gridDimZ);
  unsigned x = config->blockDimX, y = config->blockDimY, z = config->blockDimZ;
  REQUIRE(x >= 1 && x <= 1024 && y >= 1 && y <= 1024 && z >= 1 && z <= 64 && x * y * z <= 1024,
          CUDA_ERROR_INVALID_VALUE, "a block has %u x %u x %u threads, expected 1 to 1024, and z at most 64", x, y, z);
  unsigned most = (unsigned)most_shared((int)context);
  REQUIRE(config->sharedMemBytes <= most, CUDA_ERROR_INVALID_VALUE,
          "%u bytes of shared memory, a block of sm_%d has %u", config->sharedMemBytes, (int)context, most);
  REQUIRE(config->sharedMemBytes <= (unsigned)function->dynamic_shared, CUDA_ERROR_INVALID_VALUE,
          "%u bytes of dynamic shared memory, the function is allowed %d", config->sharedMemBytes,
          function->dynamic_shared);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    CUresult code = check_cluster(config, &config->attrs[i], function);
    if (code) return code;
  }
  ++stand_in_launches;
  keep(config, function, params);
  return CUDA_SUCCESS;
}

// Tensor maps, without interleaving, which Triton never asks for

static int bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 4;
  }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
#define REQUIRE_OF_MAP(condition, ...) REQUIRE(condition, CUDA_ERROR_INVALID_VALUE, "tensor map: " __VA_ARGS__)
  REQUIRE_OF_MAP((uintptr_t)map % 64 == 0, "it is at %p, expected a multiple of 64", (void*)map);
  REQUIRE_OF_MAP(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE, "it is interleaved, which is not checked here");
  REQUIRE_OF_MAP(rank >= 1 && rank <= 5, "rank %u, expected 1 to 5", rank);
  REQUIRE_OF_MAP((uintptr_t)address % 16 == 0, "base address %p, expected a multiple of 16", address);
  for (cuuint32_t i = 0; i < rank; ++i) {
    REQUIRE_OF_MAP(dims[i] >= 1 && dims[i] <= (cuuint64_t)1 << 32, "size %llu of dimension %u, expected 1 to 2^32",
                   (unsigned long long)dims[i], i);
    REQUIRE_OF_MAP(box[i] >= 1 && box[i] <= 256, "box of %u in dimension %u, expected 1 to 256", box[i], i);
    REQUIRE_OF_MAP(element_strides[i] >= 1 && element_strides[i] <= 8,
                   "element stride %u of dimension %u, expected 1 to 8", element_strides[i], i);
  }
  for (cuuint32_t i = 0; i + 1 < rank; ++i)
    REQUIRE_OF_MAP(strides[i] % 16 == 0 && strides[i] < (cuuint64_t)1 << 40,
                   "stride of %llu bytes of dimension %u, expected a multiple of 16 below 2^40",
                   (unsigned long long)strides[i], i + 1);
  unsigned inner = box[0] * bytes_of(type), span = swizzle ? 16u << swizzle : 0;
  if (span > 128) span = 128;  // what follows are 128-byte swizzles of other atoms
  REQUIRE_OF_MAP(inner % 16 == 0, "a box's inner dimension has %u bytes, expected a multiple of 16", inner);
  REQUIRE_OF_MAP(!swizzle || inner <= span, "a box's inner dimension has %u bytes, the swizzle %u", inner, span);
  ++stand_in_tensor_maps;
  memset(map, 0, sizeof *map);  // a digest of what it was made of, for stand_in_last
  cuuint64_t* words = (cuuint64_t*)map;
  words[0] = (uintptr_t)address;
  for (cuuint32_t i = 0; i < rank; ++i) {
    words[1 + i] = dims[i];
    words[6 + i] = box[i] | (i + 1 < rank ? strides[i] << 16 : 0);
  }
  words[11] = type | (cuuint64_t)swizzle << 32;
  return CUDA_SUCCESS;
}
