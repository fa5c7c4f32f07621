// What the prefetcher is made of: checksums, the ring, the cut into pieces, the hot set.
#include <algorithm>
#include <random>
#include <vector>

#include "check.hpp"
#include "core/checksum.hpp"
#include "runtime/block_ring.hpp"
#include "runtime/fetch_plan.hpp"
#include "runtime/hot_set.hpp"
#include "runtime_examples.hpp"

using namespace l3ext;
using namespace examples;

namespace {

void checksums_of_parts_combine() {
  const char* text = "the quick brown fox";
  for (size_t cut = 0; cut <= 19; ++cut) {
    EXPECT(crc32c_combine(crc32c(text, cut), crc32c(text + cut, 19 - cut), 19 - cut) ==
           crc32c(text, 19));
  }
  // Long inputs take another way than short ones: both must agree at every length around it.
  std::vector<unsigned char> bytes(20000);
  std::mt19937 random(0);
  for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random());
  for (size_t length = 6100; length < 20000; length += 397) {
    uint32_t crc = 0;
    for (size_t at = 0; at < length; at += 100) {
      crc = crc32c(bytes.data() + at, std::min<size_t>(100, length - at), crc);
    }
    EXPECT(crc32c(bytes.data(), length) == crc);
  }
}

// Against a plain model: pinned blocks keep their rows, a block is found until it has to go, and it
// only goes for others that take its rows.
void a_ring_remembers_what_nobody_overwrote() {
  constexpr int64_t kRows = 50, kTokens = 40;
  std::mt19937 random(1);
  BlockRing ring(kRows, kTokens);
  std::vector<int64_t> owner(kRows, -1);  // the token whose rows these are, by what was handed out
  std::vector<RingBlock*> pinned;
  int granted = 0, found = 0, refused = 0;
  std::vector<FencePtr> fences;
  for (int i = 0; i < 40000; ++i) {
    const int64_t token = random() % kTokens;
    const int64_t rows = 1 + token % 20;
    RingBlock* block = ring.find(token);
    if (block != nullptr) {
      ++found;
      ++block->pins;
    } else if ((block = ring.allocate(token, rows, fences)) != nullptr) {
      ++granted;
      for (int64_t r = block->begin; r < block->begin + rows; ++r) {
        for (const RingBlock* other : pinned) {
          EXPECT(r < other->begin || r >= other->begin + other->rows);
        }
        owner.at(r) = token;
      }
    } else {
      ++refused;
      EXPECT(!pinned.empty());  // an empty ring of 50 has room for 20
    }
    if (block != nullptr) {
      EXPECT(block->token == token && block->rows == rows && ring.find(token) == block);
      for (int64_t r = block->begin; r < block->begin + rows; ++r) EXPECT(owner.at(r) == token);
      pinned.push_back(block);
    }
    while (!pinned.empty() && random() % 2) {
      const size_t victim = random() % pinned.size();
      if (random() % 10 == 0) ring.forget(*pinned[victim]);
      --pinned[victim]->pins;
      pinned.erase(pinned.begin() + static_cast<int64_t>(victim));
    }
  }
  EXPECT(granted > 4000 && found > 4000 && refused > 4000);
  EXPECT(BlockRing(5, 1).allocate(0, 6, fences) == nullptr);
  EXPECT(BlockRing(0, 1).allocate(0, 1, fences) == nullptr);
  EXPECT(BlockRing(0, 1).find(0) == nullptr);
}

// In order round the ring: what was brought first goes first.
void a_ring_forgets_the_oldest_first() {
  BlockRing ring(4, 8);
  std::vector<FencePtr> fences;
  for (const int64_t token : {0, 1, 2, 3, 4}) --ring.allocate(token, 1, fences)->pins;
  EXPECT(ring.find(0) == nullptr && ring.find(1) != nullptr && ring.find(4)->begin == 0);
  ++ring.find(1)->pins;  // passed over
  --ring.allocate(5, 2, fences)->pins;
  EXPECT(ring.find(1) != nullptr && ring.find(5)->begin == 2);
  EXPECT(ring.find(2) == nullptr && ring.find(3) == nullptr && ring.find(4) != nullptr);
}

void pieces_cover_every_byte_once() {
  std::mt19937 random(2);
  for (int round = 0; round < 500; ++round) {
    std::vector<Block> blocks;
    int64_t source = 0, target = 0;
    for (int i = 0; i < 20; ++i) {
      if (random() % 2) source += 1 + random() % 5000;
      const int64_t bytes = random() % 4 == 0 ? random() % 40000 : random() % 600;
      blocks.push_back({i, source, target, bytes, false});
      source += bytes;
      target += bytes;
    }
    int64_t reached = 0;
    for (const Piece& piece : plan_fetch(blocks, 4096)) {
      EXPECT(piece.target == reached);
      EXPECT(piece.bytes > 0 && piece.bytes <= 4096);
      const Block& first = blocks[piece.first_block];
      EXPECT(piece.source - first.source == piece.target - first.target);
      if (piece.part) EXPECT(piece.source / 4096 == (piece.source + piece.bytes - 1) / 4096);
      reached += piece.bytes;
    }
    EXPECT(reached == target);
  }
}

void the_hot_set_takes_the_most_frequent_that_fit() {
  RowOwners owners;
  owners.offsets = {0, 4, 5, 8, 8, 10};  // rows 4 1 3 0 2
  owners.frequency = {5, 9, 9, 100, 1};
  HotSet hot = choose_hot_set(owners, 10, 69);  // six rows: 2 (more rows), 1, then 4; 0 is too big
  EXPECT((hot.row == std::vector<int64_t>{-1, 0, 1, -1, 4}));
  EXPECT(hot.rows == 6 && hot.tokens == 3);
  owners.frequency.clear();
  hot = choose_hot_set(owners, 10, 50);
  EXPECT((hot.row == std::vector<int64_t>{0, 4, -1, -1, -1}));
  EXPECT(choose_hot_set(owners, 10, 9).rows == 0);
}

}  // namespace

int main() {
  RUN(checksums_of_parts_combine);
  RUN(a_ring_remembers_what_nobody_overwrote);
  RUN(a_ring_forgets_the_oldest_first);
  RUN(pieces_cover_every_byte_once);
  RUN(the_hot_set_takes_the_most_frequent_that_fit);
  return check::failures == 0 ? 0 : 1;
}
