// The copies that tensor maps describe, under way until they are delivered; and those of threads.
#include <cstring>
#include <utility>

#include "emulation/block_state.h"
#include "emulation/tensor_maps.h"

namespace lens::emulation {
namespace {

Map read_map(const CUtensorMap* raw, const char* what) {
  Map map;
  std::memcpy(&map, raw, sizeof map);
  if (map.magic != kMapMagic) fail("%s a tensor map that was never made", what);
  return map;
}
Map read_map(const CUtensorMap* raw, int rank) {
  const Map map = read_map(raw, "a copy with");
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
  uint64_t* bar;
  int at[5];
  unsigned block;  // whose shared memory it is
};
std::vector<Copy> g_copies;

void move(const Copy& copy) {
  const Map& map = copy.map;
  const size_t count = box_bytes(map) / 2;
  for (size_t i = 0; i < count; ++i) {
    size_t rest = i;
    bool inside = true;
    const char* global = map.base;
    for (int r = 0; r < map.rank; ++r) {
      const int64_t x = copy.at[r] + int64_t(rest % map.box[r]);
      rest /= map.box[r];
      inside &= x >= 0 && x < int64_t(map.sizes[r]);
      global += x * int64_t(r ? map.pitches[r - 1] : 2);
    }
    auto* shared = reinterpret_cast<unsigned char*>(copy.shared) + 2 * i;
    if (map.swizzled) shared = swizzled(shared);
    if (inside) {
      std::memcpy(shared, global, 2);
    } else {
      std::memset(shared, 0, 2);
    }
  }
}

void deliver(size_t index) {
  const Copy copy = g_copies[index];
  g_copies.erase(g_copies.begin() + long(index));
  move(copy);
  Barrier& b = g_blocks[copy.block].barriers[copy.bar];
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

void tma_prefetch(const CUtensorMap* map) { read_map(map, "a prefetch of"); }

void tma_load(void* to, const CUtensorMap* raw, uint64_t* bar, uint32_t mask, int rank,
              const int* at) {
  Copy copy{read_map(raw, rank), static_cast<char*>(to), bar, {}, current_block()};
  need_shared(to, box_bytes(copy.map), "a copy");
  const unsigned align = copy.map.swizzled ? 1024 : 128;
  if (shared_address(to) % align) fail("a copy whose shared memory is off its %u bytes", align);
  std::memcpy(copy.at, at, sizeof(int) * size_t(rank));
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

// ---- copies by threads

namespace {

void move(ThreadCopy& copy) {
  if (std::exchange(copy.done, true)) return;
  if (copy.from) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

}  // namespace

void cp_async(void* to, const void* from, bool there) {
  need_shared(to, 16, "a copy");
  const auto unaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
  if (unaligned(to) || (there && unaligned(from))) fail("a copy that is not on 16-byte boundaries");
  Thread& t = here().threads[current_thread()];
  t.copies.push_back({static_cast<unsigned char*>(to), there ? from : nullptr, false});
  ++t.open_copies;
  if (seed() && random_below(2)) move(t.copies.back());
}

void cp_async_commit() {
  Thread& t = here().threads[current_thread()];
  t.copy_groups.push_back(std::exchange(t.open_copies, 0));
}

void cp_async_wait(int pending) {
  Thread& t = here().threads[current_thread()];
  while (t.copy_groups.size() > size_t(pending)) {
    for (size_t left = t.copy_groups.front(); left; --left) {
      move(t.copies.front());
      t.copies.pop_front();
    }
    t.copy_groups.pop_front();
  }
}

}  // namespace lens::emulation
