#include "cuda_step.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <random>
#include <utility>

namespace step {

bool close(const std::vector<double>& actual, const std::vector<double>& expected, double tolerance,
           const char* what) {
  if (actual.size() != expected.size()) {
    std::fprintf(stderr, "%s: %zu values, expected %zu\n", what, actual.size(), expected.size());
    return false;
  }
  double largest = 1e-30, error = 0;
  size_t worst = 0, nans = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::isnan(expected[i]) || std::isnan(actual[i])) {
      nans += std::isnan(expected[i]) != std::isnan(actual[i]);
      continue;
    }
    largest = std::max(largest, std::abs(expected[i]));
    if (std::abs(actual[i] - expected[i]) > error)
      error = std::abs(actual[i] - expected[i]), worst = i;
  }
  const double share = error / (tolerance * largest);
  if (nans == 0 && share <= 1) return true;
  std::fprintf(stderr, "%s: error %.3e at %zu is %.2f of its budget, %zu wrong NaNs\n", what, error,
               worst, share, nans);
  return false;
}

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

std::vector<int64_t> shuffled_ids(const std::vector<int64_t>& counts) {
  std::vector<int64_t> ids;
  for (size_t t = 0; t < counts.size(); ++t) ids.insert(ids.end(), counts[t], int64_t(t));
  std::shuffle(ids.begin(), ids.end(), std::mt19937(11));
  return ids;
}

Shape grid(const std::vector<int64_t>& rows, const std::vector<int64_t>& queries) {
  Shape shape;
  std::vector<int64_t> counts;
  for (const int64_t r : rows) {
    for (const int64_t q : queries) {
      shape.rows.insert(shape.rows.end(), {r, 1});
      counts.insert(counts.end(), {q, 0});
    }
  }
  shape.rows.pop_back(), counts.pop_back();  // the last segment ends where the table does
  shape.ids = shuffled_ids(counts);
  return shape;
}

Shape behind(const std::vector<int64_t>& others, Shape alone) {
  alone.ids.insert(alone.ids.begin(), others.begin(), others.end());
  return alone;
}

Shape with_widths(Shape shape, int64_t d_in, int64_t d_emb) {
  shape.d_in = d_in;
  shape.d_emb = d_emb;
  return shape;
}

template <typename T>
Step<T>::Step(Shape shape_of_step)
    : shape(std::move(shape_of_step)),
      num_tokens(static_cast<int64_t>(shape.ids.size())),
      permutation(num_tokens),
      segment_tokens(num_tokens),
      segment_queries(num_tokens + 1),
      schedule(l3ext::cuda::schedule_entries(num_tokens)),
      segment_rows(2 * num_tokens),
      directory(static_cast<int64_t>(shape.rows.size())) {
  offsets.push_back(0);
  for (const int64_t rows : shape.rows) offsets.push_back(offsets.back() + rows);
  table_rows = offsets.back();
  max_rows = shape.rows.empty() ? 0 : *std::max_element(shape.rows.begin(), shape.rows.end());
  std::vector<char> used(shape.rows.size());
  for (const int64_t id : shape.ids) {
    if (id >= 0) used[id] = 1;
  }
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  const auto fill = [&](std::vector<double>& matrix, int64_t rows, int64_t width, double factor) {
    matrix.resize(rows * width);
    for (double& v : matrix) v = factor * normal(random);
  };
  const double by_width = 1 / std::sqrt(static_cast<double>(shape.d_in));
  fill(x, num_tokens, shape.d_in, 1);
  fill(dy, num_tokens, shape.d_emb, 1);
  fill(keys, table_rows, shape.d_in, by_width);
  if (!shape.tied) fill(values, table_rows, shape.d_emb, 1);
  for (size_t t = 0; t < shape.rows.size(); ++t) {
    if (used[t]) continue;
    std::fill(keys.begin() + offsets[t] * shape.d_in, keys.begin() + offsets[t + 1] * shape.d_in,
              kNan);
    if (shape.tied) continue;
    std::fill(values.begin() + offsets[t] * shape.d_emb,
              values.begin() + offsets[t + 1] * shape.d_emb, kNan);
  }
  make_plan();
  upload();
}

