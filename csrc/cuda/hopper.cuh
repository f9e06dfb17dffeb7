// What Hopper (sm_90a) adds to CUDA C++: barriers with byte counts, tile copies by the TMA unit,
// matrix products of a warpgroup (wgmma); and, from sm_80 on, copies by threads (cp.async), matrix
// products of a warp (mma) and byte permutations. The only file with inline PTX;
// csrc/emulation/cuda/hopper.cuh stands in for it on the host, with the same names and the same
// demands. A thread is one of 128 of its warpgroup; "warp" marks what all 32 lanes, "warpgroup"
// what all 128 threads must call together.
//
//   LENS_DYNAMIC_SHARED(name)            the block's dynamic shared memory, 1024-byte aligned
//   barrier_init(bar, arrivals)          one thread; then fence_barrier_init(), then
//                                        __syncthreads(), in a cluster its barrier
//   barrier_arrive(bar)                  one arrival of the current phase
//   barrier_arrive_expect_tx(bar, bytes) the same, and the phase waits for `bytes` of copies
//   barrier_wait(bar, parity)            until the phase of that parity is over. A fresh barrier
//                                        passes parity 1 and blocks parity 0
//   cluster_rank()                       this block's place in its cluster
//   cluster_arrive(), cluster_wait()     warp: the cluster's barrier, for all threads of all blocks
//                                        that have not returned
//   cluster_address(p, rank)             of what lies at p in this block, in block `rank`
//   cluster_barrier_arrive(address)      barrier_arrive at a barrier of any block of the cluster,
//                                        which must not have returned; only its own block waits
//                                        there. Says that reads are over, publishes no writes
//   tma_prefetch(map)                    the map itself into the cache, by one thread
//   tma_load_{2,5}d(to, map, bar, x, y..)  one box into shared memory, by one thread; x
//                                        innermost, in elements; what lies outside arrives as zero
//                                        and counts
//   tma_multicast_{2,5}d(to, map, bar, mask, x, y..)  the same box to the same place in each
//                                        block whose rank is a bit of mask; its bytes count at the
//                                        barrier in the place of bar in each
//   fence_async_shared()                 own writes to shared memory become visible to TMA and
//                                        wgmma
//   wgmma<N, kB>(d, a, b, accumulate)    warpgroup: d [64, N] (+)= A [64, 16] B [16, N], bf16 in
//                                        shared memory, float accumulators. d is undefined until a
//                                        wait; its shared memory must stay until a wait
//   wgmma_rs<N, kB>(d, a, b, accumulate) the same with A in registers, which stay untouched too
//   wgmma_fence()                        warpgroup: before the first wgmma after registers of d or
//                                        a were written or read by other code
//   wgmma_commit()                       warpgroup: closes a group
//   wgmma_wait<n>(d..)                   warpgroup: all but the n newest groups are over; names
//                                        every accumulator that code below may touch
//   matrix_k(p), matrix_mn(p, block)     descriptors of 128-byte swizzled matrices, see below
//   registers_down<n>(), registers_up<n>()   warpgroup: gives back, takes registers per thread
//   named_barrier_sync(id, threads), named_barrier_arrive(id, threads)   warp; id 1 .. 15
//   elect_one()                          warp: true in exactly one lane
//   exp2_approx(x)                       2^x, 2 ulp, denormals are zero
//   max_or_nan(x, y)                     the larger, NaN where one of them is: fmaxf drops it
//
// From sm_80 on:
//
//   cp_async_16(to, from, there)         16 bytes from global to shared memory, both on 16-byte
//                                        boundaries; zeros, and nothing is read, unless `there`.
//                                        Seen by its thread after a wait, by others after a barrier
//   cp_async_commit()                    closes a group of the thread's copies, which may be none
//   cp_async_wait<n>()                   all but the n newest groups have arrived
//   mma(d, a, b)                         warp: d [16, 8] += A [16, 16] B [16, 8], bf16 in
//                                        registers, float accumulators
//   byte_permute(x, y, selector)         four bytes: nibble i of the selector names byte i of the
//                                        result, of x (0 to 3) or y (4 to 7); with the nibble's top
//                                        bit set, all its bits are that byte's top bit
//
// mma: with g = lane / 4, t = lane % 4, a[2 c + h] holds columns 8 c + 2 t + {0, 1} of row 8 h + g
// of A, b[c] rows 8 c + 2 t + {0, 1} of column g of B, lower one in the lower half; d[2 h + e] is
// row 8 h + g, column 2 t + e.
//
// Accumulators: d[4 j + 2 h + e] of thread t is row 16 (t / 32) + 8 h + (t % 32) / 4, column
// 8 j + 2 (t % 4) + e. A in registers: a[2 c + h] holds columns 8 c + 2 (t % 4) + {0, 1} of row
// 16 (t / 32) + 8 h + (t % 32) / 4, lower column in the lower half; that is the layout of
// accumulators 8 m .. 8 m + 7 rounded pairwise: a = {d[8 m] d[8 m + 1], d[8 m + 2] d[8 m + 3], ..}.
//
// A warp sees its own groups end: shared memory that a wgmma read is free once every one of the
// four warps has waited, so a barrier that frees it counts warps, not warpgroups.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/shared_matrix.cuh"

