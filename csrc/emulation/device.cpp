// The device as launchers see it: multiprocessors, capability, what kernels were allowed.
#include "emulation/block_state.h"

namespace lens::emulation {
namespace {

struct Device {
  int multiprocessors = 3, major = 9;
  bool bound = false;  // a context to the calling thread
  std::map<const void*, size_t> allowed;
};
Device g_device;

}  // namespace

int multiprocessors() { return g_device.multiprocessors; }
int compute_capability() { return g_device.major; }
void bind_context() { g_device.bound = true; }
bool context_bound() { return g_device.bound; }
int allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > kMostShared) return 1;
  g_device.allowed[kernel] = size_t(bytes);
  return 0;
}
bool shared_allowed(const void* kernel, size_t bytes) {
  const auto found = g_device.allowed.find(kernel);
  return bytes <= (found == g_device.allowed.end() ? 48 << 10 : found->second);
}

}  // namespace lens::emulation

extern "C" {
__attribute__((visibility("default"))) void lens_emulation_device(int multiprocessors, int major) {
  using lens::emulation::g_device;
  g_device.multiprocessors = multiprocessors;
  g_device.major = major;
  g_device.bound = false;  // every launch may be its thread's first
}
}
