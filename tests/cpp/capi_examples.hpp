// Tables and helpers for the tests of the C ABI, which know nothing of the library but its header.
#pragma once

#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "l3ext/l3ext.h"

namespace examples {

// A float32 table; token t owns 1 to max_rows rows.
struct Example {
  int64_t vocab, d_in, d_emb;
  std::vector<int64_t> offsets = {0};
  std::vector<int64_t> frequency;
  std::vector<float> rows;

  Example(int64_t of, int64_t in, int64_t emb, unsigned seed = 1, int64_t max_rows = 5)
      : vocab(of), d_in(in), d_emb(emb) {
    std::mt19937 random(seed);
    for (int64_t t = 0; t < vocab; ++t) {
      offsets.push_back(offsets.back() + 1 + static_cast<int64_t>(random() % max_rows));
      frequency.push_back(random() % 100);
    }
    rows.resize(offsets.back() * (d_in + d_emb));
    std::normal_distribution<float> normal;
    for (float& x : rows) x = normal(random);
  }

  l3ext_table_data data() const {
    l3ext_table_data data = {};
    data.struct_size = sizeof data;
    data.dtype = L3EXT_FLOAT32;
    data.d_in = d_in;
    data.d_emb = d_emb;
    data.vocab_size = vocab;
    data.offsets = offsets.data();
    data.frequency = frequency.data();
    data.num_rows = offsets.back();
    data.rows = rows.data();
    return data;
  }
  const float* row(int64_t index) const { return rows.data() + index * (d_in + d_emb); }
};

inline l3ext_tables* make_tables(const std::vector<l3ext_table_data>& layers) {
  l3ext_tables* tables = nullptr;
  l3ext_tables_create(layers.data(), static_cast<int64_t>(layers.size()), &tables);
  return tables;
}

inline l3ext_runtime_options default_options() {
  l3ext_runtime_options options;
  l3ext_runtime_options_init(&options, sizeof options);
  return options;
}

// A runtime of its own for these tables, which it closes.
inline l3ext_runtime* serve(l3ext_tables* tables, const l3ext_runtime_options* options = nullptr) {
  l3ext_runtime* runtime = nullptr;
  l3ext_runtime_create(tables, options, &runtime);
  l3ext_tables_close(tables);
  return runtime;
}

inline l3ext_step* begin(l3ext_runtime* runtime, const std::vector<int32_t>& ids) {
  l3ext_step* step = nullptr;
  l3ext_step_begin(runtime, ids.data(), L3EXT_INT32, static_cast<int64_t>(ids.size()), &step);
  return step;
}

inline l3ext_view view_of(l3ext_step* step, int64_t layer) {
  l3ext_view view = {};
  view.struct_size = sizeof view;
  l3ext_step_view(step, layer, &view);
  return view;
}

// Whether a layer's view holds the example's rows of exactly these tokens.
inline bool holds_the_rows(const l3ext_view& view, const Example& example,
                           const std::vector<int32_t>& distinct) {
  if (view.num_segments != static_cast<int64_t>(distinct.size())) return false;
  for (int64_t s = 0; s < view.num_segments; ++s) {
    const int32_t token = view.tokens[s];
    const int64_t begin = view.segment_rows[2 * s], end = view.segment_rows[2 * s + 1];
    const int64_t first = example.offsets[token];
    if (token != distinct[s] || end - begin != example.offsets[token + 1] - first) return false;
    if (begin < 0 || end > view.num_rows) return false;
    for (int64_t r = 0; r < end - begin; ++r) {
      const int64_t offset = (begin + r) * view.row_stride;
      const float* row = example.row(first + r);
      if (std::memcmp(static_cast<const char*>(view.keys) + offset, row, 4 * example.d_in) != 0 ||
          std::memcmp(static_cast<const char*>(view.values) + offset, row + example.d_in,
                      4 * example.d_emb) != 0) {
        return false;
      }
    }
  }
  return true;
}

// softmax(scale * K x) V in float64, for one position.
inline std::vector<double> attention(const Example& example, int32_t token, const float* x,
                                     double scale) {
  std::vector<double> weights;
  double most = -INFINITY, sum = 0;
  for (int64_t r = example.offsets[token]; r < example.offsets[token + 1]; ++r) {
    double score = 0;
    for (int64_t i = 0; i < example.d_in; ++i) score += double{example.row(r)[i]} * x[i];
    weights.push_back(score * scale);
    most = std::max(most, weights.back());
  }
  for (double& weight : weights) sum += weight = std::exp(weight - most);
  std::vector<double> y(example.d_emb);
  for (size_t r = 0; r < weights.size(); ++r) {
    const float* values = example.row(example.offsets[token] + static_cast<int64_t>(r));
    for (int64_t i = 0; i < example.d_emb; ++i) {
      y[i] += weights[r] / sum * values[example.d_in + i];
    }
  }
  return y;
}

inline bool contains(const char* text, const std::string& part) {
  return std::strstr(text, part.c_str()) != nullptr;
}

inline std::string temporary_path(const char* name) {
  return (std::filesystem::temp_directory_path() /
          ("l3ext_" + std::string(name) + "." + std::to_string(::getpid())))
      .string();
}

}  // namespace examples
