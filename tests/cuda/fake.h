// What the stand-in libraries share: results, settings from the environment, the registry of kernels, and the
// streams of the stand-in driver. Each stream is a thread that does its tasks in order, after random delays.
#ifndef LOADMASTER_FAKE_H
#define LOADMASTER_FAKE_H

#include "emulator.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace fake {

enum Result {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  NO_BINARY_FOR_GPU = 209,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  PRIMARY_CONTEXT_ACTIVE = 708,
  ALREADY_REGISTERED = 712,
  NOT_REGISTERED = 713,
  ILLEGAL_ADDRESS = 700,
  NOT_SUPPORTED = 801,
  SYSTEM_DRIVER_MISMATCH = 803,
};

/// A defect of the caller that no return code should hide.
[[noreturn]] inline void die(const char* what) {
  fprintf(stderr, "fake CUDA: %s\n", what);
  abort();
}

inline uint64_t setting(const char* name, uint64_t otherwise) {
  const char* value = getenv(name);
  return value ? strtoull(value, nullptr, 10) : otherwise;
}

/// Set once by a kernel that goes wrong: from then on every call that may tell of it does, to the end of the process.
int fault();
void set_fault(int result);

/// A kernel with its arguments taken from cuLaunchKernel's array: ready to be run later.
using Bound = std::function<void()>;
struct Kernel {
  std::string name;
  /// The first line of the file in which it stands: a module that lacks the line lacks the kernel.
  std::string signature;
  std::function<Bound(void**)> bind;
  size_t arguments;
};
std::vector<Kernel>& registry();
void add_kernel(Kernel kernel);
const Kernel* find_kernel(const std::string& name);

/// Where a kernel finds what it is given: device memory, page-locked memory by the address that the device has it at,
/// which is not the host's, or null. The runner of single kernels has neither.
void* device_pointer(const void* at);
template <class T> T as_on_device(T value) { return value; }
template <class T> T* as_on_device(T* at) { return static_cast<T*>(device_pointer(at)); }

template <class... A, size_t... I>
Bound bind_arguments(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  std::tuple<A...> values(as_on_device(*static_cast<A*>(arguments[I]))...);
  return [kernel, values] { std::apply(kernel, values); };
}

template <class... A> Kernel describe(const char* name, const char* signature, void (*kernel)(A...)) {
  auto bind = [kernel](void** arguments) {
    return bind_arguments(kernel, arguments, std::index_sequence_for<A...>());
  };
  return {name, signature, bind, sizeof...(A)};
}

}  // namespace fake

// For libcublas and libnvidia-ml, which stand beside libcuda.
EXPORTED void fakeCudaEnqueue(void* stream, const char* name, std::function<void()>* task);
/// Takes device memory (or gives it back, negative); false where there is not enough.
EXPORTED bool fakeCudaReserve(int64_t bytes);
EXPORTED uint64_t fakeCudaUsed();
EXPORTED bool fakeCudaIsDevice(const void* at, uint64_t bytes);
/// Whether this thread has a context that somebody holds.
EXPORTED bool fakeCudaHasContext();
EXPORTED void fakeCudaCount(const char* what, uint64_t by);
/// Keeps the largest value.
EXPORTED void fakeCudaMost(const char* what, uint64_t value);

#endif
