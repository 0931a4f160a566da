// The stand-in driver's streams, events and copies, and its books of what was done.
#include "fake.h"
#include "fake_memory.h"
#include "fake_stream.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

using namespace fake;

namespace {

struct Queues {
  std::mutex mutex;
  std::vector<Stream*> live;
  uint64_t created = 0;
  /// The default stream: an ordinary one, since the others are made not to wait for it.
  Stream* standard = nullptr;
};
Queues& queues() {
  static Queues* queues = new Queues;
  return *queues;
}

Stream* open_stream() {
  Queues& all = queues();
  std::lock_guard<std::mutex> lock(all.mutex);
  uint64_t number = all.created++;
  Stream* stream = new Stream(number, setting("FAKE_CUDA_SEED", 1) * 1000 + number);
  all.live.push_back(stream);
  return stream;
}

/// The stream behind a handle: null, 1 (legacy) and 2 (per thread) are the default one.
Stream& stream_of(void* handle) {
  if (uint64_t(handle) > 2) return *static_cast<Stream*>(handle);
  static Stream* standard = open_stream();
  return *standard;
}

using EventHandle = std::shared_ptr<Event>;
EventHandle& event_of(void* handle) { return *static_cast<EventHandle*>(handle); }

/// Counts and largest values by name, written to FAKE_CUDA_LOG when the process ends.
struct Books {
  std::mutex mutex;
  std::map<std::string, uint64_t> counts, most;
};
void write_books();
Books& books() {
  static Books* books = [] {
    atexit(write_books);
    return new Books;
  }();
  return *books;
}
void write_books() {
  const char* path = getenv("FAKE_CUDA_LOG");
  FILE* file = path ? fopen(path, "w") : nullptr;
  if (!file) return;
  std::lock_guard<std::mutex> lock(books().mutex);
  for (auto& [name, count] : books().counts) fprintf(file, "%s %lu\n", name.c_str(), count);
  for (auto& [name, most] : books().most) fprintf(file, "%s %lu\n", name.c_str(), most);
  fprintf(file, "device peak bytes %lu\npinned peak bytes %lu\n", memory().peak, memory().pinned_peak);
  fclose(file);
}

std::atomic<int> g_fault{0};

bool is_device(uint64_t at, uint64_t bytes) { return memory().device.holds(reinterpret_cast<void*>(at), bytes); }

void require_device(uint64_t at, uint64_t bytes) {
  if (!is_device(at, bytes)) die("a copy or fill outside of device memory");
}

/// Rows from one memory to the other. One without pinned host memory is over when this returns; one that is pinned in
/// part, or over two ranges, is refused. FAKE_CUDA_LATE: one down is over later all the same, as no driver says it is not.
int copy(void* stream, const char* what, std::function<void()> work, const void* host, uint64_t bytes) {
  if (!fakeCudaHasContext()) return INVALID_CONTEXT;
  bool pinned = host && memory().pinned.holds(host, bytes);
  if (host && !pinned && memory().pinned.overlaps(host, bytes)) return INVALID_VALUE;
  fakeCudaCount(what, 1);
  if (fault()) return fault();
  Stream& queue = stream_of(stream);
  queue.enqueue(what, std::move(work));
  static const bool late = setting("FAKE_CUDA_LATE", 0);
  if (host && !pinned && !(late && !strcmp(what, "copy down"))) queue.synchronise();
  return SUCCESS;
}

struct Copy2d {
  size_t from_x, from_y;
  unsigned from_kind;
  const void* from_host;
  uint64_t from_device;
  void* from_array;
  size_t from_pitch;
  size_t to_x, to_y;
  unsigned to_kind;
  void* to_host;
  uint64_t to_device;
  void* to_array;
  size_t to_pitch;
  size_t width, height;
};
constexpr unsigned HOST = 1, DEVICE_KIND = 2;
constexpr size_t MAX_PITCH = 2147483647;

}  // namespace

int fake::fault() { return g_fault; }
void fake::set_fault(int result) { g_fault = result; }

void fakeCudaCount(const char* what, uint64_t by) {
  std::lock_guard<std::mutex> lock(books().mutex);
  books().counts[what] += by;
}

