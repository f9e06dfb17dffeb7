#include "emulation/hopper.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "emulation/cuda_runtime.h"
#include "emulation/guarded_memory.h"
#include "emulation/scheduler.h"
#include "math/types.h"

namespace lens::emulation {
namespace {

constexpr int kLaunchFailure = 719;
constexpr size_t kMostShared = 227 << 10, kPage = 4096;
constexpr uint32_t kFirstAddress = 1024;  // the runtime keeps the first 1024 bytes to itself
constexpr unsigned char kPoison = 0xff, kMark = 0xa7;
constexpr unsigned kMaxThreads = 1024, kWarpgroup = 128;

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

// ---- barriers: what the eight bytes in shared memory stand for
struct Barrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;  // expected and not yet copied
  uint64_t phase = 0;
  unsigned owner = 0;
  bool fenced = false;
  std::vector<unsigned> waiting;
};
struct Wait {
  const Barrier* barrier = nullptr;
  uint32_t parity = 0;
  int named = 0;
};
struct NamedBarrier {
  int threads = 0, arrived = 0;
  std::vector<unsigned> waiting;
};

// ---- copies under way
struct Copy {
  Map map;
  char* shared;
  uint64_t* bar;  // null: a store
  int at[5];
  unsigned thread;
};

// ---- products
struct Product {
  float* d;
  int n;
  bool from_registers, b_transposed, accumulate, done;
  uint32_t a[4];
  uint64_t a_bits, b_bits;
};
struct Accumulator {
  float* d;
  std::vector<float> values;  // what d will hold
};
struct Thread {
  std::deque<Product> products;  // not yet waited for, oldest first
  std::deque<uint64_t> groups;   // of each committed group the number of the product after it
  uint64_t issued = 0;           // products so far
  std::vector<Accumulator> flying;
  bool fenced = false;
  std::vector<int> stores;  // stores of each committed group not yet read, oldest first
  int open_stores = 0;

  uint64_t first() const { return issued - products.size(); }
};
struct Issue {
  uint64_t a_bits, b_bits;
  int n;
};

struct Async {
  char* mapping = nullptr;
  unsigned char* shared = nullptr;
  size_t bytes = 0;
  std::map<const void*, Barrier> barriers;
  std::vector<Wait> waits{kMaxThreads};
  NamedBarrier named[16];
  std::vector<Copy> copies;
  std::vector<Thread> threads{kMaxThreads};
  std::vector<Issue> issues[kMaxThreads / kWarpgroup];
  int registers[kMaxThreads / kWarpgroup];
  int pool = 0;  // registers of the launch, which is all that its warpgroups can share
};
Async g;
char g_waiting[160];

uint64_t marker(const uint64_t* bar) {
  return reinterpret_cast<uintptr_t>(bar) ^ 0xba221e2ba221e2ull;
}

Barrier& find(uint64_t* bar, const char* what) {
  const auto found = g.barriers.find(bar);
  if (found == g.barriers.end()) fail("%s a barrier that was never initialised", what);
  if (*bar != marker(bar)) fail("%s a barrier whose memory was overwritten", what);
  if (!found->second.fenced && found->second.owner != current_thread()) {
    fail("%s a barrier without fence_barrier_init() after its initialisation", what);
  }
  return found->second;
}

void complete(Barrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.arrivals;
  for (unsigned thread : b.waiting) wake(thread);
  b.waiting.clear();
}

// Chunk of a row of 128 bytes by the three address bits above it.
unsigned char* swizzled(unsigned char* p) {
  const uint32_t address = shared_address(p);
  return p - address + (address ^ ((address >> 7 & 7) << 4));
}

// ---- reading operands
void need_shared(const void* p, size_t bytes, const char* what) {
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < g.shared || at + bytes > g.shared + g.bytes) {
    fail("%s leaves the block's %zu bytes of dynamic shared memory", what, g.bytes);
  }
}

// Eight bf16 at a 16-byte chunk.
void read_chunk(uint32_t address, float* out) {
  const auto* p = g.shared + (address - kFirstAddress);
  need_shared(p, 16, "a matrix descriptor");
  uint16_t raw[8];
  std::memcpy(raw, swizzled(const_cast<unsigned char*>(p)), 16);
  for (int i = 0; i < 8; ++i) out[i] = lens::bits_to_float(uint32_t(raw[i]) << 16);
}

