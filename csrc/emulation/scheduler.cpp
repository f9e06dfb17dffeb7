#include "emulation/scheduler.h"

#include <signal.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "emulation/guarded_memory.h"
#include "emulation/hopper.h"

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator's fiber switch and fault handler are written for Linux on x86-64"
#endif

// All shared variables of all kernels, collected by the linker; weak, for a library without any.
extern "C" char __start_lens_shared[] __attribute__((weak));
extern "C" char __stop_lens_shared[] __attribute__((weak));

// Saves the callee-saved registers on the stack, stores the stack pointer, continues on another
// stack. Opaque to the compiler, so that nothing kept in memory (threadIdx) is assumed unchanged.
extern "C" void lens_emulation_switch(void** save, void* load);
asm(R"(
.text
.hidden lens_emulation_switch
.globl lens_emulation_switch
.type lens_emulation_switch, @function
lens_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lens_emulation_switch, .-lens_emulation_switch
)");

namespace lens::emulation {
namespace {

constexpr int kInvalidConfiguration = 9;  // the cudaError_t values a device would return
constexpr int kIllegalAddress = 700, kLaunchTimeout = 702, kMisaligned = 716, kLaunchFailure = 719;
constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kMaxThreads = 1024, kWarp = 32;
constexpr uint64_t kStackMark = 0x5afe57acc5afe57aull;

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
  std::unique_ptr<char[]> stacks{new char[kStackBytes * kMaxThreads]};
  std::vector<Fiber> fibers{kMaxThreads};
  std::vector<unsigned> ready;
  size_t next_ready = 0;
  unsigned threads = 0, live = 0, at_barrier = 0;
  int current = -1;  // -1: the scheduler itself runs
  void* scheduler_stack = nullptr;
  void (*thread)(void*) = nullptr;
  void* closure = nullptr;
  bool aborted = false;
};

Block g_block;
uint64_t g_seed = 0, g_state = 0;
int g_error = 0;
const char* g_kernel = "";
char g_message[1024] = "";
char g_fault[512] = "";
int g_fault_code = 0;

}  // namespace

