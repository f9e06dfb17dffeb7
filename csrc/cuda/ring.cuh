// A ring of buffers in shared memory between warps that fill and warps that read: each stage has a
// barrier `full`, which the reader waits for, and a barrier `empty`, which the writer waits for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lens::gpu {

// Where a writer or a reader stands: the stage, and the parity of the phase that a reader of it
// waits for on `full`. A writer waits for the opposite parity on `empty`, which fresh barriers
// pass.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace lens::gpu
