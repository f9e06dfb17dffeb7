// Which tiles there are, and in which order the blocks take them: the samples of most keys first,
// so that a launch ends with short tiles; within a sample head by head, so that the blocks at work
// share keys and values in L2. Every block computes the schedule for itself, the same one, from
// offsets that only the device knows; block x takes tiles x, x + gridDim.x, ..
#pragma once

#include <cuda_runtime.h>

#include "math/offsets.h"
#include "params/attention.h"

namespace lens::gpu {

constexpr int kTileQueries = 128;
constexpr int kScheduledSamples = 256;  // of one launch

// Samples by rank: the one of most keys has rank 0, equal ones keep their order.
struct Schedule {
  int sample[kScheduledSamples];
  int first_tile[kScheduledSamples + 1];  // of one head
};

struct Sample {
  int images, texts;        // rows
  int image_row, text_row;  // the first in each stream; its joint row is their sum
  int queries;

  __device__ __forceinline__ Sample(const JointAttentionParams& p, int b)
      : image_row(__ldg(p.image_offsets + b)), text_row(__ldg(p.text_offsets + b)) {
    images = __ldg(p.image_offsets + b + 1) - image_row;
    texts = __ldg(p.text_offsets + b + 1) - text_row;
    queries = p.text_out != nullptr ? images + texts : images;
  }
  __device__ __forceinline__ int keys() const { return images + texts; }
  __device__ __forceinline__ int tiles() const {
    return (queries + kTileQueries - 1) / kTileQueries;
  }
};

// By all threads; a barrier follows.
__device__ inline void make_schedule(Schedule& schedule, const JointAttentionParams& p) {
  const int samples = int(p.B);
  for (int b = int(threadIdx.x); b < samples; b += int(blockDim.x)) {
    const Sample own(p, b);
    int rank = 0, before = 0;
    for (int other = 0; other < samples; ++other) {
      const Sample sample(p, other);
      const bool first = sample.keys() > own.keys() || (sample.keys() == own.keys() && other < b);
      rank += first ? 1 : 0;
      before += first ? sample.tiles() : 0;
    }
    schedule.sample[rank] = b;
    schedule.first_tile[rank] = before;
    if (rank == samples - 1) schedule.first_tile[samples] = before + own.tiles();
  }
}

// The tiles of a block, one after another: every warp of the block goes through the same ones.
class TileIterator {
 public:
  __device__ __forceinline__ TileIterator(const Schedule& schedule, const JointAttentionParams& p)
      : schedule_(schedule), p_(p), tile_(int(blockIdx.x) - int(gridDim.x)) {}

  // Goes to the next tile; false after the last.
  __device__ __forceinline__ bool next() {
    const int heads = int(p_.N);
    tile_ += int(gridDim.x);
    if (tile_ >= schedule_.first_tile[p_.B] * heads) return false;
    while (tile_ >= schedule_.first_tile[rank_ + 1] * heads) ++rank_;
    const Sample sample(p_, schedule_.sample[rank_]);
    const int within = tile_ - schedule_.first_tile[rank_] * heads;
    images = sample.images;
    image_row = sample.image_row;
    text_row = sample.text_row;
    queries = sample.queries;
    keys = sample.keys();
    head = within / sample.tiles();
    query = within % sample.tiles() * kTileQueries;
    return true;
  }

  int head;
  int query;                  // the tile's first, counted within the sample
  int queries, keys, images;  // the sample's
  int image_row, text_row;    // its first in each stream

  __device__ __forceinline__ int row() const { return image_row + text_row; }

 private:
  const Schedule& schedule_;
  const JointAttentionParams& p_;
  int tile_, rank_ = 0;
};

}  // namespace lens::gpu