void fakeCudaMost(const char* what, uint64_t value) {
  std::lock_guard<std::mutex> lock(books().mutex);
  uint64_t& most = books().most[what];
  most = std::max(most, value);
}

void fakeCudaEnqueue(void* stream, const char* name, std::function<void()>* task) {
  stream_of(stream).enqueue(name, std::move(*task));
  delete task;
}

EXPORTED int cuStreamCreate(void** stream, unsigned) {
  if (!fakeCudaHasContext()) return INVALID_CONTEXT;
  *stream = open_stream();
  return SUCCESS;
}
EXPORTED int cuStreamCreateWithPriority(void** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
EXPORTED int cuStreamDestroy_v2(void* handle) {
  if (uint64_t(handle) <= 2) return INVALID_HANDLE;
  if (!fakeCudaHasContext()) die("destroying a stream without its context");
  Stream* stream = static_cast<Stream*>(handle);
  std::lock_guard<std::mutex> lock(queues().mutex);
  auto& live = queues().live;
  live.erase(std::remove(live.begin(), live.end(), stream), live.end());
  stream->stop();
  return SUCCESS;
}
EXPORTED int cuStreamSynchronize(void* stream) {
  if (!fakeCudaHasContext()) return INVALID_CONTEXT;
  stream_of(stream).synchronise();
  return fault();
}
EXPORTED int cuStreamQuery(void* stream) { return stream_of(stream).idle() ? SUCCESS : NOT_READY; }
EXPORTED int cuCtxSynchronize() {
  std::vector<Stream*> live;
  {
    std::lock_guard<std::mutex> lock(queues().mutex);
    live = queues().live;
  }
  for (Stream* stream : live) stream->synchronise();
  return SUCCESS;
}
EXPORTED int cuStreamWaitEvent(void* stream, void* handle, unsigned) {
  if (!fakeCudaHasContext()) return INVALID_CONTEXT;
  stream_of(stream).wait(event_of(handle));
  return SUCCESS;
}
EXPORTED int cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  stream_of(stream).enqueue("host function", [=] { function(data); });
  return SUCCESS;
}
EXPORTED int cuLaunchHostFunc_v2(void* stream, void (*function)(void*), void* data, unsigned) {
  return cuLaunchHostFunc(stream, function, data);
}

EXPORTED int cuEventCreate(void** event, unsigned) {
  if (!fakeCudaHasContext()) return INVALID_CONTEXT;
  *event = new EventHandle(std::make_shared<Event>());
  return SUCCESS;
}
EXPORTED int cuEventDestroy_v2(void* event) {
  if (!fakeCudaHasContext()) die("destroying an event without its context");
  delete static_cast<EventHandle*>(event);
  return SUCCESS;
}
EXPORTED int cuEventRecord(void* handle, void* stream) {
  if (!fakeCudaHasContext()) return INVALID_CONTEXT;
  stream_of(stream).record(event_of(handle));
  return SUCCESS;
}
EXPORTED int cuEventSynchronize(void* handle) {
  Event& event = *event_of(handle);
  std::string who = event.recorded_here() ? "its thread" : "another thread";
  if (!drops_wait(who + " > " + event.place().stream)) event.wait(event.latest());
  return fault();
}
EXPORTED int cuEventQuery(void* event) {
  return event_of(event)->reached(event_of(event)->latest()) ? SUCCESS : NOT_READY;
}
EXPORTED int cuEventElapsedTime(float* milliseconds, void* from, void* to) {
  if (event_of(from)->latest() == 0 || event_of(to)->latest() == 0) return INVALID_HANDLE;
  if (cuEventQuery(from) || cuEventQuery(to)) return NOT_READY;
  *milliseconds = std::chrono::duration<float, std::milli>(event_of(to)->time() - event_of(from)->time()).count();
  return SUCCESS;
}
EXPORTED int cuEventElapsedTime_v2(float* milliseconds, void* from, void* to) {
  return cuEventElapsedTime(milliseconds, from, to);
}

