// A libcuda.so.1 over host memory: context, memory, modules and launches. Kernels run under the emulation.
// Streams, events and copies are in fake_queue.cpp. What is not here is a missing symbol on purpose.
#include "fake.h"
#include "fake_memory.h"
#include "fake_stream.h"

#include <algorithm>
#include <atomic>
#include <sys/mman.h>
#include <unistd.h>

using namespace fake;

namespace {

bool g_ready = false;
int g_retained = 0;
int g_context = 0;
thread_local void* t_current = nullptr;

uint64_t context_bytes() { return setting("FAKE_CUDA_CONTEXT", 64ull << 20); }
int devices() { return int(setting("FAKE_CUDA_DEVICES", 1)); }
bool maps_host_memory() { return setting("FAKE_CUDA_MAPS", 1); }
int capability() { return int(setting("FAKE_CUDA_CAPABILITY", 80)); }

struct Module {
  std::string text;
};

struct Named {
  int result;
  const char *name, *text;
};
const Named NAMES[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {PRIMARY_CONTEXT_ACTIVE, "CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE", "the primary context is already active"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {SYSTEM_DRIVER_MISMATCH, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

const Named* named(int result) {
  auto found = std::find_if(std::begin(NAMES), std::end(NAMES), [&](const Named& n) { return n.result == result; });
  return found == std::end(NAMES) ? nullptr : found;
}

}  // namespace

bool fakeCudaHasContext() { return t_current == &g_context && g_retained > 0; }

void* fake::device_pointer(const void* at) {
  void* there = const_cast<void*>(at);
  if (!at || memory().device.holds(at, 1)) return there;
  void* host = reinterpret_cast<void*>(uint64_t(at) - MAPPED_AT);
  if (!memory().mapped.holds(host, 1)) die("a kernel is given an address outside of device memory");
  return host;
}

// Errors, device, context.

EXPORTED int cuGetErrorName(int result, const char** text) {
  const Named* found = named(result);
  *text = found ? found->name : nullptr;
  return found ? SUCCESS : INVALID_VALUE;
}
EXPORTED int cuGetErrorString(int result, const char** text) {
  const Named* found = named(result);
  *text = found ? found->text : nullptr;
  return found ? SUCCESS : INVALID_VALUE;
}
EXPORTED int cuInit(unsigned) {
  int told = int(setting("FAKE_CUDA_INIT", devices() > 0 ? SUCCESS : NO_DEVICE));
  g_ready = told == SUCCESS;
  return told;
}
EXPORTED int cuDriverGetVersion(int* version) {
  *version = int(setting("FAKE_CUDA_DRIVER", 13000));
  return SUCCESS;
}
EXPORTED int cuDeviceGetCount(int* count) {
  *count = devices();
  return g_ready ? SUCCESS : NOT_INITIALIZED;
}
EXPORTED int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  if (!g_ready) return NOT_INITIALIZED;
  return ordinal >= 0 && ordinal < devices() ? SUCCESS : INVALID_DEVICE;
}
EXPORTED int cuDeviceGetName(char* name, int length, int) {
  snprintf(name, length, "Emulated GPU");
  return SUCCESS;
}
EXPORTED int cuDeviceGetUuid(void* uuid, int device) {
  memset(uuid, 0x10 + device, 16);
  return SUCCESS;
}
EXPORTED int cuDeviceGetUuid_v2(void* uuid, int device) { return cuDeviceGetUuid(uuid, device); }
EXPORTED int cuDeviceGetPCIBusId(char* id, int length, int device) {
  snprintf(id, length, "0000:%02X:00.0", device + 1);
  return SUCCESS;
}
EXPORTED int cuDeviceTotalMem_v2(size_t* bytes, int) {
  *bytes = memory().total;
  return SUCCESS;
}
EXPORTED int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 1: *value = 1024; break;             // threads per block
    case 2: case 3: *value = 1024; break;     // block x, y
    case 4: *value = 64; break;               // block z
    case 5: *value = 2147483647; break;       // grid x
    case 6: case 7: *value = 65535; break;    // grid y, z
    case 8: *value = 48 * 1024; break;        // shared memory per block
    case 10: *value = 32; break;              // warp
    case 13: *value = 1500000; break;         // clock in kHz
    case 16: *value = 2; break;               // multiprocessors
    case 19: *value = maps_host_memory(); break;
    case 33: *value = 0; break;               // bus, device, domain
    case 34: *value = 0; break;
    case 50: *value = 0; break;
    case 36: *value = 1000000; break;         // memory clock in kHz
    case 37: *value = 256; break;             // memory bus width
    case 38: *value = 1 << 20; break;         // L2 bytes
    case 39: *value = 2048; break;            // threads per multiprocessor
    case 40: *value = 2; break;               // copy engines
    case 41: *value = 1; break;               // unified addressing
    case 75: *value = capability() / 10; break;
    case 76: *value = capability() % 10; break;
    case 81: *value = 64 * 1024; break;       // shared memory per multiprocessor
    case 97: *value = 48 * 1024; break;       // shared memory per block, opted in
    case 115: *value = 0; break;              // memory pools: plain allocation here
    default: *value = 0; break;
  }
  return SUCCESS;
}

