// Runs kernels on buffers that a test hands over in a file, and writes the buffers back: the test compares them
// with the CPU twins. Built with address and undefined-behaviour sanitizers; every buffer is an allocation of
// its exact size. Usage: runner CASES RESULTS. All numbers little-endian:
//   cases:   u32 count, then each: text name; u32 grid[3], block[3]; u32 buffers, each u64 bytes + them;
//            u32 pointers, each u32 buffer, u32 offset, u32 target, u32 target offset (an address to write);
//            u32 arguments, each u32 kind (0 four bytes, 1 buffer or null), u64 value or buffer
//   results: the buffers' bytes, case after case.
#include "fake.h"

#include <fstream>
#include <memory>
#include <vector>

namespace {

struct Buffer {
  std::unique_ptr<char[]> bytes;
  uint64_t length;
};

struct Case {
  std::string name;
  uint32_t grid[3], block[3];
  std::vector<Buffer> buffers;
  std::vector<uint64_t> arguments;
};

template <class T> T read(std::istream& from) {
  T value;
  from.read(reinterpret_cast<char*>(&value), sizeof value);
  if (!from) fake::die("the cases end too early");
  return value;
}

std::string read_text(std::istream& from) {
  std::string text(read<uint32_t>(from), 0);
  from.read(text.data(), std::streamsize(text.size()));
  return text;
}

Buffer read_buffer(std::istream& from) {
  uint64_t length = read<uint64_t>(from);
  Buffer buffer{std::unique_ptr<char[]>(new char[length]), length};
  from.read(buffer.bytes.get(), std::streamsize(length));
  return buffer;
}

Case read_case(std::istream& from) {
  Case one;
  one.name = read_text(from);
  for (uint32_t& n : one.grid) n = read<uint32_t>(from);
  for (uint32_t& n : one.block) n = read<uint32_t>(from);
  for (uint32_t count = read<uint32_t>(from); count; count--) one.buffers.push_back(read_buffer(from));
  for (uint32_t count = read<uint32_t>(from); count; count--) {
    uint32_t buffer = read<uint32_t>(from), offset = read<uint32_t>(from);
    uint32_t target = read<uint32_t>(from), target_offset = read<uint32_t>(from);
    uint64_t address = uint64_t(one.buffers.at(target).bytes.get() + target_offset);
    memcpy(one.buffers.at(buffer).bytes.get() + offset, &address, sizeof address);
  }
  for (uint32_t count = read<uint32_t>(from); count; count--) {
    uint32_t kind = read<uint32_t>(from);
    uint64_t value = read<uint64_t>(from);
    // The first bytes of a little-endian word are what a shorter argument takes.
    bool null = kind == 1 && value == UINT64_MAX;
    if (kind == 1) value = null ? 0 : uint64_t(one.buffers.at(value).bytes.get());
    one.arguments.push_back(value);
  }
  return one;
}

void run(Case& one) {
  const fake::Kernel* kernel = fake::find_kernel(one.name);
  if (!kernel) fake::die(("no kernel " + one.name).c_str());
  if (kernel->arguments != one.arguments.size()) fake::die(("wrong number of arguments for " + one.name).c_str());
  std::vector<void*> arguments;
  for (uint64_t& value : one.arguments) arguments.push_back(&value);
  auto dim = [](const uint32_t (&n)[3]) { return dim3(n[0], n[1], n[2]); };
  emulator::launch(dim(one.grid), dim(one.block), kernel->bind(arguments.data()));
}

}  // namespace

void* fake::device_pointer(const void* at) { return const_cast<void*>(at); }

int main(int count, char** arguments) {
  if (count == 2 && std::string(arguments[1]) == "--list") {
    for (const fake::Kernel& kernel : fake::registry()) printf("%s\n", kernel.name.c_str());
    return 0;
  }
  if (count != 3) fake::die("usage: runner CASES RESULTS | runner --list");
  std::ifstream from(arguments[1], std::ios::binary);
  std::ofstream to(arguments[2], std::ios::binary);
  for (uint32_t cases = read<uint32_t>(from); cases; cases--) {
    Case one = read_case(from);
    run(one);
    for (const Buffer& buffer : one.buffers) to.write(buffer.bytes.get(), std::streamsize(buffer.length));
  }
  return to.good() ? 0 : 1;
}
