// Backward on the CPU, without atomics. Phase 1, parallel over units of queries: the softmax p is
// computed again, then ds and dx. Phase 2, parallel over slices of rows: each row's gradient is
// summed over the segment's queries, in order, by one thread. Between them p and ds of a group of
// segments lie in a bounded workspace.
#include <algorithm>
#include <cstddef>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/cpu/row_kernels.hpp"
#include "attention/cpu/schedule.hpp"
#include "attention/segmented_attention.hpp"
#include "core/error.hpp"
#include "core/parallel.hpp"
#include "core/scratch.hpp"

namespace l3ext {
namespace cpu {
namespace {

template <typename T>
class Backward {
 public:
  using Acc = Accumulator<T>;

  explicit Backward(const SegmentedAttentionBackwardParams& params)
      : p_(params), kernels_(row_kernels<T>(active_cpu_isa())) {}

  void run() {
    const std::vector<Unit> segments = make_units(p_.plan, p_.d_in, /*whole_segments=*/true);
    if (wants_rows() && p_.segment_gradients == nullptr) zero_untouched(segments);
    // Whole segments until the workspace is full; one segment larger than it gets its own.
    constexpr int64_t kGroupElements = 8 << 20;
    for (size_t begin = 0; begin < segments.size();) {
      int64_t elements = 0;
      size_t end = begin;
      do {
        elements += segments[end].queries() * segments[end].rows();
        ++end;
      } while (end < segments.size() &&
               elements + segments[end].queries() * segments[end].rows() <= kGroupElements);
      run_group({segments.begin() + begin, segments.begin() + end}, elements);
      begin = end;
    }
  }

 private:
  // One segment's p and ds, both [queries, rows].
  struct Weights {
    Acc* p;
    Acc* ds;
  };

  bool wants_dx() const { return p_.dx.data != nullptr; }
  bool wants_rows() const { return p_.dkeys.data != nullptr; }
  bool tied() const { return p_.dvalues.data == nullptr; }

  static const T* at(const Rows& rows, int64_t i) {
    return static_cast<const T*>(rows.data) + i * rows.stride;
  }
  static T* at(const MutableRows& rows, int64_t i) {
    return static_cast<T*>(rows.data) + i * rows.stride;
  }

  void zero_rows(int64_t begin, int64_t end) const {
    for (int64_t r = begin; r < end; ++r) {
      std::fill_n(at(p_.dkeys, r), p_.d_in, T{});
      if (!tied()) std::fill_n(at(p_.dvalues, r), p_.d_emb, T{});
    }
  }

  void zero_untouched(const std::vector<Unit>& segments) const {
    constexpr int64_t kSlice = 1024;
    std::vector<std::pair<int64_t, int64_t>> gaps;
    const auto add = [&](int64_t begin, int64_t end) {
      for (; begin < end; begin += kSlice) gaps.emplace_back(begin, std::min(begin + kSlice, end));
    };
    int64_t next = 0;
    for (const Unit& segment : segments) {
      add(next, segment.row_begin);
      next = segment.row_end;
    }
    add(next, p_.table_rows);
    parallel_for(p_.num_threads, static_cast<int64_t>(gaps.size()),
                 [&](int64_t i) { zero_rows(gaps[i].first, gaps[i].second); });
  }

