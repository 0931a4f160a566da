// A libnvidia-ml.so.1 that tells of the stand-in driver's GPUs.
#include "fake.h"

#include <unistd.h>

namespace {

enum Result { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };

struct MemoryInfo {
  unsigned long long total, free, used;
};
struct MemoryInfo2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};
struct PciInfo {
  char legacy_id[16];
  unsigned domain, bus, device, device_id, subsystem_id;
  char id[32];
};
struct Process {
  unsigned pid;
  unsigned long long used;
  unsigned gpu_instance, compute_instance;
};

bool g_ready = false;
unsigned devices() { return unsigned(fake::setting("FAKE_CUDA_DEVICES", 1)); }
void* handle_of(unsigned index) { return reinterpret_cast<void*>(uintptr_t(index) + 1); }
unsigned index_of(void* handle) { return unsigned(uintptr_t(handle)) - 1; }

int text(char* to, unsigned length, const char* what) {
  if (strlen(what) + 1 > length) return INSUFFICIENT_SIZE;
  strcpy(to, what);
  return SUCCESS;
}

}  // namespace

EXPORTED int nvmlInit_v2() {
  g_ready = true;
  return SUCCESS;
}
EXPORTED int nvmlInitWithFlags(unsigned) { return nvmlInit_v2(); }
EXPORTED int nvmlShutdown() {
  g_ready = false;
  return SUCCESS;
}
EXPORTED const char* nvmlErrorString(int result) { return result == SUCCESS ? "Success" : "Failure"; }
EXPORTED int nvmlSystemGetDriverVersion(char* to, unsigned length) { return text(to, length, "580.65.06"); }
EXPORTED int nvmlSystemGetCudaDriverVersion(int* version) {
  *version = int(fake::setting("FAKE_CUDA_DRIVER", 13000));
  return SUCCESS;
}
EXPORTED int nvmlSystemGetCudaDriverVersion_v2(int* version) { return nvmlSystemGetCudaDriverVersion(version); }
EXPORTED int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = devices();
  return g_ready ? SUCCESS : UNINITIALIZED;
}
EXPORTED int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  *device = handle_of(index);
  return index < devices() ? SUCCESS : INVALID_ARGUMENT;
}
EXPORTED int nvmlDeviceGetHandleByPciBusId_v2(const char* id, void** device) {
  unsigned domain = 0, bus = 0;
  if (sscanf(id, "%x:%x:", &domain, &bus) != 2 || bus < 1 || bus > devices()) return NOT_FOUND;
  *device = handle_of(bus - 1);
  return SUCCESS;
}
EXPORTED int nvmlDeviceGetName(void*, char* to, unsigned length) { return text(to, length, "Emulated GPU"); }
EXPORTED int nvmlDeviceGetUUID(void*, char* to, unsigned length) {
  return text(to, length, "GPU-10101010-1010-1010-1010-101010101010");
}
EXPORTED int nvmlDeviceGetMemoryInfo(void*, MemoryInfo* info) {
  info->total = fake::setting("FAKE_CUDA_VRAM", 1ull << 30);
  info->used = fakeCudaUsed();
  info->free = info->total - info->used;
  return SUCCESS;
}
EXPORTED int nvmlDeviceGetMemoryInfo_v2(void* device, MemoryInfo2* info) {
  MemoryInfo plain;
  nvmlDeviceGetMemoryInfo(device, &plain);
  info->total = plain.total, info->reserved = 0, info->free = plain.free, info->used = plain.used;
  return SUCCESS;
}
EXPORTED int nvmlDeviceGetPciInfo_v3(void* device, PciInfo* info) {
  *info = {};
  info->bus = index_of(device) + 1;
  snprintf(info->legacy_id, sizeof info->legacy_id, "0000:%02X:00.0", info->bus);
  snprintf(info->id, sizeof info->id, "00000000:%02X:00.0", info->bus);
  return SUCCESS;
}

EXPORTED int nvmlDeviceGetMaxPcieLinkGeneration(void*, unsigned* generation) {
  *generation = 4;
  return SUCCESS;
}
EXPORTED int nvmlDeviceGetMaxPcieLinkWidth(void*, unsigned* width) {
  *width = 16;
  return SUCCESS;
}
EXPORTED int nvmlDeviceGetCurrPcieLinkGeneration(void* device, unsigned* generation) {
  return nvmlDeviceGetMaxPcieLinkGeneration(device, generation);
}
EXPORTED int nvmlDeviceGetCurrPcieLinkWidth(void* device, unsigned* width) {
  return nvmlDeviceGetMaxPcieLinkWidth(device, width);
}
EXPORTED int nvmlDeviceGetComputeRunningProcesses_v3(void*, unsigned* count, Process* processes) {
  unsigned room = *count;
  *count = 1;
  if (room < 1) return INSUFFICIENT_SIZE;
  // In a container it knows processes by numbers that they do not have inside.
  unsigned pid = unsigned(fake::setting("FAKE_NVML_PID", getpid()));
  processes[0] = {pid, fakeCudaUsed(), ~0u, ~0u};
  return SUCCESS;
}
