#include "attention/plan.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <utility>

#include "core/error.hpp"

namespace l3ext {
namespace {

struct Entry {
  uint32_t token;
  int32_t position;
};

// Stable least-significant-digit radix sort: two passes of 11 bits cover 4 M ids. A comparison
// sort takes over where the histogram would cost more than the sort.
void sort_by_token(Entry* entries, Entry* spare, int64_t count, uint32_t max_token) {
  constexpr int kDigitBits = 11;
  constexpr uint32_t kDigits = 1u << kDigitBits;
  if (count < kDigits / 4) {
    std::sort(entries, entries + count, [](const Entry& a, const Entry& b) {
      return a.token != b.token ? a.token < b.token : a.position < b.position;
    });
    return;
  }
  Entry* from = entries;
  Entry* to = spare;
  for (int shift = 0; shift < 32 && (max_token >> shift) != 0; shift += kDigitBits) {
    std::array<int32_t, kDigits> next{};
    for (int64_t i = 0; i < count; ++i) ++next[(from[i].token >> shift) & (kDigits - 1)];
    int32_t sum = 0;
    for (int32_t& slot : next) sum += std::exchange(slot, sum);
    for (int64_t i = 0; i < count; ++i) {
      to[next[(from[i].token >> shift) & (kDigits - 1)]++] = from[i];
    }
    std::swap(from, to);
  }
  if (from != entries) std::copy(from, from + count, entries);
}

template <typename Id>
uint32_t read_tokens(const Id* ids, int64_t count, int64_t vocab_size, Entry* entries) {
  Id largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Id id = ids[i];
    L3EXT_CHECK(id >= 0 && id < vocab_size, "token_ids: expected ids in [0, ", vocab_size,
                "), got ", id, " at position ", i);
    largest = std::max(largest, id);
    entries[i] = {static_cast<uint32_t>(id), static_cast<int32_t>(i)};
  }
  return static_cast<uint32_t>(largest);
}

}  // namespace

void check_offsets(const int64_t* offsets, int64_t vocab_size) {
  L3EXT_CHECK(offsets[0] == 0, "offsets: expected to start at 0, got ", offsets[0]);
  for (int64_t t = 0; t < vocab_size; ++t) {
    L3EXT_CHECK(offsets[t] <= offsets[t + 1], "offsets: expected never to fall, got ",
                offsets[t + 1], " after ", offsets[t], " at index ", t + 1);
  }
}

void plan(const PlanParams& params) {
  const int64_t count = params.num_tokens;
  L3EXT_CHECK(count <= std::numeric_limits<int32_t>::max(), "token_ids: expected at most ",
              std::numeric_limits<int32_t>::max(), " tokens in a step, got ", count);
  L3EXT_CHECK(params.vocab_size <= std::numeric_limits<int32_t>::max(),
              "offsets: expected at most ", std::numeric_limits<int32_t>::max(), " tokens, got ",
              params.vocab_size);
  if (params.check_offsets) check_offsets(params.offsets, params.vocab_size);

  const std::unique_ptr<Entry[]> buffer(new Entry[2 * count]);
  Entry* entries = buffer.get();
  const uint32_t max_token = dispatch_integer(params.token_dtype, "token_ids", [&](auto tag) {
    using Id = typename decltype(tag)::type;
    return read_tokens(static_cast<const Id*>(params.token_ids), count, params.vocab_size, entries);
  });
  sort_by_token(entries, entries + count, count, max_token);

  int64_t segments = 0;
  for (int64_t i = 0; i < count; ++i) {
    params.permutation[i] = entries[i].position;
    if (i > 0 && entries[i].token == entries[i - 1].token) continue;
    const uint32_t token = entries[i].token;
    params.segment_tokens[segments] = static_cast<int32_t>(token);
    params.segment_queries[segments] = static_cast<int32_t>(i);
    params.segment_rows[2 * segments] = params.offsets[token];
    params.segment_rows[2 * segments + 1] = params.offsets[token + 1];
    ++segments;
  }
  std::fill(params.segment_tokens + segments, params.segment_tokens + count, -1);
  std::fill(params.segment_queries + segments, params.segment_queries + count + 1,
            static_cast<int32_t>(count));
  std::fill(params.segment_rows + 2 * segments, params.segment_rows + 2 * count, int64_t{0});
  *params.num_segments = static_cast<int32_t>(segments);
  *params.table_rows = params.offsets[params.vocab_size];
}

}  // namespace l3ext