  void run_group(const std::vector<Unit>& segments, int64_t elements) {
    // Kept for the next group.
    Carver sizes;
    sizes.take<Acc>(elements), sizes.take<Acc>(elements);
    if (workspace_bytes_ < sizes.bytes()) {
      workspace_.reset(new std::byte[sizes.bytes() + Carver::kAlignment]);
      workspace_bytes_ = sizes.bytes();
    }
    void* aligned = workspace_.get();
    size_t space = sizes.bytes() + Carver::kAlignment;
    std::align(Carver::kAlignment, sizes.bytes(), aligned, space);
    Carver carver(static_cast<std::byte*>(aligned));
    Acc* p = carver.take<Acc>(elements);
    Acc* ds = carver.take<Acc>(elements);

    std::vector<Weights> weights;
    std::vector<Task> queries, rows;
    for (size_t s = 0; s < segments.size(); ++s) {
      const Unit& segment = segments[s];
      weights.push_back({p, ds});
      p += segment.queries() * segment.rows();
      ds += segment.queries() * segment.rows();
      const int64_t step = unit_queries(segment.rows(), p_.d_in);
      for (int64_t q = 0; q < segment.queries(); q += step) {
        queries.push_back({s, q, std::min(q + step, segment.queries())});
      }
      constexpr int64_t kRowSlice = 24;  // a multiple of every kernel's block of outputs
      for (int64_t r = 0; r < segment.rows(); r += kRowSlice) {
        rows.push_back({s, r, std::min(r + kRowSlice, segment.rows())});
      }
    }
    parallel_for(p_.num_threads, static_cast<int64_t>(queries.size()), [&](int64_t i) {
      const Task& task = queries[i];
      query_gradients(segments[task.segment], weights[task.segment], task.begin, task.end);
    });
    if (!wants_rows()) return;
    parallel_for(p_.num_threads, static_cast<int64_t>(rows.size()), [&](int64_t i) {
      const Task& task = rows[i];
      row_gradients(segments[task.segment], weights[task.segment], task.begin, task.end);
    });
  }

  // A slice of one segment's queries or rows, relative to the segment.
  struct Task {
    size_t segment;
    int64_t begin;
    int64_t end;
  };

  // Phase 1 for queries [begin, end) of the segment.
  void query_gradients(const Unit& segment, const Weights& weights, int64_t begin,
                       int64_t end) const {
    const int64_t rows = segment.rows(), queries = end - begin;
    Acc* p = weights.p + begin * rows;
    Acc* ds = weights.ds + begin * rows;
    const int32_t* positions = p_.plan.permutation + segment.query_begin + begin;
    if (rows <= 1) {  // the softmax of one score is 1 and does not depend on it
      std::fill_n(p, queries * rows, Acc{1});
      if (wants_dx()) {
        for (int64_t q = 0; q < queries; ++q) std::fill_n(at(p_.dx, positions[q]), p_.d_in, T{});
      }
      return;
    }
    const auto carve = [&](Carver& carver) {
      return std::tuple(carver.take<const T*>(rows + kRowsAhead),
                        carver.take<const T*>(rows + kRowsAhead),
                        carver.take<Acc>(queries * p_.d_in), carver.take<Acc>(queries * p_.d_emb));
    };
    Carver sizes;
    carve(sizes);
    Carver carver(thread_scratch(sizes.bytes()));
    const auto [keys, values, x, dy] = carve(carver);
    for (int64_t r = 0; r < rows; ++r) {
      keys[r] = at(p_.keys, segment.row_begin + r);
      values[r] = at(p_.values, segment.row_begin + r);
    }
    for (int64_t r = 0; r < kRowsAhead; ++r) {
      keys[rows + r] = values[std::min(r, rows - 1)];
      values[rows + r] = keys[std::min(r, rows - 1)];
    }
    for (int64_t q = 0; q < queries; ++q) {
      kernels_.load(at(p_.x, positions[q]), x + q * p_.d_in, p_.d_in);
      kernels_.load(at(p_.dy, positions[q]), dy + q * p_.d_emb, p_.d_emb);
    }
    const Acc scale = static_cast<Acc>(p_.scale);
    kernels_.dot(keys, rows, x, p_.d_in, queries, p_.d_in, scale, p, rows);
    kernels_.dot(values, rows, dy, p_.d_emb, queries, p_.d_emb, Acc{1}, ds, rows);
    for (int64_t q = 0; q < queries; ++q) {
      const Acc sum = kernels_.exponentials(p + q * rows, rows);
      kernels_.scale(p + q * rows, Acc{1} / sum, rows);
      kernels_.softmax_backward(p + q * rows, ds + q * rows, rows, scale);
    }
    if (!wants_dx()) return;
    Acc* dx = x;  // its last reader was the first dot
    std::fill_n(dx, queries * p_.d_in, Acc{});
    kernels_.accumulate(keys, rows, ds, rows, 1, queries, p_.d_in, dx, p_.d_in);
    for (int64_t q = 0; q < queries; ++q) {
      kernels_.store(dx + q * p_.d_in, Acc{1}, at(p_.dx, positions[q]), p_.d_in);
    }
  }

