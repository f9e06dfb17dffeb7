// Runs the threads of a CUDA grid on one host thread: a fiber per CUDA thread, block after block,
// those of a cluster at the same time.
//
// A fiber runs until it meets a barrier or a warp operation, so what one thread does between two of
// those is never seen half done by another. The seed picks the next thread, and in which order the
// blocks run: 0, as they are numbered; odd, any ready thread; even, the one that became ready last,
// so a warp runs ahead as far as the next barrier lets it. Code that needs an order it does not
// enforce gives wrong numbers under some seed; shared memory holds NaN before every block. Reported
// as an error instead of hanging or passing: barriers that not all threads of a block reach, warp
// operations whose participants do not agree on mask and place, shuffles from lanes outside the
// mask, accesses outside guarded buffers, misaligned accesses and whatever else the compiler's
// trapping checks find, launches a device would refuse, launches on the default stream, which no
// caller means.
//
// What Hopper adds stands in hopper.h.
//
// Not modelled: weak memory order, preemption between two barriers, timing, occupancy, registers,
// bank conflicts. Approximate device functions are the host's, or have errors drawn within what is
// documented (inexact.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// what the running fiber sees; set on every switch
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace lens::emulation {

enum class WarpOp : int {
  kShuffle,
  kShuffleXor,
  kShuffleDown,
  kShuffleUp,
  kBallot,
  kSync,
  kProduct
};

// Called from device code, through the stand-ins of cuda_runtime.h.
void block_barrier(int line);
// Exchanges `bits` within the warp; returns what this lane receives.
uint64_t warp_operation(WarpOp op, uint32_t mask, uint64_t bits, int argument, int width, int line);
[[noreturn]] void fail(const char* format, ...);

// Called from the other parts of the emulator.
constexpr unsigned kMaxThreads = 1024, kMostBlocks = 8;  // of a block, of a cluster
unsigned current_thread();                               // within its block
unsigned current_block();                                // within its cluster
unsigned block_threads();
unsigned cluster_blocks();
bool block_returned(unsigned rank);
uint64_t seed();
uint64_t random_below(uint64_t n);
void suspend(int line);  // the running thread, until it is woken
void wake(unsigned rank, unsigned thread);
constexpr int kLaunchFailure = 719;  // the cudaError_t a device would return
// An error of no thread: of a launch or of a copy.
void report(int code, const char* format, ...);

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  const void* stream = nullptr;
  unsigned cluster = 1;  // neighbouring blocks along x
};
// Checks the launch as a device would, then runs every thread of the grid; the outcome is the next
// last_error().
void run_grid(const char* name, const void* kernel, const Launch& launch, void (*thread)(void*),
              void* closure);

// 0, or the cudaError_t of the first failed launch since the last call.
int last_error();

// The kernel's parameters are copied once at launch, as on the device.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& launch,
            Arguments&&... arguments) {
  struct Closure {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } closure{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  run_grid(
      name, reinterpret_cast<const void*>(kernel), launch,
      [](void* raw) {
        auto* c = static_cast<Closure*>(raw);
        std::apply(c->kernel, c->parameters);
      },
      &closure);
}

}  // namespace lens::emulation
