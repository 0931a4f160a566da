// The fibers behind emulator.h. Switching is twelve instructions of x86-64.
#include "emulator.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <sys/mman.h>
#include <thread>
#include <vector>

extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
 push %rbp
 push %rbx
 push %r12
 push %r13
 push %r14
 push %r15
 mov %rsp,(%rdi)
 mov %rsi,%rsp
 pop %r15
 pop %r14
 pop %r13
 pop %r12
 pop %rbx
 pop %rbp
 ret
)");

namespace emulator {
namespace {

constexpr size_t STACK = 64 * 1024;
constexpr size_t SHARED_BYTES = 48 * 1024;
enum class State { Ready, AtBarrier, AtWarp, Done };

struct Fiber {
  Coordinates at;
  State state = State::Ready;
  void* stack_pointer = nullptr;
  unsigned warp = 0;
  /// Alternates, so that a message may be read while the next one is written.
  unsigned turn = 0;
  unsigned barriers = 0;
  std::vector<std::pair<void*, const void*>> promised;
};

struct Message {
  alignas(16) unsigned char bytes[MESSAGE];
};

[[noreturn]] void fail(const char* what, const Fiber& fiber) {
  const dim3& b = fiber.at.block;
  const dim3& t = fiber.at.thread;
  fprintf(stderr, "emulator: %s (block %u %u %u, thread %u %u %u)\n", what, b.x, b.y, b.z, t.x, t.y, t.z);
  abort();
}

int from_environment(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value ? atoi(value) : otherwise;
}

const int ORDER = from_environment("EMULATOR_ORDER", 0);
const int DROPPED = from_environment("EMULATOR_DROP_BARRIER", -1);
const bool BACKWARDS = ORDER == 1 || ORDER == 4, ROTATING = ORDER == 2, WARP_BY_WARP = ORDER >= 3;

/// One block at a time; stacks and messages are kept for the next.
struct Runner {
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Message> messages[2];
  std::map<int, std::unique_ptr<unsigned char[]>> shared;
  size_t shared_bytes = 0;
  std::vector<std::unique_ptr<unsigned char[]>> stacks;
  void* scheduler = nullptr;
  Fiber* running = nullptr;

  void run(dim3 grid, dim3 block, dim3 index, const std::function<void()>& what);
  void prepare(dim3 grid, dim3 block, dim3 index);
  bool turns(unsigned first, unsigned count, unsigned start);
  bool turn_of_all(unsigned start);
  bool turn_of_warps();
  bool release_warp(unsigned first);
  bool release_barrier(bool progressed);
};

__attribute__((tls_model("initial-exec"))) thread_local Runner* t_runner = nullptr;

void pause(State state) {
  Fiber& fiber = *t_runner->running;
  fiber.state = state;
  emulator_switch(&fiber.stack_pointer, t_runner->scheduler);
}

void enter() {
  (*t_runner->body)();
  pause(State::Done);
  __builtin_trap();
}

/// A fresh stack whose first switch goes to `enter`.
void* first_frame(unsigned char* stack) {
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + STACK) & ~uintptr_t(15));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(enter);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  return top;
}