template <typename T>
void Step<T>::make_plan() {
  // Positions of no token come last, as those of one more token without rows would.
  std::vector<int64_t> ids = shape.ids, longer = offsets;
  const auto beyond = static_cast<int64_t>(shape.rows.size());
  longer.push_back(offsets.back());
  std::replace(ids.begin(), ids.end(), int64_t{-1}, beyond);
  l3ext::PlanParams params;
  params.token_ids = ids.data();
  params.num_tokens = num_tokens;
  params.offsets = longer.data();
  params.vocab_size = beyond + 1;
  params.permutation = permutation.data();
  params.segment_tokens = segment_tokens.data();
  params.segment_queries = segment_queries.data();
  params.segment_rows = segment_rows.data();
  params.num_segments = &num_segments;
  int64_t rows = 0;
  params.table_rows = &rows;
  l3ext::plan(params);
  for (int64_t s = 0; s < num_segments; ++s) {
    if (segment_tokens[s] != beyond) continue;
    segment_tokens[s] = -1;
    segment_rows[2 * s] = segment_rows[2 * s + 1] = -1;
  }
  l3ext::PlanView view = inputs().plan;
  view.num_segments = num_segments;
  l3ext::cuda::make_schedule(view, schedule.data());
}

template <typename T>
void Step<T>::upload() {
  const auto round = [](std::vector<double>& matrix) {
    for (double& v : matrix) v = value_of(element<T>(v));
  };
  if (shape.tied) values = keys;
  for (auto* matrix : {&x, &dy, &keys, &values}) round(*matrix);

  const int64_t d_in = shape.d_in, d_emb = shape.d_emb;
  x_ = std::make_unique<Matrix<T>>(num_tokens, d_in, d_in + kGap);
  dy_ = std::make_unique<Matrix<T>>(num_tokens, d_emb, d_emb + 2 * kGap);
  for (int64_t i = 0; i < num_tokens; ++i) {
    x_->store(i, 0, &x[i * d_in], d_in);
    dy_->store(i, 0, &dy[i * d_emb], d_emb);
  }
  tables_.clear();
  const auto add = [&](int64_t rows, int64_t width, int64_t gap) -> Matrix<T>& {
    tables_.push_back(std::make_unique<Matrix<T>>(rows, width, width + gap));
    return *tables_.back();
  };
  const int64_t width = shape.tied ? d_in : d_in + d_emb;
  const auto store = [&](Matrix<T>& table, int64_t i, int64_t row) {
    table.store(i, 0, &keys[row * d_in], d_in);
    if (!shape.tied) table.store(i, d_in, &values[row * d_emb], d_emb);
  };
  switch (shape.layout) {
    case Layout::kTable: {
      Matrix<T>& table = add(table_rows, width, kGap);
      for (int64_t r = 0; r < table_rows; ++r) store(table, r, r);
      break;
    }
    case Layout::kSeparate: {
      Matrix<T>& key_table = add(table_rows, d_in, 0);
      Matrix<T>& value_table = add(table_rows, d_emb, kGap);
      for (int64_t r = 0; r < table_rows; ++r) {
        key_table.store(r, 0, &keys[r * d_in], d_in);
        value_table.store(r, 0, &values[r * d_emb], d_emb);
      }
      break;
    }
    case Layout::kDirectory:
      // Every token's rows lie alone before a page that faults; other tokens' addresses are -1.
      for (int64_t s = 0; s < num_segments; ++s) {
        const int64_t token = segment_tokens[s];
        if (token < 0) continue;
        Matrix<T>& table = add(shape.rows[token], width, kGap);
        for (int64_t i = 0; i < shape.rows[token]; ++i) store(table, i, offsets[token] + i);
        directory[token] = reinterpret_cast<int64_t>(table.view().data);
      }
  }
}