struct Descriptor {
  uint32_t start, leading, stride;
  explicit Descriptor(uint64_t bits)
      : start(uint32_t(bits & 0x3fff) << 4),
        leading(uint32_t(bits >> 16 & 0x3fff) << 4),
        stride(uint32_t(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) fail("only 128-byte swizzled matrices are emulated");
    if (bits >> 49 & 7) fail("a matrix descriptor with a base offset: tiles start on 1024 bytes");
    if (stride % 1024) fail("a matrix descriptor whose stride of %u is no atom's", stride);
  }
};

// 16 elements of K of row `row` of a matrix whose K lies along the rows.
void read_row(const Descriptor& m, int row, float* out) {
  const uint32_t at = m.start + uint32_t(row / 8) * m.stride + uint32_t(row % 8) * 128;
  read_chunk(at, out);
  read_chunk(at + 16, out + 8);
}

// Columns n and n + 1 (of 8) of a transposed B: 16 elements of K each.
void read_columns(const Descriptor& m, int n, float* first, float* second) {
  for (int k = 0; k < 16; ++k) {
    float chunk[8];
    read_chunk(m.start + uint32_t(n / 64) * m.leading + uint32_t(k / 8) * m.stride +
                   uint32_t(k % 8) * 128 + uint32_t(n % 64 / 8) * 16,
               chunk);
    first[k] = chunk[n % 8];
    second[k] = chunk[n % 8 + 1];
  }
}

Accumulator& accumulator(Thread& t, const float* d) {
  for (Accumulator& a : t.flying) {
    if (a.d == d) return a;
  }
  fail("a product whose accumulators are not under way");
}

// Product `number` of a thread. A in registers: row and columns lie in four lanes, all of which
// have issued and none of which has gone on.
void run(Thread& t, uint64_t number) {
  Product& p = t.products[size_t(number - t.first())];
  if (std::exchange(p.done, true)) return;
  const unsigned self = current_thread(), lane = self % 32, warp = self % kWarpgroup / 32;
  float a[2][16], b[2][16];
  for (unsigned h = 0; h < 2; ++h) {
    if (!p.from_registers) {
      read_row(Descriptor(p.a_bits), int(16 * warp + 8 * h + lane / 4), a[h]);
      continue;
    }
    for (unsigned k = 0; k < 16; ++k) {
      const Thread& other = g.threads[self - lane % 4 + k % 8 / 2];
      if (number < other.first() || number >= other.issued) {
        fail("the lanes of a warp disagree on their products");
      }
      const uint32_t word = other.products[size_t(number - other.first())].a[k / 8 * 2 + h];
      a[h][k] = lens::bits_to_float(k % 2 ? word & 0xffff0000u : word << 16);
    }
  }
  std::vector<float>& d = accumulator(t, p.d).values;
  if (!p.accumulate) d.assign(d.size(), 0.0f);
  const Descriptor m(p.b_bits);
  for (int j = 0; j < p.n / 8; ++j) {
    const int column = 8 * j + 2 * int(lane % 4);
    if (p.b_transposed) {
      read_columns(m, column, b[0], b[1]);
    } else {
      read_row(m, column, b[0]);
      read_row(m, column + 1, b[1]);
    }
    for (int h = 0; h < 2; ++h) {
      for (int e = 0; e < 2; ++e) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += a[h][k] * b[e][k];
        d[size_t(4 * j + 2 * h + e)] += sum;
      }
    }
  }
}

}  // namespace

// ---- the block
void begin_block(size_t shared_bytes) {
  if (g.mapping == nullptr) {
    const size_t most = (kMostShared + kPage - 1) / kPage * kPage;
    void* mapping = mmap(nullptr, most + kPage, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED || mprotect(static_cast<char*>(mapping) + most, kPage, PROT_NONE)) {
      report(kLaunchFailure, "out of memory for the emulated shared memory");
      return;
    }
    g.mapping = static_cast<char*>(mapping) + most;  // its end, before the page nobody may touch
  }
  const size_t room = (shared_bytes + 1023) / 1024 * 1024;
  g.shared = reinterpret_cast<unsigned char*>(g.mapping - room);
  g.bytes = shared_bytes;
  std::memset(g.shared, kPoison, shared_bytes);
  std::memset(g.shared + shared_bytes, kMark, room - shared_bytes);
  g.barriers.clear();
  g.copies.clear();
  for (NamedBarrier& barrier : g.named) barrier = NamedBarrier{};
  for (unsigned i = 0; i < block_threads(); ++i) {
    g.waits[i] = Wait{};
    g.threads[i] = Thread{};
  }
  for (auto& issues : g.issues) issues.clear();
  const int threads = int(block_threads() ? block_threads() : 1);
  const int fair = std::min(65536 / threads / 8 * 8, 256);
  g.pool = fair * threads;
  for (int& registers : g.registers) registers = std::min(fair, 255);
}

