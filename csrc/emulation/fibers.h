// The fibers of the blocks that run at a time, one per CUDA thread. Shared by scheduler.cpp,
// fibers.cpp and warp_operations.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "emulation/scheduler.h"

namespace lens::emulation {

// the cudaError_t values a device would return
constexpr int kInvalidConfiguration = 9, kIllegalAddress = 700, kLaunchTimeout = 702,
              kMisaligned = 716, kInvalidClusterSize = 912;
constexpr unsigned kWarp = 32;

enum class State { kReady, kBarrier, kWarpOp, kSuspended, kDone };

struct Fiber {
  void* stack_pointer = nullptr;
  State state = State::kDone;
  int line = 0;  // where it waits
  WarpOp op = WarpOp::kSync;
  uint32_t mask = 0;
  int argument = 0, width = 0;
  uint64_t sent = 0, received = 0;
};

struct Block {
  std::unique_ptr<char[]> stacks;
  std::vector<Fiber> fibers;
  uint3 index{};
  unsigned live = 0, at_barrier = 0;
};

struct ThreadId {  // within its cluster, within its block
  unsigned block, thread;
};

struct Cluster {
  Block blocks[kMostBlocks];
  unsigned size = 1, threads = 0;  // blocks, threads of each
  ThreadId at{};                   // of the fiber that runs
  bool inside = false;             // false: the scheduler itself runs
  bool aborted = false;
  void* scheduler_stack = nullptr;
  void (*thread)(void*) = nullptr;
  void* closure = nullptr;
};
extern Cluster g_cluster;

inline Block& block() { return g_cluster.blocks[g_cluster.at.block]; }
inline Fiber& self() { return block().fibers[g_cluster.at.thread]; }

void make_ready(ThreadId id);
void make_all_ready(unsigned block);  // whole warps, in the seed's order

void start_fiber(ThreadId id);
void resume(ThreadId id);  // returns when the fiber gives way
void to_scheduler();       // gives way
[[noreturn]] void abandon_fiber();
bool stack_overrun(ThreadId id);

// Turns faults of device code into reports for as long as it lives.
class FaultHandlers {
 public:
  FaultHandlers();
  ~FaultHandlers();

 private:
  struct Saved;
  std::unique_ptr<Saved> saved_;
};

}  // namespace lens::emulation
