#include "emulation/guarded_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace lens::emulation {
namespace {

constexpr unsigned char kMark = 0xa7;  // fills the slack between a buffer and its guard pages

struct Buffer {
  std::string name;
  char *mapping, *data;
  size_t mapped, bytes, page;
};

std::vector<Buffer> g_buffers;

}  // namespace

void describe_address(const void* raw, char* text, size_t size) {
  const char* address = static_cast<const char*>(raw);
  for (const Buffer& b : g_buffers) {
    if (address < b.mapping || address >= b.mapping + b.mapped) continue;
    const bool before = address < b.data;
    std::snprintf(text, size, "accessed memory %lld bytes %s '%s' (%zu bytes)",
                  static_cast<long long>(before ? b.data - address : address - (b.data + b.bytes)),
                  before ? "before the start of" : "past the end of", b.name.c_str(), b.bytes);
    return;
  }
  std::snprintf(text, size, "accessed %p, which is in no buffer", raw);
}

bool in_one_buffer(const void* start, size_t bytes, char* text, size_t size) {
  const char* first = static_cast<const char*>(start);
  for (const Buffer& b : g_buffers) {
    if (first < b.data || first > b.data + b.bytes) continue;
    const auto left = size_t(b.data + b.bytes - first);
    if (bytes <= left) return true;
    std::snprintf(text, size, "reaches %zu bytes past the end of '%s' (%zu bytes)", bytes - left,
                  b.name.c_str(), b.bytes);
    return false;
  }
  std::snprintf(text, size, "starts at %p, which is in no buffer", start);
  return false;
}

}  // namespace lens::emulation

using lens::emulation::Buffer;
using lens::emulation::g_buffers;
using lens::emulation::kMark;

extern "C" {

// A buffer that ends at most 15 + shift bytes before an inaccessible page, starts shift bytes off a
// 16-byte boundary and holds 0xff everywhere (NaN in every float format). Null when out of memory.
__attribute__((visibility("default"))) void* lens_emulation_allocate(const char* name, size_t bytes,
                                                                     size_t shift) {
  const auto page = size_t(sysconf(_SC_PAGESIZE));
  const size_t body = (bytes + 32 + page - 1) / page * page;
  void* mapping =
      mmap(nullptr, body + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  char* first = static_cast<char*>(mapping) + page;
  if (mprotect(first, body, PROT_READ | PROT_WRITE)) return nullptr;
  const auto end = reinterpret_cast<uintptr_t>(first + body);
  const uintptr_t start =
      shift ? ((end - bytes - 16) & ~uintptr_t(15)) + shift : (end - bytes) & ~uintptr_t(15);
  std::memset(first, kMark, body);
  auto* data = reinterpret_cast<char*>(start);
  std::memset(data, 0xff, bytes);
  g_buffers.push_back({name, static_cast<char*>(mapping), data, body + 2 * page, bytes, page});
  return data;
}

// 0 if the slack around the buffer is untouched, 1 if something wrote there, 2 if it is no buffer.
__attribute__((visibility("default"))) int lens_emulation_free(void* data) {
  for (size_t i = 0; i < g_buffers.size(); ++i) {
    const Buffer b = g_buffers[i];
    if (b.data != data) continue;
    bool touched = false;
    for (char* p = b.mapping + b.page; p < b.data; ++p) {
      touched |= static_cast<unsigned char>(*p) != kMark;
    }
    for (char* p = b.data + b.bytes; p < b.mapping + b.mapped - b.page; ++p) {
      touched |= static_cast<unsigned char>(*p) != kMark;
    }
    munmap(b.mapping, b.mapped);
    g_buffers.erase(g_buffers.begin() + long(i));
    return touched ? 1 : 0;
  }
  return 2;
}
}
