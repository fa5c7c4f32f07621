// Tables and helpers that the runtime's tests share.
#pragma once

#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "runtime/host_device.hpp"
#include "runtime/prefetcher.hpp"
#include "runtime/table_file.hpp"

namespace examples {

using namespace l3ext;

struct Example {
  TableShape shape;
  std::shared_ptr<RowOwners> owners = std::make_shared<RowOwners>();
  std::vector<float> rows;

  int64_t width() const { return shape.width(); }
  TableData data() const { return {shape, owners, rows.data()}; }
};

// Row r holds r * 100 + column, so that a misplaced row shows.
inline Example make_example(int64_t vocab, int64_t max_rows, int64_t d_in, int64_t d_emb,
                            unsigned seed) {
  Example example;
  example.shape = {DType::kFloat32, d_in, d_emb, false};
  std::mt19937 random(seed);
  example.owners->offsets = {0};
  for (int64_t t = 0; t < vocab; ++t) {
    const int64_t rows = 1 + static_cast<int64_t>(random() % static_cast<unsigned>(max_rows));
    example.owners->offsets.push_back(example.owners->offsets.back() + rows);
    example.owners->frequency.push_back(random() % 1000);
  }
  example.rows.resize(example.owners->total_rows() * example.width());
  for (int64_t i = 0; i < std::ssize(example.rows); ++i) {
    example.rows[i] = static_cast<float>(i / example.width() * 100 + i % example.width());
  }
  return example;
}

inline Table table_over(const Example& example, std::shared_ptr<TableSource> source) {
  return {example.shape, example.owners, std::move(source), {}};
}
inline Table ram_table(const Example& example) {
  return table_over(example, std::make_shared<RamTable>(example.rows.data(), nullptr));
}

inline std::shared_ptr<Prefetcher> make_prefetcher(std::vector<Table> tables,
                                                   PrefetchOptions options) {
  options.in_place = false;  // or there would be nothing to fetch
  return Prefetcher::create(std::move(tables), std::make_shared<HostDevice>(), options);
}

// Whether a waited layer of a step holds exactly the table's rows of the step's tokens.
inline bool holds_the_rows(const Prefetcher::Step& step, int64_t layer, const Example& example) {
  std::vector<int64_t> rows(2 * step.tokens().size());
  step.segment_rows(layer, rows.data());
  const auto buffer = step.rows(layer);
  const int64_t row_bytes = example.shape.row_bytes();
  for (size_t s = 0; s < step.tokens().size(); ++s) {
    const int32_t token = step.tokens()[s];
    const int64_t count = example.owners->rows(token);
    if (rows[2 * s + 1] - rows[2 * s] != count) return false;
    if (std::memcmp(buffer->data() + rows[2 * s] * row_bytes,
                    example.rows.data() + example.owners->offsets[token] * example.width(),
                    count * row_bytes) != 0) {
      return false;
    }
  }
  return true;
}

inline std::vector<int32_t> random_ids(std::mt19937& random, int64_t vocab, int most) {
  std::vector<int32_t> ids(random() % (most + 1));
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % vocab);
  return ids;
}

inline std::string temporary_path(const char* name) {
  return (std::filesystem::temp_directory_path() / concat("l3ext_", name, ".", ::getpid()))
      .string();
}

}  // namespace examples
