// What csrc/emulation/cuda/hopper.cuh is made of: barriers with byte counts, tile copies, wgmma,
// all as late or as early as the seed has it.
//
// Faithful: phases, parities, arrival and byte counts of barriers; boxes, bounds, zero fill and
// swizzle of copies; descriptor bits and fragments of wgmma. Asynchronous: a copy arrives when no
// thread can go on (seed 0 and even ones) or at any time, in any order (odd ones); a wgmma reads
// shared memory when its group is waited for or (seeds but 0) when issued, whichever is drawn, warp
// by warp, and its accumulators are NaN in between. So a missing wait, one that waits for
// too little, a buffer that is given back too early, a barrier that miscounts end as wrong numbers,
// a deadlock or an error. Also an error: barriers used before they are initialised and fenced, more
// arrivals than a phase has, copies that miss shared memory or its alignment or are under way when
// the block ends, maps that reach past their array, descriptors on which the threads of a
// warpgroup disagree, a wgmma without fence, wgmmas that are not waited for, register counts beyond
// the file, more shared memory than the launch gave.
//
// The blocks of a cluster run at the same time, each with its own shared memory; a copy to several
// reaches each of them when the seed has it. Errors: an arrival or a copy at a block that returned
// or whose barriers no cluster barrier stands behind, copies under way to a block that returns,
// masks and ranks beyond the cluster, static __shared__ arrays (one for all blocks) in a cluster.
//
// From sm_80 on: a copy by a thread arrives when its thread waits for it, or (seeds but 0) when it
// is issued, whichever is drawn; one that is not waited for is an error. An mma is a warp operation
// like a shuffle.
//
// Not seen: a missing fence_async_shared(); memory order between threads; what the hardware makes
// of other descriptor bits, swizzles and layouts than the PTX description (one reading serves
// kernel and emulation alike; CuTe's agrees, tests/emulation/test_cute.py); A registers that
// change before the wait; setmaxnreg that waits; rounding inside wgmma and mma; bank conflicts,
// registers, time; which launch bounds and how many clusters a device takes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulation/cuda.h"

namespace lens::emulation {

// ---- called by the scheduler
void begin_block(unsigned rank, size_t shared_bytes);  // every block of a cluster, 0 first
bool deliver();                                        // one copy under way; false: none is
void end_thread();              // what the running thread leaves open is an error
void end_block(unsigned rank);  // what the block leaves open is an error
const char* waits_for(unsigned rank, unsigned thread);  // for the deadlock report

// ---- called by device code; `line` is the caller's
unsigned char* dynamic_shared();
uint32_t shared_address(const void* p);

void barrier_init(uint64_t* bar, int arrivals);
void fence_barrier_init();
void barrier_arrive(uint64_t* bar, int bytes);  // bytes: expected by the same arrival, or 0
void barrier_wait(uint64_t* bar, uint32_t parity, int line);

void cluster_arrive(int line);
void cluster_wait(int line);
uint32_t cluster_address(const void* p, unsigned rank);
void cluster_barrier_arrive(uint32_t address);

void tma_prefetch(const CUtensorMap* map);
// mask: a bit for each block of the cluster that it lands in, at the same place
void tma_load(void* to, const CUtensorMap* map, uint64_t* bar, uint32_t mask, int rank,
              const int* at);

void cp_async(void* to, const void* from, bool there);  // 16 bytes by the running thread
void cp_async_commit();
void cp_async_wait(int pending);
void mma(float* d, const uint32_t* a, const uint32_t* b, int line);

// a: four registers, or null and then a descriptor
void wgmma(float* d, int n, const uint32_t* a, uint64_t a_bits, uint64_t b_bits, bool b_transposed,
           bool accumulate);
void wgmma_fence(int line);
void wgmma_commit(int line);
void wgmma_wait(int pending, float* const* touched, int count, int line);

void set_registers(int registers, bool up, int line);
void named_barrier(int id, int threads, bool wait, int line);

// ---- called by the launchers, through the stand-ins of cuda_runtime.h
int multiprocessors();
int compute_capability();  // its major number
void bind_context();       // to the calling thread, which has none when a launcher is called
bool context_bound();
int allow_shared(const void* kernel, int bytes);
bool shared_allowed(const void* kernel, size_t bytes);

}  // namespace lens::emulation
