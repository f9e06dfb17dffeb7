// A block's shared memory and register file: given at its start, held to their bounds at its end.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "emulation/block_state.h"

namespace lens::emulation {

BlockState g_blocks[kMostBlocks];

namespace {

constexpr size_t kPage = 4096;
constexpr unsigned char kPoison = 0xff, kMark = 0xa7;

bool map_shared(BlockState& block) {
  if (block.mapping) return true;
  const size_t most = (kMostShared + kPage - 1) / kPage * kPage;
  void* mapping = mmap(nullptr, most + kPage, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED || mprotect(static_cast<char*>(mapping) + most, kPage, PROT_NONE)) {
    report(kLaunchFailure, "out of memory for the emulated shared memory");
    return false;
  }
  block.mapping = static_cast<char*>(mapping) + most;
  return true;
}

}  // namespace

void begin_block(unsigned rank, size_t shared_bytes) {
  BlockState& block = g_blocks[rank];
  if (!map_shared(block)) return;
  const size_t room = (shared_bytes + 1023) / 1024 * 1024;
  block.shared = reinterpret_cast<unsigned char*>(block.mapping - room);
  block.bytes = shared_bytes;
  std::memset(block.shared, kPoison, shared_bytes);
  std::memset(block.shared + shared_bytes, kMark, room - shared_bytes);
  block.barriers.clear();
  for (NamedBarrier& barrier : block.named) barrier = NamedBarrier{};
  for (unsigned i = 0; i < block_threads(); ++i) {
    block.waits[i] = Wait{};
    block.threads[i] = Thread{};
  }
  for (auto& issues : block.issues) issues.clear();
  const int threads = int(block_threads() ? block_threads() : 1);
  const int fair = std::min(65536 / threads / 8 * 8, 256);
  block.pool = fair * threads;
  for (int& registers : block.registers) registers = std::min(fair, 255);
  if (rank == 0) {
    begin_copies();
    begin_cluster_barrier(cluster_blocks() * block_threads());
  }
}

void end_thread() {
  const Thread& t = here().threads[current_thread()];
  if (!t.copies.empty()) fail("returned before its %zu copies were waited for", t.copies.size());
  if (!t.wgmmas.empty()) fail("returned before its wgmmas were waited for");
  leave_cluster_barrier();
}

void end_block(unsigned rank) {
  const BlockState& block = g_blocks[rank];
  if (const size_t copies = copies_under_way(rank)) {
    report(kLaunchFailure, "%zu copies are still under way when the block ends", copies);
  }
  for (size_t i = block.bytes; i % 1024; ++i) {
    if (block.shared[i] == kMark) continue;
    report(kLaunchFailure, "wrote past the end of %zu bytes of dynamic shared memory", block.bytes);
    break;
  }
  int sum = 0;
  for (unsigned i = 0; i < block_threads() / kWarpgroup; ++i) sum += block.registers[i];
  if (sum * int(kWarpgroup) > block.pool) {
    report(kLaunchFailure, "the warpgroups ask for %d registers, the launch has %d",
           sum * int(kWarpgroup), block.pool);
  }
}

void need_shared(const void* p, size_t bytes, const char* what) {
  const BlockState& block = here();
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < block.shared || at + bytes > block.shared + block.bytes) {
    fail("%s leaves the block's %zu bytes of dynamic shared memory", what, block.bytes);
  }
}

unsigned char* dynamic_shared() {
  if (here().bytes == 0) fail("uses dynamic shared memory, the launch gave none");
  return here().shared;
}

uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - here().shared) + kFirstAddress;
}

void* in_block(unsigned rank, const void* p) {
  return g_blocks[rank].shared + (static_cast<const unsigned char*>(p) - here().shared);
}

void set_registers(int registers, bool up, int line) {
  if (registers < 24 || registers > 256 || registers % 8) {
    fail("%d registers per thread: must be a multiple of 8 from 24 to 256", registers);
  }
  warp_operation(WarpOp::kSync, ~0u, 0, 0, 32, line);
  int& held = here().registers[current_thread() / kWarpgroup];
  if (current_thread() % kWarpgroup == 0) {
    if (up ? registers < held : registers > held) {
      fail("setmaxnreg %s %d registers from %d", up ? "up to" : "down to", registers, held);
    }
    held = registers;
  }
}

}  // namespace lens::emulation
