// Stand-in for csrc/cuda/hopper.cuh, found first on the include path when a kernel is compiled for
// the host. emulation/hopper.h says what it is faithful to.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda/shared_matrix.cuh"
#include "cuda_runtime.h"
#include "emulation/hopper.h"

#define LENS_DYNAMIC_SHARED(name) unsigned char* const name = lens::emulation::dynamic_shared()

namespace lens::gpu {

namespace host = lens::emulation;

inline uint32_t shared_address(const void* p) { return host::shared_address(p); }

inline void barrier_init(uint64_t* bar, int arrivals) { host::barrier_init(bar, arrivals); }
inline void fence_barrier_init() { host::fence_barrier_init(); }
inline void barrier_arrive(uint64_t* bar) { host::barrier_arrive(bar, 0); }
inline void barrier_arrive_expect_tx(uint64_t* bar, int bytes) { host::barrier_arrive(bar, bytes); }
inline void barrier_wait(uint64_t* bar, uint32_t parity, int line = __builtin_LINE()) {
  host::barrier_wait(bar, parity, line);
}

inline unsigned cluster_rank() { return host::current_block(); }
inline void cluster_arrive(int line = __builtin_LINE()) { host::cluster_arrive(line); }
inline void cluster_wait(int line = __builtin_LINE()) { host::cluster_wait(line); }
inline uint32_t cluster_address(const void* p, unsigned rank) {
  return host::cluster_address(p, rank);
}
inline void cluster_barrier_arrive(uint32_t address) { host::cluster_barrier_arrive(address); }

inline void tma_prefetch(const CUtensorMap* map) { host::tma_prefetch(map); }
inline void tma_load_2d(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y) {
  const int at[] = {x, y};
  host::tma_load(to, map, bar, 1u << host::current_block(), 2, at);
}
inline void tma_load_5d(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y, int z, int w,
                        int v) {
  const int at[] = {x, y, z, w, v};
  host::tma_load(to, map, bar, 1u << host::current_block(), 5, at);
}
inline void tma_multicast_2d(void* to, const CUtensorMap* map, uint64_t* bar, uint16_t mask, int x,
                             int y) {
  const int at[] = {x, y};
  host::tma_load(to, map, bar, mask, 2, at);
}
inline void tma_multicast_5d(void* to, const CUtensorMap* map, uint64_t* bar, uint16_t mask, int x,
                             int y, int z, int w, int v) {
  const int at[] = {x, y, z, w, v};
  host::tma_load(to, map, bar, mask, 5, at);
}
inline void fence_async_shared() {}

inline void wgmma_fence(int line = __builtin_LINE()) { host::wgmma_fence(line); }
inline void wgmma_commit(int line = __builtin_LINE()) { host::wgmma_commit(line); }
// The caller's line is not to be had beside a parameter pack: the number of what it touches and the
// depth tell two places apart well enough for the warp's convergence check.
template <int kPending, int... kSizes>
inline void wgmma_wait(float (&... d)[kSizes]) {
  float* const touched[] = {d..., nullptr};
  host::wgmma_wait(kPending, touched, int(sizeof...(kSizes)), 1000000 + kPending);
}
template <int N, Major kB = Major::kK>
inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  host::wgmma(d, N, nullptr, a, b, kB == Major::kMN, accumulate);
}
template <int N, Major kB = Major::kK>
inline void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  host::wgmma(d, N, a, 0, b, kB == Major::kMN, accumulate);
}

inline void cp_async_16(void* to, const void* from, bool there) { host::cp_async(to, from, there); }
inline void cp_async_commit() { host::cp_async_commit(); }
template <int kPending>
inline void cp_async_wait() {
  host::cp_async_wait(kPending);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                int line = __builtin_LINE()) {
  host::mma(d, a, b, line);
}
inline uint32_t byte_permute(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = uint64_t(y) << 32 | x;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t chosen = selector >> 4 * i & 15;
    uint32_t byte = uint32_t(both >> 8 * (chosen & 7)) & 255;
    if (chosen & 8) byte = byte & 128 ? 255 : 0;
    bytes |= byte << 8 * i;
  }
  return bytes;
}

template <int kRegisters>
inline void registers_down(int line = __builtin_LINE()) {
  host::set_registers(kRegisters, false, line);
}
template <int kRegisters>
inline void registers_up(int line = __builtin_LINE()) {
  host::set_registers(kRegisters, true, line);
}
inline void named_barrier_sync(int id, int threads, int line = __builtin_LINE()) {
  host::named_barrier(id, threads, true, line);
}
inline void named_barrier_arrive(int id, int threads, int line = __builtin_LINE()) {
  host::named_barrier(id, threads, false, line);
}
inline bool elect_one(int line = __builtin_LINE()) {
  host::warp_operation(host::WarpOp::kSync, 0xffffffffu, 0, 0, 32, line);
  return threadIdx.x % 32 == 0;
}
inline float exp2_approx(float x) {  // relative error 2^-22 (PTX ISA, "ex2")
  const float y =
      host::with_error(std::exp2(double(x)), 2, host::Inexact::kExp2, host::argument_bits(x));
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float max_or_nan(float x, float y) { return x > y || x != x ? x : y; }

}  // namespace lens::gpu
