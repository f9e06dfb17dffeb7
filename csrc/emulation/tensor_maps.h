// Tensor maps as the emulator's stand-in for the driver makes them: their fields inside the bits of
// a CUtensorMap. It refuses what the driver's documentation of cuTensorMapEncodeTiled forbids, and
// writes down every call.
#pragma once

#include <cstdint>

#include "emulation/cuda.h"

namespace lens::emulation {

struct Map {
  uint64_t magic;
  char* base;
  uint32_t sizes[5];
  uint16_t box[5];
  uint8_t rank, swizzled;
  uint64_t pitches[4];
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap), "a map has 128 bytes");
constexpr uint64_t kMapMagic = 0x70a57e4ed3a9bull;

}  // namespace lens::emulation