#define LENS_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace lens::gpu {

#define LENS_PTX __device__ __forceinline__

LENS_PTX uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(const_cast<void*>(p)));
}

// ---- barriers in shared memory
LENS_PTX void barrier_init(uint64_t* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals)
               : "memory");
}
LENS_PTX void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
LENS_PTX void barrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
LENS_PTX void barrier_arrive_expect_tx(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
}
LENS_PTX void barrier_wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra OVER_%=;\n"
      "bra AGAIN_%=;\n"
      "OVER_%=:\n"
      "}" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}

// ---- clusters
LENS_PTX unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
LENS_PTX void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
LENS_PTX void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
LENS_PTX uint32_t cluster_address(const void* p, unsigned rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}
// Release semantics of block scope, not of cluster scope: the latter puts a MEMBAR.GPU before every
// arrival, and an arrival here says that reads are over, not that writes are visible.
LENS_PTX void cluster_barrier_arrive(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}

// ---- tile copies
LENS_PTX void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
#define LENS_TMA_LOAD "cp.async.bulk.tensor."
#define LENS_TMA_FROM ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {"
LENS_PTX void tma_load_2d(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y) {
  asm volatile(LENS_TMA_LOAD "2d" LENS_TMA_FROM "%3, %4}], [%2];" ::"r"(shared_address(to)),
               "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y)
               : "memory");
}
LENS_PTX void tma_load_5d(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y, int z,
                          int w, int v) {
  asm volatile(LENS_TMA_LOAD "5d" LENS_TMA_FROM
                             "%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
               "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v)
               : "memory");
}
#define LENS_TMA_TO_ALL \
  ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {"
LENS_PTX void tma_multicast_2d(void* to, const CUtensorMap* map, uint64_t* bar, uint16_t mask,
                               int x, int y) {
  asm volatile(LENS_TMA_LOAD "2d" LENS_TMA_TO_ALL "%4, %5}], [%2], %3;" ::"r"(shared_address(to)),
               "l"(map), "r"(shared_address(bar)), "h"(mask), "r"(x), "r"(y)
               : "memory");
}
LENS_PTX void tma_multicast_5d(void* to, const CUtensorMap* map, uint64_t* bar, uint16_t mask,
                               int x, int y, int z, int w, int v) {
  asm volatile(LENS_TMA_LOAD "5d" LENS_TMA_TO_ALL
                             "%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(shared_address(to)),
               "l"(map), "r"(shared_address(bar)), "h"(mask), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v)
               : "memory");
}
#undef LENS_TMA_LOAD
#undef LENS_TMA_FROM
#undef LENS_TMA_TO_ALL
LENS_PTX void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- wgmma
LENS_PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LENS_PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// The empty statements tie the values of d to this place: no use of them moves above the wait.
template <int kPending, int... kSizes>
LENS_PTX void wgmma_wait(float (&... d)[kSizes]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  const auto hold = [](auto& values) {
#pragma unroll
    for (float& value : values) asm volatile("" : "+f"(value)::"memory");
  };
  (hold(d), ...);
}

