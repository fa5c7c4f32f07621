#include "runtime/hot_set.hpp"

#include <algorithm>
#include <numeric>

namespace l3ext {

HotSet choose_hot_set(const RowOwners& owners, int64_t row_bytes, int64_t budget_bytes) {
  const int64_t vocab = owners.vocab_size();
  HotSet hot;
  hot.row.assign(static_cast<size_t>(vocab), -1);
  int64_t budget_rows = budget_bytes / row_bytes;
  if (budget_rows == 0) return hot;

  std::vector<int64_t> order(static_cast<size_t>(vocab));
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto& frequency = owners.frequency;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    if (!frequency.empty() && frequency[a] != frequency[b]) return frequency[a] > frequency[b];
    return owners.rows(a) > owners.rows(b);
  });
  for (const int64_t token : order) {
    const int64_t rows = owners.rows(token);
    if (rows == 0 || rows > budget_rows) continue;
    budget_rows -= rows;
    hot.row[token] = 0;
  }
  for (int64_t token = 0; token < vocab; ++token) {  // id order: neighbours load in one read
    if (hot.row[token] < 0) continue;
    hot.row[token] = hot.rows;
    hot.rows += owners.rows(token);
    ++hot.tokens;
  }
  return hot;
}

}  // namespace l3ext
