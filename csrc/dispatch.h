// From a params struct to the kernel that runs it: checks that need no tensor, then the instruction
// set or the GPU.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"

namespace lens {

// ---- errors name the op, the argument, what was expected and what came
[[noreturn]] inline void refuse(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string("lens.") + op + ": " + what);
}

inline void expect_at_least(const char* op, const char* name, int64_t minimum, int64_t got) {
  if (got < minimum) {
    refuse(op, std::string(name) + " must be at least " + std::to_string(minimum) + ", got " +
                   std::to_string(got));
  }
}

inline void expect_pointer(const char* op, const char* name, int64_t elements, const void* got) {
  if (elements > 0 && got == nullptr) {
    refuse(op, std::string(name) + " must point to " + std::to_string(elements) +
                   " elements, got a null pointer");
  }
}

// Reads host memory: for the CPU only.
inline void expect_offsets(const char* op, const char* name, const int32_t* offsets, int64_t B,
                           const char* rows_name, int64_t rows) {
  const std::string expected =
      std::string(name) + " must rise from 0 to " + rows_name + " = " + std::to_string(rows);
  if (offsets[0] != 0)
    refuse(op, expected + ", got " + name + "[0] = " + std::to_string(offsets[0]));
  for (int64_t b = 0; b < B; ++b) {
    if (offsets[b + 1] < offsets[b]) {
      refuse(op, expected + " without falling, got " + std::to_string(offsets[b]) + " before " +
                     std::to_string(offsets[b + 1]) + " at " + std::to_string(b));
    }
  }
  if (offsets[B] != rows) refuse(op, expected + ", got an end of " + std::to_string(offsets[B]));
}

// Reads host memory: for the CPU only. Two rows of one token would be written by two threads.
inline void expect_rows(const char* op, const int64_t* rows, int64_t R, int64_t BL) {
  bool rising = true;
  for (int64_t r = 0; r < R; ++r) {
    if (rows[r] < 0 || rows[r] >= BL) {
      refuse(op, "rows must lie in [0, B * L) = [0, " + std::to_string(BL) + "), got rows[" +
                     std::to_string(r) + "] = " + std::to_string(rows[r]));
    }
    rising = rising && (r == 0 || rows[r] > rows[r - 1]);
  }
  if (rising) return;  // as planned by lens/packing.py: nothing can repeat
  std::vector<bool> seen(static_cast<size_t>(BL));
  for (int64_t r = 0; r < R; ++r) {
    const size_t token = static_cast<size_t>(rows[r]);
    if (seen[token]) {
      refuse(op, "rows must name no token twice, got rows[" + std::to_string(r) +
                     "] = " + std::to_string(rows[r]) + " again");
    }
    seen[token] = true;
  }
}

// ---- instruction sets
struct Isa {
  const char* name;
  bool (*available)();
};

inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

inline bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// AMX with products of BF16: the CPU has it, and the kernel gives this process its registers.
inline bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  if ((d & kTile) == 0 || (d & kBf16) == 0) return false;
  const long kRequestPermission = 0x1023, kTileData = 18;  // of Linux' asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

inline const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
      {"base", [] { return true; }},
      {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
      {"avx512", has_avx512},
      {"avx512bf16", has_avx512bf16},
      {"amx", has_amx},
  };
  return all;
}

inline size_t widest_isa() {
  size_t level = isas().size() - 1;
  while (!isas()[level].available()) --level;
  return level;
}

inline size_t& current_isa() {
  static size_t level = widest_isa();
  return level;
}

// Selects an instruction set by name, or the widest one for "".
inline void set_isa(const std::string& name) {
  if (name.empty()) {
    current_isa() = widest_isa();
    return;
  }
  for (size_t level = 0; level < isas().size(); ++level) {
    if (name != isas()[level].name) continue;
    if (!isas()[level].available())
      throw std::runtime_error("lens: this CPU cannot run the " + name + " kernels");
    current_isa() = level;
    return;
  }
  throw std::invalid_argument(
      "lens: instruction set must be base, avx2, avx512, avx512bf16 or amx, got " + name);
}

