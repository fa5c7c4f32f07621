#include "lzw/grant.hpp"

#include <algorithm>
#include <span>
#include <utility>

#include "core/error.hpp"

namespace l3ext::lzw {
namespace {

constexpr int kDigitBits = 16;
constexpr size_t kDigits = size_t{1} << kDigitBits;

// Stable counting sort of `order` by one digit of the counts, largest first.
void sort_by_digit(FlatArray<uint32_t>& order, FlatArray<uint32_t>& scratch,
                   std::span<const int64_t> counts, int shift) {
  const auto digit = [&](uint32_t id) {
    return static_cast<size_t>(counts[id] >> shift) & (kDigits - 1);
  };
  std::vector<size_t> place(kDigits, 0);  // first the size of each bucket, then where it goes on
  for (size_t i = 0; i < order.size(); ++i) ++place[digit(order[i])];
  size_t begin = 0;
  for (size_t d = kDigits; d-- > 0;) begin += std::exchange(place[d], begin);
  for (size_t i = 0; i < order.size(); ++i) scratch[place[digit(order[i])]++] = order[i];
  std::swap(order, scratch);
}

// The last tokens of all codewords, by count descending, ties by insertion order. Digit by digit
// from the lowest: one or two passes for real corpora, whatever the largest count is.
FlatArray<uint32_t> last_tokens_by_count(const Counter& counter) {
  const std::span<const int64_t> counts = counter.counts();
  FlatArray<uint32_t> order;
  order.resize(counts.size());
  for (uint32_t id = 0; id < counter.num_codewords(); ++id) order[id] = id;
  FlatArray<uint32_t> scratch;
  scratch.resize(counts.size());
  const int64_t largest = *std::max_element(counts.begin(), counts.end());
  for (int shift = 0; shift < 63 && (largest >> shift) > 0; shift += kDigitBits) {
    sort_by_digit(order, scratch, counts, shift);
  }
  for (size_t i = 0; i < order.size(); ++i) order[i] = counter.last_token(order[i]);
  return order;
}

}  // namespace

std::vector<int32_t> grant_rows(const Counter& counter, int64_t total_rows, int64_t max_rows,
                                const InterruptHook& interrupted) {
  const int64_t vocab_size = counter.vocab_size();
  L3EXT_CHECK(max_rows >= 1, "max_rows: expected at least 1, got ", max_rows);
  L3EXT_CHECK(total_rows >= vocab_size, "total_rows: expected at least vocab_size = ", vocab_size,
              " (every token owns a row), got ", total_rows);
  // Divides instead of multiplying: vocab_size * max_rows may not fit 64 bits.
  L3EXT_CHECK((total_rows - 1) / vocab_size < max_rows,
              "total_rows: expected at most vocab_size * max_rows = ", vocab_size, " * ", max_rows,
              ", got ", total_rows);
  const int64_t cap = std::min(max_rows, total_rows - vocab_size + 1);  // what one token can reach
  L3EXT_CHECK(cap <= INT32_MAX, "max_rows: expected at most 2147483647, got ", max_rows);

  std::vector<int32_t> rows(static_cast<size_t>(vocab_size), 1);
  FlatArray<uint32_t> order = last_tokens_by_count(counter);
  int64_t left = total_rows - vocab_size;
  while (left > 0) {
    if (interrupted && interrupted()) {
      throw Error(ErrorCode::kInterrupted, "interrupted; nothing was changed");
    }
    // Codewords whose token is full drop out, so that a further walk costs only what it grants.
    size_t kept = 0;
    for (size_t i = 0; i < order.size() && left > 0; ++i) {
      const uint32_t token = order[i];
      if (rows[token] >= cap) continue;
      ++rows[token];
      --left;
      order[kept++] = token;
    }
    order.truncate(kept);
  }
  return rows;
}

}  // namespace l3ext::lzw
