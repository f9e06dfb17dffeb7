// Tensor maps and the copies they describe, under way until they are delivered.
#include <cstring>
#include <utility>

#include "emulation/block_state.h"
#include "emulation/guarded_memory.h"

namespace lens::emulation {
namespace {

// ---- maps, as bits inside a CUtensorMap
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

Map read_map(const CUtensorMap* raw, int rank) {
  Map map;
  std::memcpy(&map, raw, sizeof map);
  if (map.magic != kMapMagic) fail("a copy with a tensor map that was never made");
  if (map.rank != rank) fail("a copy of rank %d with a tensor map of rank %d", rank, map.rank);
  return map;
}

size_t box_bytes(const Map& map) {
  size_t bytes = 2;
  for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

// ---- copies under way
struct Copy {
  Map map;
  char* shared;
  uint64_t* bar;  // null: a store
  int at[5];
  unsigned block;   // whose shared memory it is
  unsigned thread;  // of a store
};
std::vector<Copy> g_copies;

Copy make_copy(const CUtensorMap* raw, const void* shared, int rank, const int* at) {
  Copy copy{read_map(raw, rank),
            static_cast<char*>(const_cast<void*>(shared)),
            nullptr,
            {},
            current_block(),
            current_thread()};
  need_shared(shared, box_bytes(copy.map), "a copy");
  const unsigned align = copy.map.swizzled ? 1024 : 128;
  if (shared_address(shared) % align) fail("a copy whose shared memory is off its %u bytes", align);
  std::memcpy(copy.at, at, sizeof(int) * size_t(rank));
  return copy;
}

void move(const Copy& copy) {
  const Map& map = copy.map;
  const size_t count = box_bytes(map) / 2;
  for (size_t i = 0; i < count; ++i) {
    size_t rest = i;
    bool inside = true;
    char* global = map.base;
    for (int r = 0; r < map.rank; ++r) {
      const int64_t x = copy.at[r] + int64_t(rest % map.box[r]);
      rest /= map.box[r];
      inside &= x >= 0 && x < int64_t(map.sizes[r]);
      global += x * int64_t(r ? map.pitches[r - 1] : 2);
    }
    auto* shared = reinterpret_cast<unsigned char*>(copy.shared) + 2 * i;
    if (map.swizzled) shared = swizzled(shared);
    if (copy.bar) {
      if (inside) {
        std::memcpy(shared, global, 2);
      } else {
        std::memset(shared, 0, 2);
      }
    } else if (inside) {
      std::memcpy(global, shared, 2);
    }
  }
}

void deliver(size_t index) {
  const Copy copy = g_copies[index];
  g_copies.erase(g_copies.begin() + long(index));
  move(copy);
  BlockState& block = g_blocks[copy.block];
  if (copy.bar == nullptr) {
    Thread& t = block.threads[copy.thread];
    for (int& stores : t.stores) {
      if (stores == 0) continue;
      --stores;
      return;
    }
    --t.open_stores;
    return;
  }
  Barrier& b = block.barriers[copy.bar];
  b.bytes -= int64_t(box_bytes(copy.map));
  if (b.bytes <= -(1 << 20)) report(kLaunchFailure, "2^20 bytes or more that no barrier expects");
  complete(copy.block, b);
}

}  // namespace

void begin_copies() { g_copies.clear(); }

size_t copies_under_way(unsigned rank) {
  size_t n = 0;
  for (const Copy& copy : g_copies) n += copy.block == rank;
  return n;
}

bool deliver() {
  if (g_copies.empty()) return false;
  const size_t n = g_copies.size();
  deliver(seed() == 0 ? 0 : seed() % 2 ? size_t(random_below(n)) : n - 1);
  return true;
}

void tma_load(void* to, const CUtensorMap* raw, uint64_t* bar, uint32_t mask, int rank,
              const int* at) {
  const Copy copy = make_copy(raw, to, rank, at);
  if (mask == 0 || mask >> cluster_blocks()) {
    fail("a copy to the blocks %#x of a cluster of %u", mask, cluster_blocks());
  }
  for (unsigned block = 0; block < cluster_blocks(); ++block) {
    if (!(mask >> block & 1)) continue;
    if (block_returned(block)) fail("a copy to block %u, which has returned", block);
    Copy& part = g_copies.emplace_back(copy);
    part.block = block;
    part.shared = static_cast<char*>(in_block(block, to));
    part.bar = static_cast<uint64_t*>(in_block(block, bar));
    find_barrier(block, part.bar, "copies for");
  }
}

void tma_store(const CUtensorMap* raw, const void* from, int rank, const int* at) {
  g_copies.push_back(make_copy(raw, from, rank, at));
  ++here().threads[current_thread()].open_stores;
}

void tma_store_commit() {
  Thread& t = here().threads[current_thread()];
  t.stores.push_back(std::exchange(t.open_stores, 0));
}

void tma_store_wait(int pending) {
  Thread& t = here().threads[current_thread()];
  const auto unread = [&] {
    int sum = 0;
    for (size_t i = 0; i + size_t(pending) < t.stores.size(); ++i) sum += t.stores[i];
    return sum;
  };
  while (unread()) {
    for (size_t i = 0; i < g_copies.size(); ++i) {  // in order: groups end in order
      const Copy& copy = g_copies[i];
      if (copy.bar || copy.block != current_block() || copy.thread != current_thread()) continue;
      deliver(i);
      break;
    }
  }
  while (t.stores.size() > size_t(pending)) t.stores.erase(t.stores.begin());
}

}  // namespace lens::emulation

CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType, cuuint32_t rank, void* base,
                                const cuuint64_t* sizes, const cuuint64_t* pitches,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  using namespace lens::emulation;
  if (!context_bound()) return CUDA_ERROR_INVALID_CONTEXT;
  Map map{};
  map.magic = kMapMagic;
  map.base = static_cast<char*>(base);
  map.rank = uint8_t(rank);
  map.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  if (rank < 1 || rank > 5 || reinterpret_cast<uintptr_t>(base) % 16) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  uint64_t last = 2;
  for (cuuint32_t i = 0; i < rank; ++i) {
    const bool fits = sizes[i] >= 1 && sizes[i] <= uint64_t(1) << 32 && box[i] >= 1 &&
                      box[i] <= 256 && steps[i] == 1;
    if (!fits || (i && (pitches[i - 1] % 16 || pitches[i - 1] >> 40))) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    map.sizes[i] = uint32_t(sizes[i]);
    map.box[i] = uint16_t(box[i]);
    if (i) map.pitches[i - 1] = pitches[i - 1];
    last += (sizes[i] - 1) * (i ? pitches[i - 1] : 2);
  }
  if (box[0] * 2 % 16 || (map.swizzled && box[0] > 64)) return CUDA_ERROR_INVALID_VALUE;
  char where[300];
  if (!in_one_buffer(map.base, last, where, sizeof where)) {
    report(700, "a tensor map %s", where);
  }
  *out = CUtensorMap{};
  std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}
