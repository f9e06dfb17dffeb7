// What a running block has beyond its fibers: shared memory, barriers, wgmmas, registers. Shared
// by the files that implement hopper.h.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "emulation/hopper.h"
#include "emulation/scheduler.h"

namespace lens::emulation {

constexpr size_t kMostShared = 227 << 10;
constexpr uint32_t kFirstAddress = 1024;  // the runtime keeps the first 1024 bytes to itself
constexpr unsigned kWarpgroup = 128;

// ---- barriers: what the eight bytes in shared memory stand for
struct Barrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;  // expected and not yet copied
  uint64_t phase = 0;
  unsigned owner = 0;
  bool fenced = false;
  uint64_t made = 0;  // arrivals of the owner at the cluster's barrier before the fence
  std::vector<unsigned> waiting;
};
struct Wait {
  const Barrier* barrier = nullptr;
  uint32_t parity = 0;
  int named = 0;  // 0, and no barrier: the cluster's
};
struct NamedBarrier {
  int threads = 0, arrived = 0;
  std::vector<unsigned> waiting;
};

// ---- wgmmas
struct Wgmma {
  float* d;
  int n;
  bool from_registers, b_transposed, accumulate, done;
  uint32_t a[4];
  uint64_t a_bits, b_bits;
};
struct Accumulator {
  float* d;
  std::vector<float> values;  // what d will hold
};
struct Issue {
  uint64_t a_bits, b_bits;
  int n;
};

// ---- copies by threads
struct ThreadCopy {
  unsigned char* to;
  const void* from;  // null: zeros
  bool done;
};

struct Thread {
  std::deque<ThreadCopy> copies;   // not yet waited for, oldest first
  std::deque<size_t> copy_groups;  // how many of them each committed group holds
  size_t open_copies = 0;          // of the group that is not committed
  std::deque<Wgmma> wgmmas;        // not yet waited for, oldest first
  std::deque<uint64_t> groups;     // of each committed group the number of the wgmma after it
  uint64_t issued = 0;             // wgmmas so far
  std::vector<Accumulator> flying;
  bool fenced = false;
  uint64_t cluster_arrived = 0, cluster_waited = 0;  // at the cluster's barrier so far

  uint64_t first() const { return issued - wgmmas.size(); }
};

struct BlockState {
  char* mapping = nullptr;  // its end, before an inaccessible page
  unsigned char* shared = nullptr;
  size_t bytes = 0;
  std::map<const void*, Barrier> barriers;
  std::vector<Wait> waits{kMaxThreads};
  NamedBarrier named[16];
  std::vector<Thread> threads{kMaxThreads};
  std::vector<Issue> issues[kMaxThreads / kWarpgroup];
  int registers[kMaxThreads / kWarpgroup] = {};
  int pool = 0;  // registers of the launch, which is all that its warpgroups can share
};
extern BlockState g_blocks[kMostBlocks];  // of the cluster that runs

inline BlockState& here() { return g_blocks[current_block()]; }

void need_shared(const void* p, size_t bytes, const char* what);
// What lies at p in the running block, in block `rank` of its cluster.
void* in_block(unsigned rank, const void* p);
// Chunk of a row of 128 bytes by the three address bits above it; shared memory starts on an atom.
inline unsigned char* swizzled(unsigned char* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return p + ((address ^ ((address >> 7 & 7) << 4)) - address);
}

// The barrier at `bar` of block `rank`, which the running thread may use; `what` it does.
Barrier& find_barrier(unsigned rank, uint64_t* bar, const char* what);
void complete(unsigned rank, Barrier& b);  // its phase, if nothing is missing

void begin_cluster_barrier(unsigned threads);  // of all blocks
void leave_cluster_barrier();                  // the running thread returns

void begin_copies();
size_t copies_under_way(unsigned rank);  // into a block, from any

}  // namespace lens::emulation
