// wgmma, the matrix product of a warpgroup: descriptors, fragments, groups.
#include <cstring>
#include <limits>
#include <utility>

#include "emulation/block_state.h"
#include "emulation/scheduler.h"
#include "math/types.h"

namespace lens::emulation {
namespace {

// Eight bf16 at a 16-byte chunk.
void read_chunk(uint32_t address, float* out) {
  const auto* p = here().shared + (address - kFirstAddress);
  need_shared(p, 16, "a matrix descriptor");
  uint16_t raw[8];
  std::memcpy(raw, swizzled(const_cast<unsigned char*>(p)), 16);
  for (int i = 0; i < 8; ++i) out[i] = lens::bits_to_float(uint32_t(raw[i]) << 16);
}

struct Descriptor {
  uint32_t start, leading, stride;
  explicit Descriptor(uint64_t bits)
      : start(uint32_t(bits & 0x3fff) << 4),
        leading(uint32_t(bits >> 16 & 0x3fff) << 4),
        stride(uint32_t(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) fail("only 128-byte swizzled matrices are emulated");
    if (bits >> 49 & 7) fail("a matrix descriptor with a base offset: tiles start on 1024 bytes");
    if (stride % 1024) fail("a matrix descriptor whose stride of %u is no atom's", stride);
  }
};

// 16 elements of K of row `row` of a matrix whose K lies along the rows.
void read_row(const Descriptor& m, int row, float* out) {
  const uint32_t at = m.start + uint32_t(row / 8) * m.stride + uint32_t(row % 8) * 128;
  read_chunk(at, out);
  read_chunk(at + 16, out + 8);
}

// Columns n and n + 1 (of 8) of a transposed B: 16 elements of K each.
void read_columns(const Descriptor& m, int n, float* first, float* second) {
  for (int k = 0; k < 16; ++k) {
    float chunk[8];
    read_chunk(m.start + uint32_t(n / 64) * m.leading + uint32_t(k / 8) * m.stride +
                   uint32_t(k % 8) * 128 + uint32_t(n % 64 / 8) * 16,
               chunk);
    first[k] = chunk[n % 8];
    second[k] = chunk[n % 8 + 1];
  }
}

Accumulator& accumulator(Thread& t, const float* d) {
  for (Accumulator& a : t.flying) {
    if (a.d == d) return a;
  }
  fail("a wgmma whose accumulators are not under way");
}

// wgmma `number` of a thread. A in registers: row and columns lie in four lanes, all of which
// have issued and none of which has gone on.
void run(Thread& t, uint64_t number) {
  Wgmma& p = t.wgmmas[size_t(number - t.first())];
  if (std::exchange(p.done, true)) return;
  const unsigned self = current_thread(), lane = self % 32, warp = self % kWarpgroup / 32;
  float a[2][16], b[2][16];
  for (unsigned h = 0; h < 2; ++h) {
    if (!p.from_registers) {
      read_row(Descriptor(p.a_bits), int(16 * warp + 8 * h + lane / 4), a[h]);
      continue;
    }
    for (unsigned k = 0; k < 16; ++k) {
      const Thread& other = here().threads[self - lane % 4 + k % 8 / 2];
      if (number < other.first() || number >= other.issued) {
        fail("the lanes of a warp disagree on their wgmmas");
      }
      const uint32_t word = other.wgmmas[size_t(number - other.first())].a[k / 8 * 2 + h];
      a[h][k] = lens::bits_to_float(k % 2 ? word & 0xffff0000u : word << 16);
    }
  }
  std::vector<float>& d = accumulator(t, p.d).values;
  if (!p.accumulate) d.assign(d.size(), 0.0f);
  const Descriptor m(p.b_bits);
  for (int j = 0; j < p.n / 8; ++j) {
    const int column = 8 * j + 2 * int(lane % 4);
    if (p.b_transposed) {
      read_columns(m, column, b[0], b[1]);
    } else {
      read_row(m, column, b[0]);
      read_row(m, column + 1, b[1]);
    }
    for (int h = 0; h < 2; ++h) {
      for (int e = 0; e < 2; ++e) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += a[h][k] * b[e][k];
        d[size_t(4 * j + 2 * h + e)] += sum;
      }
    }
  }
}

}  // namespace

void wgmma(float* d, int n, const uint32_t* a, uint64_t a_bits, uint64_t b_bits, bool b_transposed,
           bool accumulate) {
  const unsigned self = current_thread();
  Thread& t = here().threads[self];
  auto& issues = here().issues[self / kWarpgroup];
  const uint64_t index = t.issued++;
  if (index == issues.size()) {
    issues.push_back({a_bits, b_bits, n});
  } else if (issues[index].a_bits != a_bits || issues[index].b_bits != b_bits ||
             issues[index].n != n) {
    fail("the threads of a warpgroup disagree on their wgmma number %llu",
         static_cast<unsigned long long>(index));
  }
  bool flying = false;
  for (const Accumulator& other : t.flying) flying |= other.d == d;
  if (!t.fenced && (!flying || a)) fail("a wgmma without wgmma_fence() since registers changed");
  if (!flying) t.flying.push_back({d, std::vector<float>(d, d + n / 2)});
  for (int i = 0; i < n / 2; ++i) d[i] = std::numeric_limits<float>::quiet_NaN();
  Wgmma p{d, n, a != nullptr, b_transposed, accumulate, false, {}, a_bits, b_bits};
  if (a) std::memcpy(p.a, a, sizeof p.a);
  t.wgmmas.push_back(p);
  if (seed() == 0 || random_below(2)) return;
  for (uint64_t number = t.first(); number < t.issued; ++number) {  // early, in order
    if (t.wgmmas[size_t(number - t.first())].from_registers) return;
    run(t, number);
  }
}

void wgmma_fence(int line) {
  warp_operation(WarpOp::kSync, ~0u, 0, 0, 32, line);
  here().threads[current_thread()].fenced = true;
}

void wgmma_commit(int line) {
  warp_operation(WarpOp::kSync, ~0u, 0, 0, 32, line);
  Thread& t = here().threads[current_thread()];
  t.groups.push_back(t.issued);
}

void wgmma_wait(int pending, float* const* touched, int count, int line) {
  Thread& t = here().threads[current_thread()];
  uint64_t end = t.first();
  while (t.groups.size() > size_t(pending)) {
    end = t.groups.front();
    t.groups.pop_front();
  }
  warp_operation(WarpOp::kSync, ~0u, 0, 0, 32, line);  // every lane has issued
  for (uint64_t number = t.first(); number < end; ++number) run(t, number);
  warp_operation(WarpOp::kSync, ~0u, 0, 0, 32, line);  // every lane's part is done
  while (t.first() < end) t.wgmmas.pop_front();
  t.fenced = false;
  for (size_t i = 0; i < t.flying.size();) {
    bool used = false;
    for (const Wgmma& p : t.wgmmas) used |= p.d == t.flying[i].d;
    if (used) {
      ++i;
      continue;
    }
    std::copy(t.flying[i].values.begin(), t.flying[i].values.end(), t.flying[i].d);
    t.flying.erase(t.flying.begin() + long(i));
  }
  for (int i = 0; i < count; ++i) {
    for (const Accumulator& other : t.flying) {
      if (other.d == touched[i]) fail("a wait that names accumulators it leaves under way");
    }
  }
}

}  // namespace lens::emulation