void Runner::prepare(dim3 grid, dim3 block, dim3 index) {
  unsigned count = block.x * block.y * block.z;
  fibers.assign(count, Fiber());
  shared.clear();
  shared_bytes = 0;
  messages[0].resize(count);
  messages[1].resize(count);
  while (stacks.size() < count) stacks.emplace_back(new unsigned char[STACK]);
  for (unsigned i = 0; i < count; i++) {
    Fiber& fiber = fibers[i];
    dim3 thread(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    fiber.at = {thread, index, block, grid, i % WARP};
    fiber.warp = i / WARP;
    fiber.stack_pointer = first_frame(stacks[i].get());
  }
  if (count % WARP) fail("a block must be whole warps", fibers[0]);
}

/// One turn for each fiber of a range that is ready, from `start` in it on.
bool Runner::turns(unsigned first, unsigned count, unsigned start) {
  bool progressed = false;
  for (unsigned k = 0; k < count; k++) {
    unsigned i = first + (BACKWARDS ? count - 1 - k : (k + start) % count);
    if (fibers[i].state != State::Ready) continue;
    progressed = true;
    running = &fibers[i];
    emulator_switch(&scheduler, fibers[i].stack_pointer);
  }
  return progressed;
}

bool Runner::turn_of_all(unsigned start) {
  bool progressed = turns(0, fibers.size(), start);
  for (unsigned first = 0; first < fibers.size(); first += WARP) progressed |= release_warp(first);
  return progressed;
}

bool Runner::turn_of_warps() {
  bool progressed = false;
  unsigned warps = fibers.size() / WARP;
  for (unsigned w = 0; w < warps; w++) {
    unsigned first = (BACKWARDS ? warps - 1 - w : w) * WARP;
    while (turns(first, WARP, 0) | release_warp(first)) progressed = true;
  }
  return progressed;
}

/// Lets a warp go on when every lane of it waits.
bool Runner::release_warp(unsigned first) {
  unsigned waiting = 0, done = 0;
  for (unsigned i = first; i < first + WARP; i++) {
    waiting += fibers[i].state == State::AtWarp;
    done += fibers[i].state == State::Done;
  }
  if (waiting && done) fail("a warp operation after a lane has returned", fibers[first]);
  if (waiting < WARP) return false;
  for (unsigned i = first; i < first + WARP; i++) fibers[i].state = State::Ready;
  return true;
}

bool Runner::release_barrier(bool progressed) {
  unsigned waiting = 0, done = 0;
  for (const Fiber& fiber : fibers) {
    waiting += fiber.state == State::AtBarrier;
    done += fiber.state == State::Done;
  }
  if (done == fibers.size()) return false;
  if (waiting && waiting + done == fibers.size()) {
    if (done) fail("a barrier that some threads have returned before", fibers[0]);
    for (Fiber& fiber : fibers) fiber.state = State::Ready;
    return true;
  }
  if (!progressed) fail("threads wait for each other in different places", fibers[0]);
  return true;
}

void Runner::run(dim3 grid, dim3 block, dim3 index, const std::function<void()>& what) {
  Runner* before = t_runner;
  t_runner = this;
  body = &what;
  prepare(grid, block, index);
  unsigned random = 12345 + index.x;
  bool more = true;
  while (more) {
    random = random * 1664525u + 1013904223u;
    bool progressed = WARP_BY_WARP ? turn_of_warps() : turn_of_all(ROTATING ? (random >> 8) % fibers.size() : 0);
    more = release_barrier(progressed);
  }
  t_runner = before;
}

/// Blocks are numbers that threads draw.
void draw_blocks(dim3 grid, dim3 block, const std::function<void()>& body, std::atomic<uint64_t>& next) {
  static thread_local Runner runner;
  uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = next++; i < count; i = next++) {
    dim3 index(i % grid.x, i / grid.x % grid.y, i / (uint64_t(grid.x) * grid.y));
    runner.run(grid, block, index, body);
  }
}

}  // namespace

const Coordinates& current() { return t_runner->running->at; }

void barrier() {
  Fiber& fiber = *t_runner->running;
  if (int(fiber.barriers++) != DROPPED) pause(State::AtBarrier);
}

void exchange(const void* message, size_t bytes) {
  Fiber& fiber = *t_runner->running;
  fiber.turn ^= 1;
  memcpy(t_runner->messages[fiber.turn][fiber.warp * WARP + fiber.at.lane].bytes, message, bytes);
  pause(State::AtWarp);
}

const void* message_of(unsigned lane) {
  const Fiber& fiber = *t_runner->running;
  return t_runner->messages[fiber.turn][fiber.warp * WARP + lane].bytes;
}

void promise_copy(void* to, const void* from) { t_runner->running->promised.emplace_back(to, from); }

void keep_promises() {
  static const unsigned char zeros[16] = {};
  auto& promised = t_runner->running->promised;
  for (auto [to, from] : promised) memcpy(to, from ? from : zeros, sizeof zeros);
  promised.clear();
}

void* shared_variable(int id, size_t bytes) {
  auto& found = t_runner->shared[id];
  if (!found) {
    t_runner->shared_bytes += bytes;
    if (t_runner->shared_bytes > SHARED_BYTES) fail("more static shared memory than a launch has", *t_runner->running);
    found.reset(new unsigned char[bytes]);
    memset(found.get(), 0xff, bytes);
  }
  return found.get();
}

void launch(dim3 grid, dim3 block, const std::function<void()>& body) {
  static const int threads = from_environment("EMULATOR_THREADS", 2);
  std::atomic<uint64_t> next{0};
  uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<std::thread> others;
  for (int i = 1; i < threads && blocks > 8; i++) {
    others.emplace_back([&] { draw_blocks(grid, block, body, next); });
  }
  draw_blocks(grid, block, body, next);
  for (std::thread& other : others) other.join();
}

}  // namespace emulator

void require_full_mask(unsigned mask) {
  if (mask != ~0u) {
    fprintf(stderr, "emulator: a warp operation without all lanes\n");
    abort();
  }
}