void end_thread() {
  const Thread& t = g.threads[current_thread()];
  if (!t.products.empty()) fail("returned before its products were waited for");
  int unread = t.open_stores;
  for (int stores : t.stores) unread += stores;
  if (unread) fail("returned before %d of its stores from shared memory were read", unread);
}

void end_block() {
  if (!g.copies.empty()) {
    report(kLaunchFailure, "%zu copies are still under way when the block ends", g.copies.size());
  }
  for (size_t i = g.bytes; i % 1024; ++i) {
    if (g.shared[i] == kMark) continue;
    report(kLaunchFailure, "wrote past the end of %zu bytes of dynamic shared memory", g.bytes);
    break;
  }
  int sum = 0;
  for (unsigned i = 0; i < block_threads() / kWarpgroup; ++i) sum += g.registers[i];
  if (sum * int(kWarpgroup) > g.pool) {
    report(kLaunchFailure, "the warpgroups ask for %d registers, the launch has %d",
           sum * int(kWarpgroup), g.pool);
  }
}

const char* waits_for(unsigned thread) {
  const Wait& wait = g.waits[thread];
  if (wait.barrier) {
    std::snprintf(g_waiting, sizeof g_waiting,
                  "parity %u of a barrier in phase %llu that lacks %d arrivals and %lld bytes",
                  wait.parity, static_cast<unsigned long long>(wait.barrier->phase),
                  wait.barrier->pending, static_cast<long long>(wait.barrier->bytes));
  } else {
    const NamedBarrier& named = g.named[wait.named];
    std::snprintf(g_waiting, sizeof g_waiting, "named barrier %d, which has %d of %d threads",
                  wait.named, named.arrived, named.threads);
  }
  return g_waiting;
}

unsigned char* dynamic_shared() {
  if (g.bytes == 0) fail("uses dynamic shared memory, the launch gave none");
  return g.shared;
}

uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - g.shared) + kFirstAddress;
}

// ---- barriers
void barrier_init(uint64_t* bar, int arrivals) {
  need_shared(bar, 8, "a barrier");
  if (arrivals < 1 || arrivals >= 1 << 20) fail("a barrier of %d arrivals", arrivals);
  if (g.barriers.count(bar)) fail("initialises a barrier twice");
  Barrier& b = g.barriers[bar];
  b.arrivals = b.pending = arrivals;
  b.owner = current_thread();
  *bar = marker(bar);
}

void fence_barrier_init() {
  for (auto& [address, barrier] : g.barriers) {
    if (barrier.owner == current_thread()) barrier.fenced = true;
  }
}

void barrier_arrive(uint64_t* bar, int bytes) {
  Barrier& b = find(bar, "arrives at");
  if (b.pending == 0) {
    fail("arrives at a barrier that has all its %d arrivals and waits for %lld bytes", b.arrivals,
         static_cast<long long>(b.bytes));
  }
  b.bytes += bytes;
  if (b.bytes >= 1 << 20) fail("a barrier that waits for 2^20 bytes or more");
  --b.pending;
  complete(b);
}

void barrier_wait(uint64_t* bar, uint32_t parity, int line) {
  Barrier& b = find(bar, "waits at");
  if (parity > 1) fail("waits for parity %u", parity);
  if ((b.phase & 1) != parity) return;
  const unsigned self = current_thread();
  g.waits[self] = Wait{&b, parity, 0};
  b.waiting.push_back(self);
  suspend(line);
}