EXPORTED int cuDevicePrimaryCtxRetain(void** context, int device) {
  if (!g_ready || device >= devices()) return g_ready ? INVALID_DEVICE : NOT_INITIALIZED;
  if (g_retained == 0 && !memory().reserve(context_bytes())) return OUT_OF_MEMORY;
  g_retained++;
  *context = &g_context;
  return SUCCESS;
}
EXPORTED int cuDevicePrimaryCtxRelease_v2(int) {
  if (g_retained == 0) return INVALID_CONTEXT;
  if (--g_retained == 0) memory().reserve(-int64_t(context_bytes()));
  return SUCCESS;
}
EXPORTED int cuDevicePrimaryCtxReset_v2(int) { return SUCCESS; }
/// As older drivers have it; newer ones take them.
EXPORTED int cuDevicePrimaryCtxSetFlags_v2(int, unsigned) { return g_retained ? PRIMARY_CONTEXT_ACTIVE : SUCCESS; }
EXPORTED int cuCtxGetCurrent(void** context) {
  *context = t_current;
  return SUCCESS;
}
EXPORTED int cuCtxSetCurrent(void* context) {
  t_current = context;
  return SUCCESS;
}
EXPORTED int cuCtxGetDevice(int* device) {
  *device = 0;
  return t_current ? SUCCESS : INVALID_CONTEXT;
}
EXPORTED int cuCtxGetLimit(size_t* value, int) {
  *value = 0;
  return SUCCESS;
}
EXPORTED int cuCtxSetLimit(int, size_t) { return SUCCESS; }
EXPORTED int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return SUCCESS;
}

// Memory.

EXPORTED int cuMemGetInfo_v2(size_t* free, size_t* total) {
  if (!fakeCudaHasContext()) return INVALID_CONTEXT;
  *total = memory().total;
  *free = memory().total - memory().used;
  return SUCCESS;
}
EXPORTED int cuMemAlloc_v2(uint64_t* at, size_t bytes) {
  if (!fakeCudaHasContext()) return INVALID_CONTEXT;
  if (bytes == 0) return INVALID_VALUE;
  if (fault()) return fault();
  *at = uint64_t(memory().allocate(bytes));
  return *at ? SUCCESS : OUT_OF_MEMORY;
}
EXPORTED int cuMemAllocAsync(uint64_t* at, size_t bytes, void*) { return cuMemAlloc_v2(at, bytes); }
EXPORTED int cuCtxSynchronize();
EXPORTED int cuMemFree_v2(uint64_t at) {
  if (!fakeCudaHasContext()) die("freeing device memory without its context");
  // As the driver does: nothing may still use it.
  cuCtxSynchronize();
  if (at && !memory().release(reinterpret_cast<void*>(at))) die("freeing device memory that is not allocated");
  return SUCCESS;
}
EXPORTED int cuMemFreeAsync(uint64_t at, void*) { return cuMemFree_v2(at); }

constexpr unsigned DEVICEMAP = 2;
static void add_pinned(void* at, size_t bytes, unsigned flags) {
  memory().pinned.add(at, bytes);
  if (flags & DEVICEMAP) memory().mapped.add(at, bytes);
}
static uint64_t remove_pinned(void* at) {
  memory().mapped.remove(at);
  return memory().pinned.remove(at);
}

