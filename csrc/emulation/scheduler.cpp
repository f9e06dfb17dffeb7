#include "emulation/scheduler.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>

#include "emulation/fibers.h"
#include "emulation/hopper.h"

// All shared variables of all kernels, collected by the linker; weak, for a library without any.
extern "C" char __start_lens_shared[] __attribute__((weak));
extern "C" char __stop_lens_shared[] __attribute__((weak));

namespace lens::emulation {

Cluster g_cluster;

namespace {

constexpr char kPoison = char(0xff);

std::vector<ThreadId> g_ready;
size_t g_next_ready = 0;
uint64_t g_seed = 0, g_state = 0;
int g_cluster_launches = 0;
int g_error = 0;
const char* g_kernel = "";
char g_message[1024] = "";

}  // namespace

uint64_t random_below(uint64_t n) {  // splitmix64
  uint64_t z = (g_state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (z ^ (z >> 31)) % n;
}

void report(int code, const char* format, ...) {
  g_cluster.aborted = true;
  if (g_error) return;  // the first error is the cause
  g_error = code;
  char what[700];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  std::snprintf(g_message, sizeof g_message, "%s, block (%u, %u, %u): %s", g_kernel, blockIdx.x,
                blockIdx.y, blockIdx.z, what);
}

void make_ready(ThreadId id) {
  g_cluster.blocks[id.block].fibers[id.thread].state = State::kReady;
  g_ready.push_back(id);
}

void make_all_ready(unsigned block) {
  const unsigned threads = g_cluster.threads, warps = (threads + kWarp - 1) / kWarp;
  const unsigned first = g_seed ? unsigned(random_below(warps)) : 0;
  const bool backwards = g_seed && random_below(2);
  for (unsigned i = 0; i < warps; ++i) {
    const unsigned warp = (first + (backwards ? warps - 1 - i : i)) % warps;
    for (unsigned t = warp * kWarp; t < (warp + 1) * kWarp && t < threads; ++t) {
      make_ready({block, t});
    }
  }
}

namespace {

// Seed 0: in turn. Odd seeds: any ready fiber. Even seeds: the one made ready last, so that a warp
// runs ahead of the others as far as the next barrier lets it.
ThreadId take_ready() {
  if (g_seed && g_seed % 2 == 0) {
    const ThreadId id = g_ready.back();
    g_ready.pop_back();
    return id;
  }
  const size_t waiting = g_ready.size() - g_next_ready;
  const size_t chosen = g_next_ready + (g_seed ? random_below(waiting) : 0);
  std::swap(g_ready[chosen], g_ready[g_next_ready]);
  const ThreadId id = g_ready[g_next_ready++];
  if (g_next_ready == g_ready.size()) {
    g_ready.clear();
    g_next_ready = 0;
  }
  return id;
}

void report_deadlock() {
  std::string where;
  std::vector<const Fiber*> shown;
  unsigned live = 0;
  for (unsigned k = 0; k < g_cluster.size; ++k) {
    const Block& b = g_cluster.blocks[k];
    live += b.live;
    for (unsigned i = 0; i < g_cluster.threads && shown.size() < 4; ++i) {
      const Fiber& f = b.fibers[i];
      if (f.state == State::kReady || f.state == State::kDone) continue;
      bool seen = false;
      for (const Fiber* g : shown) {
        seen |=
            g >= b.fibers.data() && g->state == f.state && g->line == f.line && g->mask == f.mask;
      }
      if (seen) continue;
      const std::string of = g_cluster.size > 1 ? " of block " + std::to_string(k) : "";
      char text[240];
      std::snprintf(text, sizeof text, "; from thread %u%s at line %d, %s", i, of.c_str(), f.line,
                    f.state == State::kBarrier  ? "a block barrier"
                    : f.state == State::kWarpOp ? "a warp operation"
                                                : waits_for(k, i));
      where += text;
      shown.push_back(&f);
    }
  }
  report(kLaunchTimeout, "deadlock: %u threads wait for others that never come%s", live,
         where.c_str());
}

// The blocks whose indices stand in g_cluster, to their end.
void run_cluster(size_t shared_bytes) {
  Cluster& c = g_cluster;
  g_ready.clear();
  g_next_ready = 0;
  const size_t statics = __start_lens_shared ? __stop_lens_shared - __start_lens_shared : 0;
  if (statics) std::memset(__start_lens_shared, kPoison, statics);
  for (unsigned k = 0; k < c.size; ++k) {
    c.blocks[k].live = c.threads;
    c.blocks[k].at_barrier = 0;
    begin_block(k, shared_bytes);
    for (unsigned i = 0; i < c.threads; ++i) start_fiber({k, i});
  }
  const unsigned first = g_seed && c.size > 1 ? unsigned(random_below(c.size)) : 0;
  for (unsigned k = 0; k < c.size; ++k) make_all_ready((first + k) % c.size);
  unsigned left = c.size;
  while (left && !c.aborted) {
    if (g_ready.empty()) {
      if (deliver()) continue;
      report_deadlock();
      break;
    }
    if (g_seed % 2 && random_below(16) == 0) deliver();
    resume(take_ready());
    if (self().state != State::kDone || block().live || c.aborted) continue;
    end_block(c.at.block);
    --left;
  }
  for (size_t i = 0; c.size > 1 && i < statics && !c.aborted; ++i) {
    if (__start_lens_shared[i] != kPoison) {
      report(kLaunchFailure, "a static __shared__ array in a cluster, whose blocks share it here");
    }
  }
  for (unsigned k = 0; k < c.size; ++k) {
    for (unsigned i = 0; i < c.threads; ++i) {
      if (stack_overrun({k, i})) report(kLaunchFailure, "thread %u overran its stack", i);
    }
  }
}

}  // namespace

void fail(const char* format, ...) {
  char what[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  report(kLaunchFailure, "thread %u: %s", current_thread(), what);
  abandon_fiber();
}

unsigned current_thread() { return g_cluster.at.thread; }
unsigned current_block() { return g_cluster.at.block; }
unsigned block_threads() { return g_cluster.threads; }
unsigned cluster_blocks() { return g_cluster.size; }
bool block_returned(unsigned rank) { return g_cluster.blocks[rank].live == 0; }
uint64_t seed() { return g_seed; }
void suspend(int line) {
  self().state = State::kSuspended;
  self().line = line;
  to_scheduler();
}
void wake(unsigned rank, unsigned thread) { make_ready({rank, thread}); }

void run_grid(const char* name, const void* kernel, const Launch& launch, void (*thread)(void*),
              void* closure) {
  if (g_error) return;  // while the launch was prepared
  const dim3 grid = launch.grid, block = launch.block;
  g_kernel = name;
  blockIdx = {0, 0, 0};
  g_cluster.aborted = false;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool grid_ok =
      grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  if (!grid_ok || !threads || threads > kMaxThreads || block.z > 64) {
    report(kInvalidConfiguration, "cannot launch grid (%u, %u, %u) of blocks (%u, %u, %u)", grid.x,
           grid.y, grid.z, block.x, block.y, block.z);
    return;
  }
  if (launch.cluster < 1 || launch.cluster > kMostBlocks || grid.x % launch.cluster) {
    report(kInvalidClusterSize, "cannot launch %u blocks in clusters of %u", grid.x,
           launch.cluster);
    return;
  }
  if (launch.stream == nullptr) {
    report(kInvalidConfiguration, "a launch on the default stream, which is not the caller's");
    return;
  }
  if (!shared_allowed(kernel, launch.shared_bytes)) {
    report(kInvalidConfiguration,
           "%zu bytes of dynamic shared memory, which the kernel was not allowed",
           launch.shared_bytes);
    return;
  }
  FaultHandlers handlers;
  gridDim = grid;
  blockDim = block;
  g_state = g_seed;
  g_cluster.size = launch.cluster;
  g_cluster_launches += launch.cluster > 1;
  g_cluster.threads = unsigned(threads);
  g_cluster.thread = thread;
  g_cluster.closure = closure;
  // clusters in a permuted order as well: i -> (a * i + c) mod n with a coprime to n
  const uint64_t clusters = uint64_t(grid.x) * grid.y * grid.z / launch.cluster;
  uint64_t step = 1, start = 0;
  if (g_seed && clusters > 1) {
    do {
      step = 1 + random_below(clusters);
    } while (std::gcd(step, clusters) != 1);
    start = random_below(clusters);
  }
  for (uint64_t i = 0; i < clusters && !g_cluster.aborted; ++i) {
    const auto at = uint64_t((static_cast<unsigned __int128>(step) * i + start) % clusters);
    for (unsigned k = 0; k < launch.cluster; ++k) {
      const uint64_t n = at * launch.cluster + k;
      g_cluster.blocks[k].index = {unsigned(n % grid.x), unsigned(n / grid.x % grid.y),
                                   unsigned(n / (uint64_t(grid.x) * grid.y))};
    }
    run_cluster(launch.shared_bytes);
  }
}

int last_error() { return std::exchange(g_error, 0); }

}  // namespace lens::emulation

extern "C" {
__attribute__((visibility("default"))) void lens_emulation_seed(uint64_t seed) {
  lens::emulation::g_seed = seed;
  lens::emulation::g_cluster_launches = 0;
}
// Blocks of a cluster in the last launch.
__attribute__((visibility("default"))) int lens_emulation_cluster() {
  return int(lens::emulation::g_cluster.size);
}
// Launches of more than one block a cluster since the seed was set.
__attribute__((visibility("default"))) int lens_emulation_cluster_launches() {
  return lens::emulation::g_cluster_launches;
}
// What went wrong in the last launch that failed.
__attribute__((visibility("default"))) const char* lens_emulation_message() {
  return lens::emulation::g_message;
}
}