void named_barrier(int id, int threads, bool wait, int line) {
  if (id < 1 || id > 15) fail("named barrier %d: 1 to 15 are free, 0 is __syncthreads()", id);
  if (threads < 32 || threads % 32) fail("named barrier %d of %d threads", id, threads);
  NamedBarrier& b = g.named[id];
  if (b.arrived && b.threads != threads) {
    fail("named barrier %d of %d threads, others said %d", id, threads, b.threads);
  }
  b.threads = threads;
  if (++b.arrived < threads) {
    if (!wait) return;
    g.waits[current_thread()] = Wait{nullptr, 0, id};
    b.waiting.push_back(current_thread());
    suspend(line);
    return;
  }
  b.arrived = 0;
  for (unsigned thread : b.waiting) wake(thread);
  b.waiting.clear();
}

// ---- copies
void tma_load(void* to, const CUtensorMap* raw, uint64_t* bar, int rank, const int* at) {
  Copy copy{read_map(raw, rank), static_cast<char*>(to), bar, {}, current_thread()};
  need_shared(to, box_bytes(copy.map), "a copy");
  find(bar, "copies for");
  if (shared_address(to) % (copy.map.swizzled ? 1024 : 128)) {
    fail("a copy to shared memory that is off its %d bytes", copy.map.swizzled ? 1024 : 128);
  }
  std::memcpy(copy.at, at, sizeof(int) * size_t(rank));
  g.copies.push_back(copy);
}

void tma_store(const CUtensorMap* raw, const void* from, int rank, const int* at) {
  Copy copy{read_map(raw, rank),
            static_cast<char*>(const_cast<void*>(from)),
            nullptr,
            {},
            current_thread()};
  need_shared(from, box_bytes(copy.map), "a copy");
  if (shared_address(from) % (copy.map.swizzled ? 1024 : 128)) {
    fail("a copy from shared memory that is off its %d bytes", copy.map.swizzled ? 1024 : 128);
  }
  std::memcpy(copy.at, at, sizeof(int) * size_t(rank));
  g.copies.push_back(copy);
  ++g.threads[current_thread()].open_stores;
}

void tma_store_commit() {
  Thread& t = g.threads[current_thread()];
  t.stores.push_back(std::exchange(t.open_stores, 0));
}

namespace {
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
  const Copy copy = g.copies[index];
  g.copies.erase(g.copies.begin() + long(index));
  move(copy);
  if (copy.bar == nullptr) {
    Thread& t = g.threads[copy.thread];
    for (int& stores : t.stores) {
      if (stores == 0) continue;
      --stores;
      return;
    }
    --t.open_stores;
    return;
  }
  Barrier& b = g.barriers[copy.bar];
  b.bytes -= int64_t(box_bytes(copy.map));
  if (b.bytes <= -(1 << 20)) report(kLaunchFailure, "2^20 bytes or more that no barrier expects");
  complete(b);
}
}  // namespace

bool deliver() {
  if (g.copies.empty()) return false;
  const size_t n = g.copies.size();
  deliver(seed() == 0 ? 0 : seed() % 2 ? size_t(random_below(n)) : n - 1);
  return true;
}

void tma_store_wait(int pending) {
  Thread& t = g.threads[current_thread()];
  const auto unread = [&] {
    int sum = 0;
    for (size_t i = 0; i + size_t(pending) < t.stores.size(); ++i) sum += t.stores[i];
    return sum;
  };
  while (unread()) {
    for (size_t i = 0; i < g.copies.size(); ++i) {  // in order: groups end in order
      if (g.copies[i].bar || g.copies[i].thread != current_thread()) continue;
      deliver(i);
      break;
    }
  }
  while (t.stores.size() > size_t(pending)) t.stores.erase(t.stores.begin());
}

