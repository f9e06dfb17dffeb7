// Barriers with byte counts, named barriers and the cluster's.
#include <cstdio>

#include "emulation/block_state.h"

namespace lens::emulation {
namespace {

struct ClusterBarrier {
  unsigned live = 0, arrived = 0;  // threads of all blocks
  uint64_t phase = 0;
  struct Sleeper {
    unsigned block, thread;
  };
  std::vector<Sleeper> waiting;
};
ClusterBarrier g_everyone;
char g_waiting[160];

uint64_t marker(const uint64_t* bar) {
  return reinterpret_cast<uintptr_t>(bar) ^ 0xba221e2ba221e2ull;
}

void arrive(unsigned rank, Barrier& b, int bytes) {
  if (b.pending == 0) {
    fail("arrives at a barrier that has all its %d arrivals and waits for %lld bytes", b.arrivals,
         static_cast<long long>(b.bytes));
  }
  b.bytes += bytes;
  if (b.bytes >= 1 << 20) fail("a barrier that waits for 2^20 bytes or more");
  --b.pending;
  complete(rank, b);
}

void complete_everyone() {
  if (g_everyone.arrived < g_everyone.live) return;
  ++g_everyone.phase;
  g_everyone.arrived = 0;
  for (const auto& [block, thread] : g_everyone.waiting) wake(block, thread);
  g_everyone.waiting.clear();
}

}  // namespace

// ---- in shared memory
void complete(unsigned rank, Barrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.arrivals;
  for (unsigned thread : b.waiting) wake(rank, thread);
  b.waiting.clear();
}

Barrier& find_barrier(unsigned rank, uint64_t* bar, const char* what) {
  if (block_returned(rank)) fail("%s a barrier of block %u, which has returned", what, rank);
  auto& barriers = g_blocks[rank].barriers;
  const auto found = barriers.find(bar);
  if (found == barriers.end()) fail("%s a barrier that was never initialised", what);
  if (*bar != marker(bar)) fail("%s a barrier whose memory was overwritten", what);
  const bool own = rank == current_block();
  Barrier& b = found->second;
  if (!b.fenced && (!own || b.owner != current_thread())) {
    fail("%s a barrier without fence_barrier_init() after its initialisation", what);
  }
  if (!own && here().threads[current_thread()].cluster_waited <= b.made) {
    fail("%s a barrier of block %u without a cluster barrier after its initialisation", what, rank);
  }
  return b;
}

void barrier_init(uint64_t* bar, int arrivals) {
  need_shared(bar, 8, "a barrier");
  if (arrivals < 1 || arrivals >= 1 << 20) fail("a barrier of %d arrivals", arrivals);
  if (here().barriers.count(bar)) fail("initialises a barrier twice");
  Barrier& b = here().barriers[bar];
  b.arrivals = b.pending = arrivals;
  b.owner = current_thread();
  *bar = marker(bar);
}

void fence_barrier_init() {
  for (auto& [address, barrier] : here().barriers) {
    if (barrier.owner != current_thread() || barrier.fenced) continue;
    barrier.fenced = true;
    barrier.made = here().threads[current_thread()].cluster_arrived;
  }
}

void barrier_arrive(uint64_t* bar, int bytes) {
  arrive(current_block(), find_barrier(current_block(), bar, "arrives at"), bytes);
}

void barrier_wait(uint64_t* bar, uint32_t parity, int line) {
  Barrier& b = find_barrier(current_block(), bar, "waits at");
  if (parity > 1) fail("waits for parity %u", parity);
  if ((b.phase & 1) != parity) return;
  const unsigned self = current_thread();
  here().waits[self] = Wait{&b, parity, 0};
  b.waiting.push_back(self);
  suspend(line);
}

// ---- of a cluster: an address names the block in its upper bits, 0 the running one
uint32_t cluster_address(const void* p, unsigned rank) {
  need_shared(p, 1, "an address in a cluster");
  if (rank >= cluster_blocks()) {
    fail("an address in block %u of a cluster of %u", rank, cluster_blocks());
  }
  return (rank + 1) << 24 | shared_address(p);
}

void cluster_barrier_arrive(uint32_t address) {
  const unsigned rank = address >> 24 ? (address >> 24) - 1 : current_block();
  if (rank >= cluster_blocks()) fail("arrives at an address of no block of the cluster");
  auto* own = here().shared + (address & 0xffffff) - kFirstAddress;
  need_shared(own, 8, "a barrier");
  auto* bar = static_cast<uint64_t*>(in_block(rank, own));
  arrive(rank, find_barrier(rank, bar, "arrives at"), 0);
}

void begin_cluster_barrier(unsigned threads) {
  g_everyone = ClusterBarrier{};
  g_everyone.live = threads;
}

void cluster_arrive(int line) {
  warp_operation(WarpOp::kSync, ~0u, 0, 0, 32, line);
  Thread& t = here().threads[current_thread()];
  if (t.cluster_arrived != t.cluster_waited) fail("arrives twice at the cluster's barrier");
  ++t.cluster_arrived;
  ++g_everyone.arrived;
  complete_everyone();
}

void cluster_wait(int line) {
  warp_operation(WarpOp::kSync, ~0u, 0, 0, 32, line);
  Thread& t = here().threads[current_thread()];
  if (t.cluster_arrived == t.cluster_waited) fail("waits at the cluster's barrier, never arrived");
  if (g_everyone.phase < t.cluster_arrived) {
    here().waits[current_thread()] = Wait{};
    g_everyone.waiting.push_back({current_block(), current_thread()});
    suspend(line);
  }
  t.cluster_waited = t.cluster_arrived;
}

void leave_cluster_barrier() {  // which waits for threads that have not returned
  --g_everyone.live;
  if (here().threads[current_thread()].cluster_arrived > g_everyone.phase) --g_everyone.arrived;
  if (g_everyone.live && g_everyone.arrived) complete_everyone();
}

// ---- named
void named_barrier(int id, int threads, bool wait, int line) {
  if (id < 1 || id > 15) fail("named barrier %d: 1 to 15 are free, 0 is __syncthreads()", id);
  if (threads < 32 || threads % 32) fail("named barrier %d of %d threads", id, threads);
  NamedBarrier& b = here().named[id];
  if (b.arrived && b.threads != threads) {
    fail("named barrier %d of %d threads, others said %d", id, threads, b.threads);
  }
  b.threads = threads;
  if (++b.arrived < threads) {
    if (!wait) return;
    here().waits[current_thread()] = Wait{nullptr, 0, id};
    b.waiting.push_back(current_thread());
    suspend(line);
    return;
  }
  b.arrived = 0;
  for (unsigned thread : b.waiting) wake(current_block(), thread);
  b.waiting.clear();
}

const char* waits_for(unsigned rank, unsigned thread) {
  const Wait& wait = g_blocks[rank].waits[thread];
  if (wait.barrier) {
    std::snprintf(g_waiting, sizeof g_waiting,
                  "parity %u of a barrier in phase %llu that lacks %d arrivals and %lld bytes",
                  wait.parity, static_cast<unsigned long long>(wait.barrier->phase),
                  wait.barrier->pending, static_cast<long long>(wait.barrier->bytes));
  } else if (wait.named) {
    const NamedBarrier& named = g_blocks[rank].named[wait.named];
    std::snprintf(g_waiting, sizeof g_waiting, "named barrier %d, which has %d of %d threads",
                  wait.named, named.arrived, named.threads);
  } else {
    std::snprintf(g_waiting, sizeof g_waiting, "the cluster's barrier, which has %u of %u threads",
                  g_everyone.arrived, g_everyone.live);
  }
  return g_waiting;
}

}  // namespace lens::emulation
