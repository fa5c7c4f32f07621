// What the attention benchmarks run on: token ids, who owns how many rows, and the least that a
// step must move and multiply.
//
//   L3EXT_BENCH_ROWS=rows.bin   raw little-endian int32, the rows of every token (its length is the
//                               vocabulary's size), together with
//   L3EXT_BENCH_TOKENS=ids.bin  raw little-endian int32 ids, a real token stream
//   no rows                     synthetic: ids drawn independently with probability ~ 1 / (id + 1)
//                               (mt19937_64, seed 1); token t owns clamp(floor(c / (t + 1)), 1,
//                               512) rows, with the largest c that gives no more rows than wanted.
//                               A model of a large vocabulary, not a text.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace l3ext::bench {

struct Workload {
  std::vector<int64_t> offsets{0};  // [vocab_size + 1]
  std::vector<int64_t> tokens;

  int64_t vocab_size() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t table_rows() const { return offsets.back(); }
  int64_t max_rows() const;
  // Step i of `count` ids: steps follow each other through the stream, and begin again at its end.
  // Throws kValue where the stream has not as many ids.
  std::span<const int64_t> step(int64_t i, int64_t count) const;
};

// From the files of the environment, else synthetic with these sizes. Throws for rows without
// tokens, files that cannot be read, and ids that own nothing.
Workload make_workload(int64_t vocab_size, int64_t table_rows, int64_t num_tokens);

struct Cost {
  int64_t bytes = 0;
  int64_t flops = 0;
};

// A segment of one row needs no key, no query and no product: its softmax is 1. What such segments
// save is counted, so that nothing can be below the floor.
struct StepShape {
  int64_t tokens = 0;
  int64_t segments = 0;
  int64_t rows = 0;           // of the distinct tokens
  int64_t single_rows = 0;    // of these, rows that are their token's only one
  int64_t single_tokens = 0;  // positions whose token owns one row
  int64_t pairs = 0;          // of a query and a row to attend to, without those of single rows

  StepShape(std::span<const int64_t> token_ids, std::span<const int64_t> offsets);
  // Reads the distinct tokens' rows and x once, writes y once. Bytes of an element: of rows, of x
  // and y.
  Cost forward(int64_t d_in, int64_t d_emb, int64_t row_bytes, int64_t query_bytes) const;
  // Reads rows, x and dy once; writes dx and the gradients of the distinct tokens' rows once.
  Cost backward(int64_t d_in, int64_t d_emb, int64_t element_bytes) const;
};

}  // namespace l3ext::bench
