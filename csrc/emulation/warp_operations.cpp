// What the threads of a warp and of a block do together: shuffles, votes, matrix products,
// __syncthreads().
#include "emulation/fibers.h"
#include "emulation/hopper.h"
#include "math/types.h"

namespace lens::emulation {
namespace {

uint64_t receive(const Fiber* warp, unsigned lane) {
  const Fiber& f = warp[lane];
  if (f.op == WarpOp::kSync || f.op == WarpOp::kProduct) return 0;
  if (f.op == WarpOp::kBallot) {
    uint64_t votes = 0;
    for (unsigned i = 0; i < kWarp; ++i) {
      if (f.mask >> i & 1) votes |= warp[i].sent << i;
    }
    return votes;
  }
  const int width = f.width, base = int(lane) / width * width, within = int(lane) % width;
  int source = 0;  // within the segment; out of it: the lane's own value, as on the device
  switch (f.op) {
    case WarpOp::kShuffle:
      source = f.argument & (width - 1);
      break;
    case WarpOp::kShuffleXor:
      source = within ^ f.argument;
      break;
    case WarpOp::kShuffleDown:
      source = within + f.argument;
      break;
    default:
      source = within - f.argument;
      break;
  }
  if (source < 0 || source >= width) source = within;
  const unsigned from = unsigned(base + source);
  if (!(f.mask >> from & 1)) {
    report(kLaunchFailure, "lane %u reads lane %u, which is not in the mask %08x (line %d)", lane,
           from, f.mask, f.line);
  }
  return warp[from].sent;
}

// The registers of one lane, which stay where they are until the whole warp has come.
struct Operands {
  float* d;
  const uint32_t *a, *b;
};

float half_of(uint32_t word, unsigned h) {
  return lens::bits_to_float(h ? word & 0xffff0000u : word << 16);
}

// d += A B, of all lanes.
void multiply(const Fiber* warp) {
  const auto lane = [&](unsigned i) { return reinterpret_cast<const Operands*>(warp[i].sent); };
  for (unsigned i = 0; i < kWarp; ++i) {
    for (unsigned e = 0; e < 4; ++e) {
      const unsigned row = i / 4, upper = e / 2, column = 2 * (i % 4) + e % 2;
      float sum = 0.0f;
      for (unsigned k = 0; k < 16; ++k) {
        const unsigned t = k % 8 / 2, c = k / 8;
        sum += half_of(lane(4 * row + t)->a[2 * c + upper], k % 2) *
               half_of(lane(4 * column + t)->b[c], k % 2);
      }
      lane(i)->d[e] += sum;
    }
  }
}

}  // namespace

void mma(float* d, const uint32_t* a, const uint32_t* b, int line) {
  const Operands own{d, a, b};
  warp_operation(WarpOp::kProduct, ~0u, reinterpret_cast<uint64_t>(&own), 0, 32, line);
}

void block_barrier(int line) {
  Block& b = block();
  if (b.live != block_threads()) fail("a barrier that threads which returned never reach");
  self().state = State::kBarrier;
  self().line = line;
  ++b.at_barrier;
  for (unsigned i = 0; b.at_barrier > 1 && i < block_threads(); ++i) {
    const Fiber& other = b.fibers[i];
    if (other.state != State::kBarrier || i == current_thread()) continue;
    if (other.line != line) {
      report(kLaunchFailure, "threads wait at different barriers, lines %d and %d", line,
             other.line);
      abandon_fiber();
    }
    break;  // those already waiting agree with each other
  }
  if (b.at_barrier == block_threads()) {
    b.at_barrier = 0;
    make_all_ready(current_block());
  }
  to_scheduler();
}

uint64_t warp_operation(WarpOp op, uint32_t mask, uint64_t bits, int argument, int width,
                        int line) {
  const unsigned first = current_thread() / kWarp * kWarp, lane = current_thread() - first;
  Fiber* warp = &block().fibers[first];
  if (!(mask >> lane & 1)) fail("calls a warp operation with a mask that leaves it out");
  if (width < 1 || width > 32 || (width & (width - 1))) fail("shuffle width is not a power of two");
  Fiber& own = warp[lane];
  own = Fiber{own.stack_pointer, State::kWarpOp, line, op, mask, argument, width, bits, 0};
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    const Fiber& other = warp[i];
    if (first + i >= block_threads() || other.state == State::kDone) {
      report(kLaunchFailure, "lane %u waits at line %d for lane %u, which is gone", lane, line, i);
      abandon_fiber();
    }
    const bool here =
        other.state == State::kWarpOp && other.line == line && other.op == op && other.mask == mask;
    if (!here) {  // not yet; the last lane to come completes the operation
      to_scheduler();
      return own.received;
    }
  }
  if (op == WarpOp::kProduct) multiply(warp);
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) warp[i].received = receive(warp, i);
  }
  if (g_cluster.aborted) abandon_fiber();
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) make_ready({current_block(), first + i});
  }
  to_scheduler();
  return own.received;
}

}  // namespace lens::emulation
