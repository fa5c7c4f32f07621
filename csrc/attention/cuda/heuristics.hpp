// Choices of tile and split sizes: functions of sizes, the device's limits and the tuning.
#pragma once

#include <cstdint>

#include "attention/cuda/schedule.hpp"

namespace l3ext::cuda {

// What decides where sizes leave a choice. For benchmarks, which measure what another choice would
// cost: they change it between calls, in a process of their own. Of these, only slabs and the
// decode kernel show in the bits.
struct Tuning {
  int most_forward_tiles = 8;                  // 8, 4 or 1
  int most_backward_tiles = 4;                 // 4 or 1
  int64_t most_decode_tokens = kDecodeTokens;  // of a step that the decode kernel serves
  int decode_turns = 4;                        // pieces per resident block before pieces grow
  bool slabs = true;                           // of a tied table, where they fit
};
Tuning& tuning();

// Tiles of 8 queries that one block attends at a time in dense chunks, as many as shared memory
// holds the scores of; 1: the stream kernel serves the dense chunks too.
int forward_tiles(int64_t element_bytes, int64_t max_rows, int64_t shared_bytes);   // 8, 4 or 1
int backward_tiles(int64_t element_bytes, int64_t max_rows, int64_t shared_bytes);  // 4 or 1

// Whether rows of a tied table pass through shared memory, once; else they are read twice.
bool slabs_fit(int64_t element_bytes, int64_t width, int64_t shared_bytes);

// Of the blocks that are `resident` on a device at a time, those that leave `spare` multiprocessors
// free; at least 1.
int blocks_beside(int resident, int multiprocessors, int spare);

struct DecodeShape {
  int slice_blocks;    // 1 or 2: blocks of 16 rows that one block of threads scores at a time
  int slices;          // of max_rows
  int tiles_per_unit;  // tiles of 64 columns that one block of threads sums after one softmax
  int64_t units;       // at most, of either phase: more blocks than this have nothing to do
};
// Smaller pieces while they fit the `resident` blocks in a few turns, larger ones beyond: a piece
// costs some microseconds of latency however small it is.
DecodeShape decode_shape(int64_t num_tokens, int64_t max_rows, int64_t d_emb, int resident);

}  // namespace l3ext::cuda
