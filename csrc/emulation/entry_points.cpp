// The launchers under plain C names, for the tests: lens_emulation_<stem>(const <Op>Params*).
#include "params.h"

#define LENS_ENTRY_POINT(stem, Params)                                                       \
  extern "C" __attribute__((visibility("default"))) int lens_emulation_##stem(               \
      const lens::Params* params) {                                                          \
    return lens::stem##_cuda(*params);                                                       \
  }                                                                                          \
  extern "C" __attribute__((visibility("default"))) int64_t lens_emulation_sizeof_##stem() { \
    return int64_t(sizeof(lens::Params));                                                    \
  }
LENS_FOR_EACH_KERNEL(LENS_ENTRY_POINT)
LENS_FOR_EACH_HOPPER_KERNEL(LENS_ENTRY_POINT)
