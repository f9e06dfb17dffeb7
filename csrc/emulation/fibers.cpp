// Stacks, the switch between them, and what becomes of a fault on one.
#include "emulation/fibers.h"

#include <signal.h>
#include <ucontext.h>

#include <cstdio>
#include <cstring>

#include "emulation/guarded_memory.h"
#include "emulation/hopper.h"

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator's fiber switch and fault handler are written for Linux on x86-64"
#endif

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

constexpr size_t kStackBytes = 64 << 10;
constexpr uint64_t kStackMark = 0x5afe57acc5afe57aull;

char g_fault[512] = "";
int g_fault_code = 0;

[[noreturn]] void fiber_main() {
  g_cluster.thread(g_cluster.closure);
  end_thread();
  self().state = State::kDone;
  --block().live;
  if (block().at_barrier) {
    report(kLaunchFailure, "thread %u returned while %u threads wait at a barrier",
           current_thread(), block().at_barrier);
  }
  abandon_fiber();
}

// Where a fiber continues after its access faulted.
[[noreturn]] void fault_landing() {
  report(g_fault_code, "thread %u %s", current_thread(), g_fault);
  abandon_fiber();
}

void on_fault(int signal, siginfo_t* info, void* raw) {
  if (!g_cluster.inside) {  // not device code: not the emulator's
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

constexpr int kSignals[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};

char* stack_of(ThreadId id) {
  return g_cluster.blocks[id.block].stacks.get() + id.thread * kStackBytes;
}

}  // namespace

struct FaultHandlers::Saved {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  stack_t alternate{};
  struct sigaction actions[4];
};

FaultHandlers::FaultHandlers() : saved_(new Saved) {
  stack_t alternate{};
  alternate.ss_sp = saved_->stack.get();
  alternate.ss_size = kStackBytes;
  sigaltstack(&alternate, &saved_->alternate);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &saved_->actions[i]);
}
FaultHandlers::~FaultHandlers() {
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &saved_->actions[i], nullptr);
  sigaltstack(&saved_->alternate, nullptr);
}

void start_fiber(ThreadId id) {
  Block& b = g_cluster.blocks[id.block];
  if (!b.stacks) {
    b.stacks.reset(new char[kStackBytes * kMaxThreads]);
    b.fibers.resize(kMaxThreads);
  }
  char* bottom = stack_of(id);
  std::memcpy(bottom, &kStackMark, sizeof kStackMark);
  auto top = reinterpret_cast<uintptr_t>(bottom + kStackBytes) & ~uintptr_t(15);
  auto* frame = reinterpret_cast<uint64_t*>(top) - 8;  // six registers, the entry, alignment
  std::memset(frame, 0, 64);
  frame[6] = reinterpret_cast<uintptr_t>(&fiber_main);
  b.fibers[id.thread] = Fiber{};
  b.fibers[id.thread].stack_pointer = frame;
}

bool stack_overrun(ThreadId id) {
  return std::memcmp(stack_of(id), &kStackMark, sizeof kStackMark) != 0;
}

void resume(ThreadId id) {
  const unsigned i = id.thread;
  g_cluster.at = id;
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  blockIdx = block().index;
  g_cluster.inside = true;
  lens_emulation_switch(&g_cluster.scheduler_stack, self().stack_pointer);
  g_cluster.inside = false;
}

void to_scheduler() { lens_emulation_switch(&self().stack_pointer, g_cluster.scheduler_stack); }

void abandon_fiber() {
  to_scheduler();
  __builtin_unreachable();  // an aborted cluster is never resumed
}

}  // namespace lens::emulation
