// Cuts what one layer needs in one step into pieces: the unit that a worker reads, verifies and
// copies. Blocks that are neighbours in the table and in the target travel together; a block that
// is larger than a piece is cut, so that several workers share it.
#pragma once

#include <cstdint>
#include <vector>

namespace l3ext {

// The rows of one token, in bytes.
struct Block {
  int64_t token = 0;
  int64_t source = 0;  // in the table, or in the arena where `resident`
  int64_t target = 0;  // in the arena or in the step's own buffer
  int64_t bytes = 0;
  bool resident = false;  // copied from the hot set, for a step that has a buffer of its own
};

struct Piece {
  int64_t source = 0;
  int64_t target = 0;
  int64_t bytes = 0;
  int64_t first_block = 0;  // whole blocks [first_block, last_block), or a part of first_block
  int64_t last_block = 0;
  bool part = false;
  bool resident = false;
};

// `blocks` ascend in `source` among those that are not resident. Empty blocks give no piece. Cuts
// lie at multiples of `piece_bytes` in the table: with page-aligned tables no page is read twice.
std::vector<Piece> plan_fetch(const std::vector<Block>& blocks, int64_t piece_bytes);

}  // namespace l3ext