EXPORTED int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  require_device(to, bytes);
  return copy(stream, "copy up", [=] { memcpy(reinterpret_cast<void*>(to), from, bytes); }, from, bytes);
}
EXPORTED int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  require_device(from, bytes);
  return copy(stream, "copy down", [=] { memcpy(to, reinterpret_cast<void*>(from), bytes); }, to, bytes);
}
EXPORTED int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  require_device(to, bytes);
  require_device(from, bytes);
  auto work = [=] { memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); };
  return copy(stream, "copy inside", work, nullptr, 0);
}
EXPORTED int cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  bool down = is_device(from, bytes), up = is_device(to, bytes);
  if (up && down) return cuMemcpyDtoDAsync_v2(to, from, bytes, stream);
  if (up) return cuMemcpyHtoDAsync_v2(to, reinterpret_cast<void*>(from), bytes, stream);
  return cuMemcpyDtoHAsync_v2(reinterpret_cast<void*>(to), from, bytes, stream);
}
/// From memory that is not pinned: over for the host when it is staged; it arrives later, and only what is on the
/// default stream comes after it.
EXPORTED int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  bool pinned = memory().pinned.holds(from, bytes);
  if (int failed = cuStreamSynchronize(nullptr)) return failed;
  if (pinned) {
    int failed = cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr);
    return failed ? failed : cuStreamSynchronize(nullptr);
  }
  require_device(to, bytes);
  const char* first = static_cast<const char*>(from);
  auto staged = std::make_shared<std::vector<char>>(first, first + bytes);
  auto arrive = [=] { memcpy(reinterpret_cast<void*>(to), staged->data(), staged->size()); };
  return copy(nullptr, "copy up", arrive, nullptr, 0);
}
EXPORTED int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  int failed = cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr);
  return failed ? failed : cuStreamSynchronize(nullptr);
}
EXPORTED int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
  return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr);
}

EXPORTED int cuMemcpy2DAsync_v2(const Copy2d* asked, void* stream) {
  const Copy2d& c = *asked;
  bool kinds = (c.from_kind == HOST || c.from_kind == DEVICE_KIND) && (c.to_kind == HOST || c.to_kind == DEVICE_KIND);
  if (!kinds || !c.width || !c.height || c.from_pitch < c.width || c.to_pitch < c.width) return INVALID_VALUE;
  if (c.from_pitch > MAX_PITCH || c.to_pitch > MAX_PITCH) return INVALID_VALUE;
  const void* from_base = c.from_kind == HOST ? c.from_host : reinterpret_cast<const void*>(c.from_device);
  void* to_base = c.to_kind == HOST ? c.to_host : reinterpret_cast<void*>(c.to_device);
  const char* from = static_cast<const char*>(from_base) + c.from_y * c.from_pitch + c.from_x;
  char* to = static_cast<char*>(to_base) + c.to_y * c.to_pitch + c.to_x;
  uint64_t from_bytes = (c.height - 1) * c.from_pitch + c.width, to_bytes = (c.height - 1) * c.to_pitch + c.width;
  if (c.from_kind == DEVICE_KIND) require_device(uint64_t(from), from_bytes);
  if (c.to_kind == DEVICE_KIND) require_device(uint64_t(to), to_bytes);
  auto work = [from, to, c] {
    for (size_t row = 0; row < c.height; row++) memcpy(to + row * c.to_pitch, from + row * c.from_pitch, c.width);
  };
  const char* what = c.to_kind == HOST ? "copy down" : "copy up";
  if (c.from_kind == HOST) return copy(stream, what, work, from, from_bytes);
  return copy(stream, what, work, c.to_kind == HOST ? to : nullptr, to_bytes);
}

EXPORTED int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
  if (!fakeCudaHasContext()) return INVALID_CONTEXT;
  require_device(to, bytes);
  stream_of(stream).enqueue("fill", [=] { memset(reinterpret_cast<void*>(to), value, bytes); });
  return SUCCESS;
}
/// Over for the host at once: of fills, only those of page-locked memory are waited for.
EXPORTED int cuMemsetD8_v2(uint64_t to, unsigned char value, size_t bytes) {
  return cuMemsetD8Async(to, value, bytes, nullptr);
}
EXPORTED int cuMemsetD32Async(uint64_t to, unsigned value, size_t count, void* stream) {
  require_device(to, 4 * count);
  stream_of(stream).enqueue("fill", [=] { std::fill_n(reinterpret_cast<unsigned*>(to), count, value); });
  return SUCCESS;
}