template <int N, Major kB>
struct Wgmma;

#define LENS_D0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LENS_D1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LENS_D2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define LENS_D3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LENS_D4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define LENS_D5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define LENS_D6 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define LENS_D7 \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LENS_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LENS_F16(i) LENS_F4(i), LENS_F4(i + 4), LENS_F4(i + 8), LENS_F4(i + 12)
#define LENS_F32 LENS_F16(0), LENS_F16(16)
#define LENS_F64 LENS_F32, LENS_F16(32), LENS_F16(48)
#define LENS_F96 LENS_F64, LENS_F16(64), LENS_F16(80)
#define LENS_F112 LENS_F96, LENS_F16(96)
#define LENS_F128 LENS_F112, LENS_F16(112)

// The operands behind the N / 2 accumulators are numbered from N / 2: o0 is the first of them.
#define LENS_WGMMA(N, list, outputs, o0, o1, o2, o3, o4, o5, o6)                                 \
  template <Major kB>                                                                            \
  struct Wgmma<N, kB> {                                                                          \
    static LENS_PTX void shared(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {     \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2                                      \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" list "}, %" #o0  \
                   ", %" #o1 ", p, 1, 1, 0, %" #o3 ";\n}"                                        \
                   : outputs                                                                     \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(int(kB)));                             \
    }                                                                                            \
    static LENS_PTX void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,        \
                                   int accumulate) {                                             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5                                      \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" list "}, {%" #o0 \
                   ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, %" #o6 ";\n}"            \
                   : outputs                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),        \
                     "n"(int(kB)));                                                              \
    }                                                                                            \
  };
#define LENS_L32 LENS_D0 ", " LENS_D1
#define LENS_L64 LENS_L32 ", " LENS_D2 ", " LENS_D3
#define LENS_L96 LENS_L64 ", " LENS_D4 ", " LENS_D5
#define LENS_L112 LENS_L96 ", " LENS_D6
#define LENS_L128 LENS_L112 ", " LENS_D7
LENS_WGMMA(64, LENS_L32, LENS_F32, 32, 33, 34, 35, 36, 37, 38)
LENS_WGMMA(128, LENS_L64, LENS_F64, 64, 65, 66, 67, 68, 69, 70)
LENS_WGMMA(192, LENS_L96, LENS_F96, 96, 97, 98, 99, 100, 101, 102)
LENS_WGMMA(224, LENS_L112, LENS_F112, 112, 113, 114, 115, 116, 117, 118)
LENS_WGMMA(256, LENS_L128, LENS_F128, 128, 129, 130, 131, 132, 133, 134)
#undef LENS_WGMMA

template <int N, Major kB = Major::kK>
LENS_PTX void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<N, kB>::shared(d, a, b, accumulate);
}
template <int N, Major kB = Major::kK>
LENS_PTX void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  Wgmma<N, kB>::registers(d, a, b, accumulate);
}

// ---- from sm_80 on
LENS_PTX void cp_async_16(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
LENS_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
LENS_PTX void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
LENS_PTX void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LENS_PTX uint32_t byte_permute(uint32_t x, uint32_t y, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(x), "r"(y), "r"(selector));
  return bytes;
}

// ---- the rest
template <int kRegisters>
LENS_PTX void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
LENS_PTX void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
LENS_PTX void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
LENS_PTX void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
LENS_PTX bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}"
               : "=r"(elected)::"memory");
  return elected != 0;
}
LENS_PTX float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LENS_PTX float max_or_nan(float x, float y) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
}
#undef LENS_PTX

}  // namespace lens::gpu