uint64_t random_below(uint64_t n) {  // splitmix64
  uint64_t z = (g_state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (z ^ (z >> 31)) % n;
}

void report(int code, const char* format, ...) {
  g_block.aborted = true;
  if (g_error) return;  // the first error is the cause
  g_error = code;
  char what[700];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  std::snprintf(g_message, sizeof g_message, "%s, block (%u, %u, %u): %s", g_kernel, blockIdx.x,
                blockIdx.y, blockIdx.z, what);
}

namespace {

void to_scheduler() {
  Block& b = g_block;
  lens_emulation_switch(&b.fibers[b.current].stack_pointer, b.scheduler_stack);
}

void make_ready(unsigned index) {
  g_block.fibers[index].state = State::kReady;
  g_block.ready.push_back(index);
}

[[noreturn]] void abandon_fiber() {
  to_scheduler();
  __builtin_unreachable();  // an aborted block is never resumed
}

[[noreturn]] void fiber_main() {
  Block& b = g_block;
  b.thread(b.closure);
  end_thread();
  b.fibers[b.current].state = State::kDone;
  --b.live;
  if (b.at_barrier) {
    report(kLaunchFailure, "thread %d returned while %u threads wait at a barrier", b.current,
           b.at_barrier);
  }
  abandon_fiber();
}

// Where a fiber continues after its access faulted.
[[noreturn]] void fault_landing() {
  report(g_fault_code, "thread %d %s", g_block.current, g_fault);
  abandon_fiber();
}

void on_fault(int signal, siginfo_t* info, void* raw) {
  if (g_block.current < 0) {  // not device code: not ours
    ::signal(signal, SIG_DFL);
    return;
  }
  if (signal == SIGILL) {
    g_fault_code = kMisaligned;
    std::snprintf(g_fault, sizeof g_fault,
                  "made a misaligned access, left an array's bounds, or overflowed an integer");
  } else if (signal == SIGFPE) {
    g_fault_code = kLaunchFailure;
    std::snprintf(g_fault, sizeof g_fault, "divided an integer by zero");
  } else {
    g_fault_code = kIllegalAddress;
    describe_address(info->si_addr, g_fault, sizeof g_fault);
  }
  auto* registers = static_cast<ucontext_t*>(raw)->uc_mcontext.gregs;
  registers[REG_RIP] = greg_t(reinterpret_cast<uintptr_t>(&fault_landing));
  registers[REG_RSP] = ((registers[REG_RSP] - 256) & ~greg_t(15)) - 8;  // as after a call
}

class FaultHandlers {
 public:
  FaultHandlers() : stack_(new char[kStackBytes]) {
    stack_t alternate{};
    alternate.ss_sp = stack_.get();
    alternate.ss_size = kStackBytes;
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &old_[i]);
  }
  ~FaultHandlers() {
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int kSignals[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  std::unique_ptr<char[]> stack_;
  stack_t old_stack_{};
  struct sigaction old_[4];
};

void start_fiber(unsigned index) {
  char* bottom = g_block.stacks.get() + index * kStackBytes;
  std::memcpy(bottom, &kStackMark, sizeof kStackMark);
  auto top = reinterpret_cast<uintptr_t>(bottom + kStackBytes) & ~uintptr_t(15);
  auto* frame = reinterpret_cast<uint64_t*>(top) - 8;  // six registers, the entry, alignment
  std::memset(frame, 0, 64);
  frame[6] = reinterpret_cast<uintptr_t>(&fiber_main);
  g_block.fibers[index] = Fiber{};
  g_block.fibers[index].stack_pointer = frame;
}

// Seed 0: in turn. Odd seeds: any ready fiber. Even seeds: the one made ready last, so that a warp
// runs ahead of the others as far as the next barrier lets it.
unsigned take_ready() {
  Block& b = g_block;
  if (g_seed && g_seed % 2 == 0) {
    const unsigned index = b.ready.back();
    b.ready.pop_back();
    return index;
  }
  const size_t waiting = b.ready.size() - b.next_ready;
  const size_t chosen = b.next_ready + (g_seed ? random_below(waiting) : 0);
  std::swap(b.ready[chosen], b.ready[b.next_ready]);
  const unsigned index = b.ready[b.next_ready++];
  if (b.next_ready == b.ready.size()) {
    b.ready.clear();
    b.next_ready = 0;
  }
  return index;
}

// All threads of the block, whole warps in a permuted order where the seed asks for one.
void make_all_ready() {
  const unsigned warps = (g_block.threads + kWarp - 1) / kWarp;
  const unsigned first = g_seed ? unsigned(random_below(warps)) : 0;
  const bool backwards = g_seed && random_below(2);
  for (unsigned i = 0; i < warps; ++i) {
    const unsigned warp = (first + (backwards ? warps - 1 - i : i)) % warps;
    for (unsigned t = warp * kWarp; t < (warp + 1) * kWarp && t < g_block.threads; ++t) {
      make_ready(t);
    }
  }
}

void report_deadlock() {
  std::string where;
  int shown = 0;
  for (unsigned i = 0; i < g_block.threads && shown < 4; ++i) {
    const Fiber& f = g_block.fibers[i];
    if (f.state == State::kReady || f.state == State::kDone) continue;
    bool seen = false;
    for (unsigned j = 0; j < i; ++j) {
      const Fiber& g = g_block.fibers[j];
      seen |= g.state == f.state && g.line == f.line && g.mask == f.mask;
    }
    if (seen) continue;
    char text[200];
    std::snprintf(text, sizeof text, "; from thread %u at line %d, %s", i, f.line,
                  f.state == State::kBarrier  ? "a block barrier"
                  : f.state == State::kWarpOp ? "a warp operation"
                                              : waits_for(i));
    where += text;
    ++shown;
  }
  report(kLaunchTimeout, "deadlock: %u threads wait for others that never come%s", g_block.live,
         where.c_str());
}

void run_block(size_t shared_bytes) {
  Block& b = g_block;
  b.ready.clear();
  b.next_ready = 0;
  b.live = b.threads;
  b.at_barrier = 0;
  if (__start_lens_shared) {
    std::memset(__start_lens_shared, 0xff, size_t(__stop_lens_shared - __start_lens_shared));
  }
  begin_block(shared_bytes);
  for (unsigned i = 0; i < b.threads; ++i) start_fiber(i);
  make_all_ready();
  while (b.live && !b.aborted) {
    if (b.ready.empty()) {
      if (deliver()) continue;
      report_deadlock();
      break;
    }
    if (g_seed % 2 && random_below(16) == 0) deliver();
    const unsigned i = take_ready();
    threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    b.current = int(i);
    lens_emulation_switch(&b.scheduler_stack, b.fibers[i].stack_pointer);
    b.current = -1;
  }
  if (!b.aborted) end_block();
  for (unsigned i = 0; i < b.threads; ++i) {
    if (std::memcmp(b.stacks.get() + i * kStackBytes, &kStackMark, sizeof kStackMark)) {
      report(kLaunchFailure, "thread %u overran its stack of %zu bytes", i, kStackBytes);
    }
  }
}

uint64_t receive(const Fiber* warp, unsigned lane) {
  const Fiber& f = warp[lane];
  if (f.op == WarpOp::kSync) return 0;
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

}  // namespace

void fail(const char* format, ...) {
  char what[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  report(kLaunchFailure, "thread %d: %s", g_block.current, what);
  abandon_fiber();
}

unsigned current_thread() { return unsigned(g_block.current); }
unsigned block_threads() { return g_block.threads; }
uint64_t seed() { return g_seed; }
void suspend(int line) {
  Fiber& self = g_block.fibers[g_block.current];
  self.state = State::kSuspended;
  self.line = line;
  to_scheduler();
}
void wake(unsigned thread) { make_ready(thread); }

void block_barrier(int line) {
  Block& b = g_block;
  Fiber& self = b.fibers[b.current];
  if (b.live != b.threads) fail("a barrier that threads which returned never reach");
  self.state = State::kBarrier;
  self.line = line;
  ++b.at_barrier;
  for (unsigned i = 0; b.at_barrier > 1 && i < b.threads; ++i) {
    const Fiber& other = b.fibers[i];
    if (other.state != State::kBarrier || int(i) == b.current) continue;
    if (other.line != line) {
      report(kLaunchFailure, "threads wait at different barriers, lines %d and %d", line,
             other.line);
      abandon_fiber();
    }
    break;  // those already waiting agree with each other
  }
  if (b.at_barrier == b.threads) {
    b.at_barrier = 0;
    make_all_ready();
  }
  to_scheduler();
}

uint64_t warp_operation(WarpOp op, uint32_t mask, uint64_t bits, int argument, int width,
                        int line) {
  Block& b = g_block;
  const unsigned first = unsigned(b.current) / kWarp * kWarp, lane = unsigned(b.current) - first;
  Fiber* warp = &b.fibers[first];
  if (!(mask >> lane & 1)) fail("calls a warp operation with a mask that leaves it out");
  if (width < 1 || width > 32 || (width & (width - 1))) fail("shuffle width is not a power of two");
  Fiber& self = warp[lane];
  self = Fiber{self.stack_pointer, State::kWarpOp, line, op, mask, argument, width, bits, 0};
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    const Fiber& other = warp[i];
    if (first + i >= b.threads || other.state == State::kDone) {
      report(kLaunchFailure, "lane %u waits at line %d for lane %u, which is gone", lane, line, i);
      abandon_fiber();
    }
    const bool here =
        other.state == State::kWarpOp && other.line == line && other.op == op && other.mask == mask;
    if (!here) {  // not yet; the last lane to come completes the operation
      to_scheduler();
      return self.received;
    }
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) warp[i].received = receive(warp, i);
  }
  if (b.aborted) abandon_fiber();
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) make_ready(first + i);
  }
  to_scheduler();
  return self.received;
}

