#include "attention_workload.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>

#include "core/error.hpp"

namespace l3ext::bench {
namespace {

constexpr int64_t kMaxRows = 512;

std::vector<int32_t> read_ids(const std::string& path) {
  std::ifstream stream(path, std::ios::binary | std::ios::ate);
  if (!stream) throw Error::io(path, 0, "cannot read");
  std::vector<int32_t> ids(static_cast<size_t>(stream.tellg()) / sizeof(int32_t));
  L3EXT_CHECK(!ids.empty(), path, ": expected int32 values, got none");
  stream.seekg(0);
  stream.read(reinterpret_cast<char*>(ids.data()),
              static_cast<std::streamsize>(ids.size() * sizeof(int32_t)));
  return ids;
}

Workload read_workload(const std::string& tokens_path, const std::string& rows_path) {
  Workload workload;
  for (const int32_t rows : read_ids(rows_path)) {
    L3EXT_CHECK(rows >= 1, rows_path, ": expected one row or more for every token, got ", rows);
    workload.offsets.push_back(workload.offsets.back() + rows);
  }
  for (const int32_t id : read_ids(tokens_path)) {
    L3EXT_CHECK(id >= 0 && id < workload.vocab_size(), tokens_path, ": expected ids in [0, ",
                workload.vocab_size(), "), got ", id);
    workload.tokens.push_back(id);
  }
  return workload;
}

Workload draw_workload(int64_t vocab_size, int64_t table_rows, int64_t num_tokens) {
  const auto rows_at = [&](int64_t c, int64_t t) {
    return std::clamp<int64_t>(c / (t + 1), 1, kMaxRows);
  };
  int64_t low = 0, high = vocab_size * kMaxRows;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    int64_t sum = 0;
    for (int64_t t = 0; t < vocab_size; ++t) sum += rows_at(middle, t);
    (sum <= table_rows ? low : high) = middle;
  }
  Workload workload;
  std::vector<double> cumulative;
  double sum = 0;
  for (int64_t t = 0; t < vocab_size; ++t) {
    workload.offsets.push_back(workload.offsets.back() + rows_at(low, t));
    cumulative.push_back(sum += 1.0 / static_cast<double>(t + 1));
  }
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform(0, sum);
  for (int64_t i = 0; i < num_tokens; ++i) {
    const auto it = std::upper_bound(cumulative.begin(), cumulative.end(), uniform(random));
    workload.tokens.push_back(std::min<int64_t>(it - cumulative.begin(), vocab_size - 1));
  }
  return workload;
}

}  // namespace

int64_t Workload::max_rows() const {
  int64_t most = 0;
  for (size_t t = 1; t < offsets.size(); ++t) most = std::max(most, offsets[t] - offsets[t - 1]);
  return most;
}

std::span<const int64_t> Workload::step(int64_t i, int64_t count) const {
  const auto all = static_cast<int64_t>(tokens.size());
  L3EXT_CHECK(count <= all, "step: expected at most ", all, " tokens, got ", count);
  return std::span(tokens).subspan(static_cast<size_t>(i % (all / count) * count),
                                   static_cast<size_t>(count));
}

Workload make_workload(int64_t vocab_size, int64_t table_rows, int64_t num_tokens) {
  const char* tokens = std::getenv("L3EXT_BENCH_TOKENS");
  const char* rows = std::getenv("L3EXT_BENCH_ROWS");
  if (rows != nullptr) {
    L3EXT_CHECK(tokens != nullptr,
                "L3EXT_BENCH_ROWS: expected L3EXT_BENCH_TOKENS beside it, got none");
    return read_workload(tokens, rows);
  }
  return draw_workload(vocab_size, table_rows, num_tokens);
}

StepShape::StepShape(std::span<const int64_t> token_ids, std::span<const int64_t> offsets)
    : tokens(static_cast<int64_t>(token_ids.size())) {
  std::vector<bool> seen(offsets.size());
  for (const int64_t id : token_ids) {
    const auto t = static_cast<size_t>(id);
    const int64_t owned = offsets[t + 1] - offsets[t];
    if (owned == 1) {
      ++single_tokens;
    } else {
      pairs += owned;
    }
    if (seen[t]) continue;
    seen[t] = true;
    ++segments;
    rows += owned;
    if (owned == 1) ++single_rows;
  }
}

Cost StepShape::forward(int64_t d_in, int64_t d_emb, int64_t row_bytes, int64_t query_bytes) const {
  const int64_t many_rows = rows - single_rows;
  return {(many_rows * d_in + rows * d_emb) * row_bytes +
              ((tokens - single_tokens) * d_in + tokens * d_emb) * query_bytes,
          2 * pairs * (d_in + d_emb)};
}

Cost StepShape::backward(int64_t d_in, int64_t d_emb, int64_t element_bytes) const {
  const int64_t many_rows = rows - single_rows;
  const int64_t read = (many_rows + tokens - single_tokens) * d_in + (many_rows + tokens) * d_emb;
  const int64_t written = tokens * d_in + rows * (d_in + d_emb);
  // Scores again, gradients of queries and of keys; gradients of weights and of values.
  return {(read + written) * element_bytes, 2 * pairs * (3 * d_in + 2 * d_emb)};
}

}  // namespace l3ext::bench