  // sums[r - begin] += weights[:, r]^T inputs, over all queries of the segment in order.
  void sum_over_queries(const Unit& segment, const Acc* weights, int64_t begin, int64_t end,
                        const Rows& inputs, const T** pointers, int64_t columns, Acc* sums) const {
    const int64_t rows = segment.rows();
    constexpr int64_t kQueries = kPointers;
    for (int64_t q = 0; q < segment.queries(); q += kQueries) {
      const int64_t count = std::min(kQueries, segment.queries() - q);
      for (int64_t i = 0; i < count; ++i) {
        pointers[i] = at(inputs, p_.plan.permutation[segment.query_begin + q + i]);
      }
      std::fill_n(pointers + count, kRowsAhead, pointers[0]);
      kernels_.accumulate(pointers, count, weights + q * rows + begin, 1, rows, end - begin,
                          columns, sums, columns);
    }
  }

  // Phase 2 for rows [begin, end) of the segment.
  void row_gradients(const Unit& segment, const Weights& weights, int64_t begin,
                     int64_t end) const {
    const int64_t count = end - begin, width = std::max(p_.d_in, p_.d_emb);
    const auto carve = [&](Carver& carver) {
      return std::tuple(carver.take<const T*>(kPointers + kRowsAhead),
                        carver.take<Acc>(count * width));
    };
    Carver sizes;
    carve(sizes);
    Carver carver(thread_scratch(sizes.bytes()));
    const auto [pointers, sums] = carve(carver);
    const int64_t first =
        p_.segment_gradients == nullptr ? segment.row_begin : p_.segment_gradients[segment.segment];
    const auto write = [&](const MutableRows& to, int64_t columns) {
      for (int64_t r = 0; r < count; ++r) {
        kernels_.store(sums + r * columns, Acc{1}, at(to, first + begin + r), columns);
      }
    };
    std::fill_n(sums, count * width, Acc{});
    if (segment.rows() > 1) {
      sum_over_queries(segment, weights.ds, begin, end, p_.x, pointers, p_.d_in, sums);
    }
    if (!tied()) {
      write(p_.dkeys, p_.d_in);
      std::fill_n(sums, count * width, Acc{});
    }
    sum_over_queries(segment, weights.p, begin, end, p_.dy, pointers, p_.d_emb, sums);
    write(tied() ? p_.dkeys : p_.dvalues, p_.d_emb);
  }

  static constexpr int64_t kPointers = 256;

  const SegmentedAttentionBackwardParams& p_;
  const RowKernels<T>& kernels_;
  std::unique_ptr<std::byte[]> workspace_;
  size_t workspace_bytes_ = 0;
};

}  // namespace
}  // namespace cpu

void segmented_attention_backward(const SegmentedAttentionBackwardParams& params) {
  L3EXT_CHECK(params.directory == nullptr,
              "directory: expected none, rows behind it have no "
              "gradient");
  cpu::check_plan(params.plan, params.table_rows, params.dkeys.data != nullptr);
  if (params.segment_gradients != nullptr) cpu::check_gradient_rows(params);
  dispatch_float(params.dtype, "x",
                 [&](auto tag) { cpu::Backward<typename decltype(tag)::type>(params).run(); });
}

}  // namespace l3ext