// ---- kernels. device: -1 for the CPU, else the index of the GPU (already current).
inline void check_launch(const char* op, int error) {
  constexpr int kNotSupported =
      801;  // cudaErrorNotSupported, which the launchers return themselves
  if (error == kNotSupported) {
    throw std::runtime_error(std::string("lens.") + op +
                             ": the CUDA kernel does not serve these sizes, this dtype or this "
                             "GPU; the limits stand in csrc/cuda beside the launcher");
  }
  if (error != 0) {
    throw std::runtime_error(std::string("lens.") + op +
                             ": the CUDA launch failed with cudaError " + std::to_string(error));
  }
}

#if defined(LENS_WITH_CUDA)
#define LENS_RUN_CUDA(stem) check_launch(#stem, stem##_cuda(p))
#else
#define LENS_RUN_CUDA(stem) \
  throw std::runtime_error("lens." #stem ": this build has no CUDA kernels; got a CUDA device")
#endif

#define LENS_DEFINE_RUN(stem, Params)                                                          \
  inline void run(const Params& p, int device) {                                               \
    static constexpr void (*kernels[])(const Params&) = {base::stem, avx2::stem, avx512::stem, \
                                                         avx512::stem, avx512::stem};          \
    if (device < 0) {                                                                          \
      kernels[current_isa()](p);                                                               \
    } else {                                                                                   \
      LENS_RUN_CUDA(stem);                                                                     \
    }                                                                                          \
  }
LENS_FOR_EACH_KERNEL(LENS_DEFINE_RUN)
#undef LENS_DEFINE_RUN

#define LENS_DEFINE_RUN(stem, Params)                                                          \
  inline void run(const Params& p, int device) {                                               \
    static constexpr void (*kernels[])(const Params&) = {base::stem, avx2::stem, avx512::stem, \
                                                         avx512::stem, avx512::stem};          \
    if (device >= 0) refuse(#stem, "device must be the CPU, got a GPU");                       \
    kernels[current_isa()](p);                                                                 \
  }
LENS_FOR_EACH_HOST_KERNEL(LENS_DEFINE_RUN)
#undef LENS_DEFINE_RUN

#define LENS_DEFINE_RUN(stem, Params)                                                          \
  inline void run(const Params& p, int device) {                                               \
    static constexpr void (*kernels[])(const Params&) = {base::stem, avx2::stem, avx512::stem, \
                                                         avx512::stem, amx::stem};             \
    if (device >= 0) refuse(#stem, "device must be the CPU, got a GPU");                       \
    kernels[current_isa()](p);                                                                 \
  }
LENS_FOR_EACH_HOST_AMX_KERNEL(LENS_DEFINE_RUN)
#undef LENS_DEFINE_RUN

#define LENS_DEFINE_RUN(stem, Params)                                                            \
  inline void run(const Params& p, int device) {                                                 \
    if (device >= 0) refuse(#stem, "device must be the CPU, got a GPU");                         \
    if (p.dtype != DType::kBFloat16) refuse(#stem, "dtype must be bfloat16");                    \
    if (std::string(isas()[current_isa()].name) != "amx") refuse(#stem, "needs a CPU with AMX"); \
    amx::stem(p);                                                                                \
  }
LENS_FOR_EACH_AMX_KERNEL(LENS_DEFINE_RUN)
#undef LENS_DEFINE_RUN

#define LENS_DEFINE_RUN(stem, Params)                                                          \
  inline void run(const Params& p, int device) {                                               \
    static constexpr void (*kernels[])(const Params&) = {base::stem, avx2::stem, avx512::stem, \
                                                         avx512bf16::stem, amx::stem};         \
    if (device < 0) {                                                                          \
      kernels[current_isa()](p);                                                               \
    } else {                                                                                   \
      LENS_RUN_CUDA(stem);                                                                     \
    }                                                                                          \
  }
LENS_FOR_EACH_BF16_KERNEL(LENS_DEFINE_RUN)
#undef LENS_DEFINE_RUN

#if defined(LENS_WITH_HOPPER)  // the build compiles for 90a; elsewhere lens._C has no such name
#define LENS_DEFINE_RUN(stem, Params)                                          \
  inline void run(const Params& p, int device) {                               \
    if (device < 0) refuse(#stem, "device must be an sm_90 GPU, got the CPU"); \
    LENS_RUN_CUDA(stem);                                                       \
  }
LENS_FOR_EACH_HOPPER_KERNEL(LENS_DEFINE_RUN)
#undef LENS_DEFINE_RUN
#endif
#undef LENS_RUN_CUDA

}  // namespace lens
