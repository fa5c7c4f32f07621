#include "attention/plan.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "core/error.hpp"

namespace l3ext {
namespace {

// Writes the segments of a plan, token by token.
class Segments {
 public:
  explicit Segments(const PlanParams& params) : p_(params) {}

  void add(int64_t token, int64_t first_query) {
    p_.segment_tokens[count_] = static_cast<int32_t>(token);
    p_.segment_queries[count_] = static_cast<int32_t>(first_query);
    p_.segment_rows[2 * count_] = p_.offsets[token];
    p_.segment_rows[2 * count_ + 1] = p_.offsets[token + 1];
    ++count_;
  }

  void finish() {
    const int64_t all = p_.num_tokens;
    std::fill(p_.segment_tokens + count_, p_.segment_tokens + all, -1);
    std::fill(p_.segment_queries + count_, p_.segment_queries + all + 1, static_cast<int32_t>(all));
    std::fill(p_.segment_rows + 2 * count_, p_.segment_rows + 2 * all, int64_t{0});
    *p_.num_segments = static_cast<int32_t>(count_);
    *p_.table_rows = p_.offsets[p_.vocab_size];
  }

 private:
  const PlanParams& p_;
  int64_t count_ = 0;
};

// Calls f(position, id) for every id, once it is known to be in the vocabulary.
template <typename Id, typename F>
void for_each_id(const PlanParams& params, const F& f) {
  const Id* ids = static_cast<const Id*>(params.token_ids);
  for (int64_t i = 0; i < params.num_tokens; ++i) {
    const Id id = ids[i];
    L3EXT_CHECK(id >= 0 && id < params.vocab_size, "token_ids: expected ids in [0, ",
                params.vocab_size, "), got ", id, " at position ", i);
    f(static_cast<int32_t>(i), id);
  }
}

// Many ids of few tokens: each token's number of queries, then each id to its place. Ids are read
// once: what another thread writes to them meanwhile gives a wrong plan and no worse.
template <typename Id>
void plan_by_counting(const PlanParams& params, Segments& segments) {
  const std::unique_ptr<int32_t[]> tokens(new int32_t[params.num_tokens]);
  std::vector<int32_t> next(static_cast<size_t>(params.vocab_size));
  for_each_id<Id>(params, [&](int32_t position, Id id) {
    tokens[position] = static_cast<int32_t>(id);
    ++next[static_cast<size_t>(id)];
  });
  int32_t sum = 0;
  for (int64_t token = 0; token < params.vocab_size; ++token) {
    int32_t& slot = next[static_cast<size_t>(token)];
    if (slot == 0) continue;
    segments.add(token, sum);
    sum += std::exchange(slot, sum);
  }
  for (int64_t i = 0; i < params.num_tokens; ++i) {
    params.permutation[next[static_cast<size_t>(tokens[i])]++] = static_cast<int32_t>(i);
  }
}

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
void plan_by_sorting(const PlanParams& params, Segments& segments) {
  const int64_t count = params.num_tokens;
  const std::unique_ptr<Entry[]> buffer(new Entry[2 * count]);
  Entry* entries = buffer.get();
  uint32_t max_token = 0;
  for_each_id<Id>(params, [&](int32_t position, Id id) {
    entries[position] = {static_cast<uint32_t>(id), position};
    max_token = std::max(max_token, static_cast<uint32_t>(id));
  });
  sort_by_token(entries, entries + count, count, max_token);
  for (int64_t i = 0; i < count; ++i) {
    params.permutation[i] = entries[i].position;
    if (i == 0 || entries[i].token != entries[i - 1].token) segments.add(entries[i].token, i);
  }
}

}  // namespace

void check_offsets(const int64_t* offsets, int64_t vocab_size) {
  L3EXT_CHECK(offsets[0] == 0, "offsets: expected to start at 0, got ", offsets[0]);
  // Of what never falls, no entry and no difference has a sign: looked for a vector at a time,
  // and named below.
  uint64_t signs = 0;
  for (int64_t t = 0; t < vocab_size; ++t) {
    const auto now = static_cast<uint64_t>(offsets[t]),
               next = static_cast<uint64_t>(offsets[t + 1]);
    signs |= next | (next - now);
  }
  if (signs >> 63 == 0) return;
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

  Segments segments(params);
  // Beyond so many tokens an id, walking through them all costs more than sorting the ids.
  constexpr int64_t kTokensPerId = 4;
  dispatch_integer(params.token_dtype, "token_ids", [&](auto tag) {
    using Id = typename decltype(tag)::type;
    if (params.vocab_size <= kTokensPerId * count) {
      plan_by_counting<Id>(params, segments);
    } else {
      plan_by_sorting<Id>(params, segments);
    }
  });
  segments.finish();
}

}  // namespace l3ext
