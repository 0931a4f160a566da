// See fake_memory.h.
#include "fake_memory.h"
#include "fake.h"

#include <sys/mman.h>

namespace fake {
namespace {

constexpr uint64_t PAGE = 4096;
/// Allocations up to this size begin as bytes 0xff, which are not numbers: reading what was never written shows.
constexpr uint64_t FILLED = 64 << 20;

uint64_t whole_pages(uint64_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

}  // namespace

void Ranges::add(const void* at, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  live_[uintptr_t(at)] = bytes;
}

uint64_t Ranges::remove(const void* at) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = live_.find(uintptr_t(at));
  if (found == live_.end()) return 0;
  uint64_t bytes = found->second;
  live_.erase(found);
  return bytes;
}

bool Ranges::holds(const void* at, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto after = live_.upper_bound(uintptr_t(at));
  if (after == live_.begin()) return false;
  auto [start, length] = *--after;
  return uintptr_t(at) + bytes <= start + length;
}

bool Ranges::overlaps(const void* at, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto after = live_.lower_bound(uintptr_t(at) + bytes);
  if (after == live_.begin()) return false;
  auto [start, length] = *--after;
  return start + length > uintptr_t(at);
}

Memory::Memory()
    : total(setting("FAKE_CUDA_VRAM", 1ull << 30)), pinned_limit(setting("FAKE_CUDA_PINNED", UINT64_MAX)) {}

Memory& memory() {
  // Never destroyed: streams may still run while the process ends.
  static Memory* memory = new Memory;
  return *memory;
}

bool Memory::reserve(int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  if (bytes > 0 && uint64_t(bytes) > total - used) return false;
  used += bytes;
  if (used > peak) peak = used;
  return true;
}

bool Memory::reserve_pinned(int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  if (bytes > 0 && uint64_t(bytes) > pinned_limit - pinned_used) return false;
  pinned_used += bytes;
  if (pinned_used > pinned_peak) pinned_peak = pinned_used;
  return true;
}

void* Memory::allocate(uint64_t bytes) {
  if (!reserve(bytes)) return nullptr;
  uint64_t pages = whole_pages(bytes);
  void* at = mmap(nullptr, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED || mprotect(static_cast<char*>(at) + pages, PAGE, PROT_NONE)) die("host memory ran out");
  if (bytes <= FILLED) memset(at, 0xff, bytes);
  device.add(at, bytes);
  return at;
}

bool Memory::release(void* at) {
  uint64_t bytes = device.remove(at);
  if (!bytes) return false;
  munmap(at, whole_pages(bytes) + PAGE);
  reserve(-int64_t(bytes));
  return true;
}

}  // namespace fake

bool fakeCudaReserve(int64_t bytes) { return fake::memory().reserve(bytes); }
uint64_t fakeCudaUsed() { return fake::memory().used; }
bool fakeCudaIsDevice(const void* at, uint64_t bytes) { return fake::memory().device.holds(at, bytes); }