void run_grid(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
              void (*thread)(void*), void* closure) {
  if (g_error) return;  // while the launch was prepared
  g_kernel = name;
  blockIdx = {0, 0, 0};
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool grid_ok =
      grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  if (!grid_ok || !threads || threads > kMaxThreads || block.z > 64) {
    report(kInvalidConfiguration, "cannot launch grid (%u, %u, %u) of blocks (%u, %u, %u)", grid.x,
           grid.y, grid.z, block.x, block.y, block.z);
    g_block.aborted = false;
    return;
  }
  if (!shared_allowed(kernel, shared_bytes)) {
    report(kInvalidConfiguration, "%zu bytes of dynamic shared memory, which nobody allowed",
           shared_bytes);
    g_block.aborted = false;
    return;
  }
  FaultHandlers handlers;
  gridDim = grid;
  blockDim = block;
  g_state = g_seed;
  g_block.threads = unsigned(threads);
  g_block.thread = thread;
  g_block.closure = closure;
  g_block.aborted = false;
  // blocks in a permuted order as well: i -> (a * i + c) mod n with a coprime to n
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  uint64_t step = 1, start = 0;
  if (g_seed && blocks > 1) {
    do {
      step = 1 + random_below(blocks);
    } while (std::gcd(step, blocks) != 1);
    start = random_below(blocks);
  }
  for (uint64_t i = 0; i < blocks && !g_block.aborted; ++i) {
    const auto n = uint64_t((static_cast<unsigned __int128>(step) * i + start) % blocks);
    blockIdx = {unsigned(n % grid.x), unsigned(n / grid.x % grid.y),
                unsigned(n / (uint64_t(grid.x) * grid.y))};
    run_block(shared_bytes);
  }
}

int last_error() { return std::exchange(g_error, 0); }

}  // namespace lens::emulation

extern "C" {
__attribute__((visibility("default"))) void lens_emulation_seed(uint64_t seed) {
  lens::emulation::g_seed = seed;
}
// What went wrong in the last launch that failed.
__attribute__((visibility("default"))) const char* lens_emulation_message() {
  return lens::emulation::g_message;
}
}