// ---- products
void wgmma(float* d, int n, const uint32_t* a, uint64_t a_bits, uint64_t b_bits, bool b_transposed,
           bool accumulate) {
  const unsigned self = current_thread();
  Thread& t = g.threads[self];
  auto& issues = g.issues[self / kWarpgroup];
  const uint64_t index = t.issued++;
  if (index == issues.size()) {
    issues.push_back({a_bits, b_bits, n});
  } else if (issues[index].a_bits != a_bits || issues[index].b_bits != b_bits ||
             issues[index].n != n) {
    fail("the threads of a warpgroup disagree on their product number %llu",
         static_cast<unsigned long long>(index));
  }
  bool flying = false;
  for (const Accumulator& other : t.flying) flying |= other.d == d;
  if (!t.fenced && (!flying || a)) fail("a product without wgmma_fence() since registers changed");
  if (!flying) t.flying.push_back({d, std::vector<float>(d, d + n / 2)});
  for (int i = 0; i < n / 2; ++i) d[i] = std::numeric_limits<float>::quiet_NaN();
  Product p{d, n, a != nullptr, b_transposed, accumulate, false, {}, a_bits, b_bits};
  if (a) std::memcpy(p.a, a, sizeof p.a);
  t.products.push_back(p);
  if (seed() == 0 || random_below(2)) return;
  for (uint64_t number = t.first(); number < t.issued; ++number) {  // early, in order
    if (t.products[size_t(number - t.first())].from_registers) return;
    run(t, number);
  }
}

void wgmma_fence(int line) {
  warp_operation(WarpOp::kSync, ~0u, 0, 0, 32, line);
  g.threads[current_thread()].fenced = true;
}

void wgmma_commit(int line) {
  warp_operation(WarpOp::kSync, ~0u, 0, 0, 32, line);
  Thread& t = g.threads[current_thread()];
  t.groups.push_back(t.issued);
}

void wgmma_wait(int pending, float* const* touched, int count, int line) {
  Thread& t = g.threads[current_thread()];
  uint64_t end = t.first();
  while (t.groups.size() > size_t(pending)) {
    end = t.groups.front();
    t.groups.pop_front();
  }
  warp_operation(WarpOp::kSync, ~0u, 0, 0, 32, line);  // every lane has issued
  for (uint64_t number = t.first(); number < end; ++number) run(t, number);
  warp_operation(WarpOp::kSync, ~0u, 0, 0, 32, line);  // every lane's part is done
  while (t.first() < end) t.products.pop_front();
  t.fenced = false;
  for (size_t i = 0; i < t.flying.size();) {
    bool used = false;
    for (const Product& p : t.products) used |= p.d == t.flying[i].d;
    if (used) {
      ++i;
      continue;
    }
    std::copy(t.flying[i].values.begin(), t.flying[i].values.end(), t.flying[i].d);
    t.flying.erase(t.flying.begin() + long(i));
  }
  for (int i = 0; i < count; ++i) {
    for (const Accumulator& other : t.flying) {
      if (other.d == touched[i]) fail("a wait that names accumulators it leaves under way");
    }
  }
}

void set_registers(int registers, bool up, int line) {
  if (registers < 24 || registers > 256 || registers % 8) {
    fail("%d registers per thread: a multiple of 8 from 24 to 256 is asked for", registers);
  }
  warp_operation(WarpOp::kSync, ~0u, 0, 0, 32, line);
  int& held = g.registers[current_thread() / kWarpgroup];
  if (current_thread() % kWarpgroup == 0) {
    if (up ? registers < held : registers > held) {
      fail("setmaxnreg %s %d registers from %d", up ? "up to" : "down to", registers, held);
    }
    held = registers;
  }
}

// ---- the host's side
struct Device {
  int multiprocessors = 3, major = 9;
  bool bound = false;  // a context to the calling thread
  std::map<const void*, size_t> allowed;
};
static Device g_device;

int multiprocessors() { return g_device.multiprocessors; }
int compute_capability() { return g_device.major; }
void bind_context() { g_device.bound = true; }
int allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > kMostShared) return 1;
  g_device.allowed[kernel] = size_t(bytes);
  return 0;
}
bool shared_allowed(const void* kernel, size_t bytes) {
  const auto found = g_device.allowed.find(kernel);
  return bytes <= (found == g_device.allowed.end() ? 48 << 10 : found->second);
}

}  // namespace lens::emulation

using namespace lens::emulation;

CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType, cuuint32_t rank, void* base,
                                const cuuint64_t* sizes, const cuuint64_t* pitches,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (!g_device.bound) return CUDA_ERROR_INVALID_CONTEXT;
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

extern "C" {
__attribute__((visibility("default"))) void lens_emulation_device(int multiprocessors, int major) {
  g_device.multiprocessors = multiprocessors;
  g_device.major = major;
  g_device.bound = false;  // every launch may be its thread's first
}
}
