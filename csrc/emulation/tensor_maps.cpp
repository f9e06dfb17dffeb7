// The stand-in for cuTensorMapEncodeTiled: every documented rule, and the calls as text, a refused
// one as the rule it breaks.
#include "emulation/tensor_maps.h"

#include <cstring>
#include <string>

#include "emulation/block_state.h"
#include "emulation/guarded_memory.h"

namespace lens::emulation {
namespace {

struct Call {
  const void* map;
  int type;
  cuuint32_t rank;
  const void* base;
  const cuuint64_t *sizes, *pitches;
  const cuuint32_t *box, *steps;
  int interleave, swizzle, promotion, fill;
};

std::string g_calls;  // one line each

// CUDA Driver API, "cuTensorMapEncodeTiled": the rule that a call breaks, or null. Only what the
// kernels use is told apart: bfloat16, no interleaving.
const char* broken_rule(const Call& c) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  constexpr uint64_t kSwizzleBytes[] = {0, 32, 64, 128};
  if (address(c.map) % 64) return "tensorMap must lie on 64 bytes";
  if (c.type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) return "tensorDataType must be bfloat16 here";
  if (c.rank < 1 || c.rank > 5) return "tensorRank must be from 1 to 5";
  if (c.interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return "interleave must be none here";
  if (c.swizzle < 0 || c.swizzle > 3) return "swizzle must be none, 32, 64 or 128 bytes";
  if (c.promotion < 0 || c.promotion > 3) return "l2Promotion must be none, 64, 128 or 256 bytes";
  if (c.fill < 0 || c.fill > 1) return "oobFill must be zero or NaN";
  if (c.base == nullptr || address(c.base) % 16) return "globalAddress must lie on 16 bytes";
  for (cuuint32_t i = 0; i < c.rank; ++i) {
    if (c.sizes[i] < 1 || c.sizes[i] > uint64_t(1) << 32) return "globalDim must be 1 to 2^32";
    if (c.box[i] < 1 || c.box[i] > 256) return "boxDim must be 1 to 256";
    if (c.steps[i] < 1 || c.steps[i] > 8) return "elementStrides must be 1 to 8";
    if (i == 0) continue;
    const uint64_t pitch = c.pitches[i - 1];
    if (pitch % 16) return "globalStrides must be multiples of 16 bytes";
    if (pitch >= uint64_t(1) << 40) return "globalStrides must be below 2^40 bytes";
    // globalStrides[i] >= globalDim[i], of the assertion in the text: never less than the elements
    if (pitch < c.sizes[i - 1] && i == 1) return "globalStrides[0] must be at least globalDim[0]";
  }
  const uint64_t inner = uint64_t(c.box[0]) * 2;
  if (inner % 16) return "boxDim[0] must be a multiple of 16 bytes";
  if (c.swizzle && inner > kSwizzleBytes[c.swizzle]) {
    return "boxDim[0] must be no wider than the swizzle";
  }
  return nullptr;
}

// The text's rule that each stride is a multiple of the one before. Drivers take maps that break
// it, of rows and then their columns, say: noted, not refused.
bool strides_fall(const Call& c) {
  for (cuuint32_t i = 2; i < c.rank; ++i) {
    if (c.pitches[i - 1] % c.pitches[i - 2]) return true;
  }
  return false;
}

void write_down(const Call& c) {
  const auto list = [](const char* name, const auto* values, cuuint32_t count) {
    std::string text = std::string(" ") + name;
    for (cuuint32_t i = 0; i < count; ++i) text += (i ? "," : " ") + std::to_string(values[i]);
    return text;
  };
  g_calls += "type " + std::to_string(c.type) + list("sizes", c.sizes, c.rank) +
             list("strides", c.pitches, c.rank - 1) + list("box", c.box, c.rank) +
             list("steps", c.steps, c.rank) + " interleave " + std::to_string(c.interleave) +
             " swizzle " + std::to_string(c.swizzle) + " promotion " + std::to_string(c.promotion) +
             " fill " + std::to_string(c.fill) + (strides_fall(c) ? " falling" : "") + "\n";
}

}  // namespace
}  // namespace lens::emulation

CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank,
                                void* base, const cuuint64_t* sizes, const cuuint64_t* pitches,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  using namespace lens::emulation;
  if (!context_bound()) return CUDA_ERROR_INVALID_CONTEXT;
  const Call call{
      out,          type,           rank,     base, sizes, pitches, box, steps, int(interleave),
      int(swizzle), int(promotion), int(fill)};
  if (const char* rule = broken_rule(call)) {
    g_calls += std::string("refused: ") + rule + "\n";
    return CUDA_ERROR_INVALID_VALUE;
  }
  write_down(call);
  Map map{};
  map.magic = kMapMagic;
  map.base = static_cast<char*>(base);
  map.rank = uint8_t(rank);
  map.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  uint64_t last = 2;
  for (cuuint32_t i = 0; i < rank; ++i) {
    map.sizes[i] = uint32_t(sizes[i]);
    map.box[i] = uint16_t(box[i]);
    if (i) map.pitches[i - 1] = pitches[i - 1];
    last += (sizes[i] - 1) * (i ? pitches[i - 1] : 2);
  }
  char where[300];
  if (!in_one_buffer(map.base, last, where, sizeof where)) report(700, "a tensor map %s", where);
  *out = CUtensorMap{};
  std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

extern "C" {
// The calls since the last question, one line each.
__attribute__((visibility("default"))) const char* lens_emulation_maps() {
  static std::string told;
  told.swap(lens::emulation::g_calls);
  lens::emulation::g_calls.clear();
  return told.c_str();
}

// The rule that a call with these arguments breaks, or "".
__attribute__((visibility("default"))) const char* lens_emulation_map_rule(
    uint64_t map, int type, unsigned rank, uint64_t base, const uint64_t* sizes,
    const uint64_t* pitches, const unsigned* box, const unsigned* steps, int interleave,
    int swizzle, int promotion, int fill) {
  using namespace lens::emulation;
  const char* rule = broken_rule(
      {reinterpret_cast<const void*>(map), type, rank, reinterpret_cast<const void*>(base),
       reinterpret_cast<const cuuint64_t*>(sizes), reinterpret_cast<const cuuint64_t*>(pitches),
       box, steps, interleave, swizzle, promotion, fill});
  return rule ? rule : "";
}
}