EXPORTED int cuMemHostAlloc(void** at, size_t bytes, unsigned flags) {
  if (!memory().reserve_pinned(bytes)) return OUT_OF_MEMORY;
  *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (*at == MAP_FAILED) return OUT_OF_MEMORY;
  add_pinned(*at, bytes, flags);
  return SUCCESS;
}
EXPORTED int cuMemFreeHost(void* at) {
  cuCtxSynchronize();
  uint64_t bytes = remove_pinned(at);
  if (!bytes) die("freeing page-locked memory that is not allocated");
  munmap(at, bytes);
  memory().reserve_pinned(-int64_t(bytes));
  return SUCCESS;
}
#ifndef WITHOUT_HOST_REGISTER
EXPORTED int cuMemHostRegister_v2(void* at, size_t bytes, unsigned flags) {
  if (!fakeCudaHasContext()) return INVALID_CONTEXT;
  if (bytes == 0) return INVALID_VALUE;
  if (memory().pinned.overlaps(at, bytes)) return ALREADY_REGISTERED;
  if (!memory().reserve_pinned(bytes)) return OUT_OF_MEMORY;
  add_pinned(at, bytes, flags);
  fakeCudaCount("page locks", 1);
  return SUCCESS;
}
#endif
EXPORTED int cuMemHostUnregister(void* at) {
  if (!fakeCudaHasContext()) die("giving back page-locked memory without its context");
  cuCtxSynchronize();
  uint64_t bytes = remove_pinned(at);
  memory().reserve_pinned(-int64_t(bytes));
  uintptr_t page = uintptr_t(at) / 4096 * 4096;
  if (bytes && msync(reinterpret_cast<void*>(page), uintptr_t(at) + bytes - page, MS_ASYNC)) {
    die("page-locked memory was unmapped before it was given back");
  }
  return bytes ? SUCCESS : NOT_REGISTERED;
}
/// As it is said to be, not as one address space makes it: only what was asked for is mapped, and elsewhere than on the
/// host.
EXPORTED int cuMemHostGetDevicePointer_v2(uint64_t* device, void* host, unsigned flags) {
  if (!fakeCudaHasContext()) return INVALID_CONTEXT;
  if (flags || !maps_host_memory() || !memory().mapped.holds(host, 1)) return INVALID_VALUE;
  *device = uint64_t(host) + MAPPED_AT;
  return SUCCESS;
}
EXPORTED int cuMemHostGetFlags(unsigned* flags, void* host) {
  *flags = 0;
  return memory().pinned.holds(host, 1) ? SUCCESS : INVALID_VALUE;
}
/// Only the kind of memory (attribute 2): 1 host, 2 device.
EXPORTED int cuPointerGetAttribute(void* value, int attribute, uint64_t at) {
  const void* pointer = reinterpret_cast<const void*>(at);
  bool device = memory().device.holds(pointer, 1), host = memory().pinned.holds(pointer, 1);
  if (attribute != 2 || !(device || host)) return INVALID_VALUE;
  *static_cast<unsigned*>(value) = device ? 2 : 1;
  return SUCCESS;
}

// Modules. Images come from the stand-in NVRTC: "FAKECUBIN 80\n" or "FAKEPTX 80\n", then the source.

EXPORTED int cuModuleLoadData(void** module, const void* image) {
  if (!fakeCudaHasContext()) return INVALID_CONTEXT;
  if (fault()) return fault();
  const char* text = static_cast<const char*>(image);
  int built_for = 0;
  bool cubin = sscanf(text, "FAKECUBIN %d", &built_for) == 1;
  if (!cubin && sscanf(text, "FAKEPTX %d", &built_for) != 1) return INVALID_IMAGE;
  // A cubin runs on its own major version, PTX on everything from its own on.
  bool same_major = built_for / 10 == capability() / 10;
  if (built_for > capability() || (cubin && !same_major)) return NO_BINARY_FOR_GPU;
  *module = new Module{text};
  return SUCCESS;
}
EXPORTED int cuModuleLoadDataEx(void** module, const void* image, unsigned, void*, void**) {
  return cuModuleLoadData(module, image);
}
EXPORTED int cuModuleUnload(void* module) {
  if (!fakeCudaHasContext()) die("unloading kernels without their context");
  delete static_cast<Module*>(module);
  return SUCCESS;
}
EXPORTED int cuModuleGetFunction(void** function, void* module, const char* name) {
  const Kernel* kernel = find_kernel(name);
  if (!kernel || static_cast<Module*>(module)->text.find(kernel->signature) == std::string::npos) return NOT_FOUND;
  *function = const_cast<Kernel*>(kernel);
  return SUCCESS;
}
EXPORTED int cuFuncGetAttribute(int* value, int attribute, void*) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0;
  return SUCCESS;
}
EXPORTED int cuFuncSetAttribute(void*, int, int) { return SUCCESS; }
EXPORTED int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int threads, size_t) {
  *blocks = threads ? 2048 / threads : 0;
  return SUCCESS;
}

EXPORTED int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                            unsigned bz, unsigned shared_bytes, void* stream, void** arguments, void** extra) {
  if (!fakeCudaHasContext()) return INVALID_CONTEXT;
  uint64_t threads = uint64_t(bx) * by * bz;
  if (!gx || !gy || !gz || gx > 2147483647 || gy > 65535 || gz > 65535 || !threads || threads > 1024) return INVALID_VALUE;
  if (shared_bytes > 48 * 1024 || extra) return INVALID_VALUE;
  if (fault()) return fault();
  static std::atomic<uint64_t> launches{0};
  static const uint64_t faulty = setting("FAKE_CUDA_FAULT", 0);
  if (++launches == faulty) {
    fakeCudaEnqueue(stream, "fault", new std::function<void()>([] { set_fault(ILLEGAL_ADDRESS); }));
    return SUCCESS;
  }
  const Kernel* kernel = static_cast<const Kernel*>(function);
  fakeCudaCount(("launch " + kernel->name).c_str(), 1);
  auto* task = new std::function<void()>([=, body = kernel->bind(arguments)] {
    emulator::launch(dim3(gx, gy, gz), dim3(bx, by, bz), body);
  });
  fakeCudaEnqueue(stream, kernel->name.c_str(), task);
  return SUCCESS;
}
