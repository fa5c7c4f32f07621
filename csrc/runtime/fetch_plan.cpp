#include "runtime/fetch_plan.hpp"

#include <algorithm>

namespace l3ext {

std::vector<Piece> plan_fetch(const std::vector<Block>& blocks, int64_t piece_bytes) {
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < static_cast<int64_t>(blocks.size()); ++i) {
    const Block& block = blocks[static_cast<size_t>(i)];
    if (block.bytes == 0) continue;
    if (block.bytes > piece_bytes) {
      const int64_t end = block.source + block.bytes;
      for (int64_t at = block.source; at < end;) {
        const int64_t next = std::min(end, (at / piece_bytes + 1) * piece_bytes);
        pieces.push_back(
            {at, block.target + (at - block.source), next - at, i, i + 1, true, block.resident});
        at = next;
      }
      continue;
    }
    if (!pieces.empty()) {
      Piece& last = pieces.back();
      if (!last.part && last.resident == block.resident &&
          last.source + last.bytes == block.source && last.target + last.bytes == block.target &&
          last.bytes + block.bytes <= piece_bytes) {
        last.bytes += block.bytes;
        last.last_block = i + 1;
        continue;
      }
    }
    pieces.push_back({block.source, block.target, block.bytes, i, i + 1, false, block.resident});
  }
  return pieces;
}

}  // namespace l3ext