template <typename T>
void Step<T>::take_last(const Step& other) {
  std::copy(other.x.begin(), other.x.end(), x.end() - std::ssize(other.x));
  std::copy(other.dy.begin(), other.dy.end(), dy.end() - std::ssize(other.dy));
  const auto zero_where_nan = [](std::vector<double> matrix) {  // rows that only this step uses
    for (double& v : matrix) v = std::isnan(v) ? 0 : v;
    return matrix;
  };
  keys = zero_where_nan(other.keys);
  values = zero_where_nan(other.values);
  upload();
}

template <typename T>
l3ext::SegmentedAttentionInputs Step<T>::inputs() {
  l3ext::SegmentedAttentionInputs in;
  in.dtype = kDType<T>;
  in.d_in = shape.d_in;
  in.d_emb = shape.d_emb;
  in.scale = shape.scale;
  in.table_rows = table_rows;
  in.plan.permutation = permutation.data();
  in.plan.segment_queries = segment_queries.data();
  in.plan.segment_rows = segment_rows.data();
  in.plan.segment_tokens = segment_tokens.data();
  in.plan.num_tokens = num_tokens;
  in.plan.schedule = schedule.data();
  in.plan.max_rows = max_rows;
  if (!x_) return in;
  in.x = x_->view();
  in.spare_multiprocessors = shape.spare_multiprocessors;
  const int64_t value_offset = shape.tied ? 0 : shape.d_in;
  switch (shape.layout) {
    case Layout::kTable:
      in.keys = tables_[0]->view();
      in.values = tables_[0]->view(value_offset);
      break;
    case Layout::kSeparate:
      in.keys = tables_[0]->view();
      in.values = tables_[1]->view();
      break;
    case Layout::kDirectory:
      in.directory = directory.data();
      in.value_offset = value_offset;
      in.keys.stride = in.values.stride = (shape.tied ? 0 : shape.d_emb) + shape.d_in + kGap;
  }
  return in;
}

template <typename T>
std::vector<double> Step<T>::forward() {
  Matrix<T> y(num_tokens, shape.d_emb, shape.d_emb + kGap);
  l3ext::SegmentedAttentionParams params{inputs(), y.mutable_view()};
  const int64_t bytes = l3ext::cuda::segmented_attention_workspace(params);
  DeviceBuffer<std::byte> workspace(bytes, 256);
  l3ext::cuda::segmented_attention(params, {nullptr, workspace.data(), bytes});
  std::vector<double> result;
  for (int64_t i = 0; i < num_tokens; ++i) {
    const std::vector<double> row = y.load(i, 0, shape.d_emb);
    result.insert(result.end(), row.begin(), row.end());
  }
  return result;
}

