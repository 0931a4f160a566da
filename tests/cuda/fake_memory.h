// Device and page-locked memory of the stand-in driver: host memory with its own books.
#ifndef LOADMASTER_FAKE_MEMORY_H
#define LOADMASTER_FAKE_MEMORY_H

#include <cstdint>
#include <map>
#include <mutex>

namespace fake {

/// Live ranges: start to bytes.
class Ranges {
 public:
  void add(const void* at, uint64_t bytes);
  /// The bytes that began at `at`; 0 when nothing did.
  uint64_t remove(const void* at);
  bool holds(const void* at, uint64_t bytes);
  bool overlaps(const void* at, uint64_t bytes);

 private:
  std::mutex mutex_;
  std::map<uintptr_t, uint64_t> live_;
};

struct Memory {
  Ranges device, pinned;
  /// Of the page-locked ranges those that the device has too.
  Ranges mapped;
  /// Bytes taken, of which the context's and cuBLAS's are no range.
  uint64_t total, used = 0, peak = 0;
  uint64_t pinned_limit, pinned_used = 0, pinned_peak = 0;
  std::mutex mutex;

  Memory();
  bool reserve(int64_t bytes);
  bool reserve_pinned(int64_t bytes);
  /// Pages with an unreadable one behind; null when the limit is reached.
  void* allocate(uint64_t bytes);
  bool release(void* at);
};
Memory& memory();

/// How far the device's address of page-locked memory is from the host's: no pointer that may be followed.
constexpr uint64_t MAPPED_AT = 1ull << 56;

}  // namespace fake

#endif