template <typename T>
Gradients Step<T>::backward(Wanted wanted) {
  const int64_t d_in = shape.d_in, d_emb = shape.d_emb;
  // Packed segments keep a row between them that nobody may write.
  std::vector<int64_t> gradient_rows(num_segments);
  int64_t packed_rows = 0;
  for (int64_t s = 0; s < num_segments; ++s) {
    gradient_rows[s] = packed_rows;
    packed_rows += segment_rows[2 * s + 1] - segment_rows[2 * s] + 1;
  }
  const int64_t rows = wanted.packed ? packed_rows : table_rows;
  Matrix<T> dx(num_tokens, d_in, d_in + kGap);
  Matrix<T> dtable(rows, shape.tied ? d_in : d_in + d_emb, d_in + d_emb + kGap);
  DeviceBuffer<int64_t> segment_gradients(gradient_rows);

  l3ext::SegmentedAttentionBackwardParams params{inputs(), dy_->view(), {}, {}, {}};
  if (wanted.dx) params.dx = dx.mutable_view();
  if (wanted.rows) {
    params.dkeys = dtable.mutable_view();
    if (!shape.tied) params.dvalues = dtable.mutable_view(d_in);
    if (wanted.packed) params.segment_gradients = segment_gradients.data();
  }
  const int64_t bytes = l3ext::cuda::segmented_attention_backward_workspace(params);
  DeviceBuffer<std::byte> workspace(bytes, 256);
  l3ext::cuda::segmented_attention_backward(params, {nullptr, workspace.data(), bytes});

  Gradients result;
  const auto append = [](std::vector<double>& to, const std::vector<double>& row) {
    to.insert(to.end(), row.begin(), row.end());
  };
  for (int64_t i = 0; i < num_tokens; ++i) append(result.dx, dx.load(i, 0, d_in));
  if (!wanted.packed) {
    for (int64_t r = 0; r < table_rows; ++r) {
      append(result.dkeys, dtable.load(r, 0, d_in));
      if (!shape.tied) append(result.dvalues, dtable.load(r, d_in, d_emb));
    }
    return result;
  }
  result.dkeys.resize(table_rows * d_in);
  result.dvalues.resize(shape.tied ? 0 : table_rows * d_emb);
  for (int64_t s = 0; s < num_segments; ++s) {
    const int64_t begin = segment_rows[2 * s], count = segment_rows[2 * s + 1] - begin;
    for (int64_t i = 0; i < count; ++i) {
      const auto key = dtable.load(gradient_rows[s] + i, 0, d_in);
      std::copy(key.begin(), key.end(), result.dkeys.begin() + (begin + i) * d_in);
      if (shape.tied) continue;
      const auto value = dtable.load(gradient_rows[s] + i, d_in, d_emb);
      std::copy(value.begin(), value.end(), result.dvalues.begin() + (begin + i) * d_emb);
    }
    if (wanted.rows) EXPECT(std::isnan(dtable.load(gradient_rows[s] + count, 0, 1)[0]));
  }
  return result;
}

template <typename T>
std::vector<double> Step<T>::reference(Gradients* gradients) const {
  const int64_t d_in = shape.d_in, d_emb = shape.d_emb;
  std::vector<double> y(num_tokens * d_emb), dx(num_tokens * d_in), dkeys(table_rows * d_in),
      dvalues(table_rows * d_emb);
  for (int64_t i = 0; i < num_tokens; ++i) {
    const int64_t id = shape.ids[i];
    if (id < 0) {
      std::fill_n(&y[i * d_emb], d_emb, kNan);
      std::fill_n(&dx[i * d_in], d_in, kNan);
      continue;
    }
    const int64_t begin = offsets[id], count = offsets[id + 1] - begin;
    std::vector<double> p(count), dp(count);
    double largest = -INFINITY, sum = 0, delta = 0;
    for (int64_t r = 0; r < count; ++r) {
      double score = 0;
      for (int64_t c = 0; c < d_in; ++c) score += x[i * d_in + c] * keys[(begin + r) * d_in + c];
      p[r] = shape.scale * score;
      largest = std::max(largest, p[r]);
    }
    for (double& v : p) sum += v = std::exp(v - largest);
    for (double& v : p) v /= sum;
    for (int64_t r = 0; r < count; ++r) {
      const double* value = &values[(begin + r) * d_emb];
      for (int64_t c = 0; c < d_emb; ++c) {
        y[i * d_emb + c] += p[r] * value[c];
        dp[r] += dy[i * d_emb + c] * value[c];
        dvalues[(begin + r) * d_emb + c] += p[r] * dy[i * d_emb + c];
      }
      delta += p[r] * dp[r];
    }
    for (int64_t r = 0; r < count; ++r) {
      const double ds = shape.scale * p[r] * (dp[r] - delta);
      for (int64_t c = 0; c < d_in; ++c) {
        dx[i * d_in + c] += ds * keys[(begin + r) * d_in + c];
        dkeys[(begin + r) * d_in + c] += ds * x[i * d_in + c];
      }
    }
  }
  if (gradients != nullptr) {
    if (shape.tied) {
      for (size_t i = 0; i < dkeys.size(); ++i) dkeys[i] += dvalues[i];
      dvalues.clear();
    }
    *gradients = {std::move(dx), std::move(dkeys), std::move(dvalues)};
  }
  return y;
}

template class Step<float>;
template class Step<BFloat16>;
template class Step<Float16>;

}  // namespace step
