// Forward on the CPU. Units of work (some queries of one segment against all its rows) run in
// parallel; where there are too few of them, the rows and then the columns of a unit are shared.
// Memory-bound while segments have few queries, FMA-bound beyond.
#include <algorithm>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention/cpu/row_kernels.hpp"
#include "attention/cpu/schedule.hpp"
#include "attention/segmented_attention.hpp"
#include "core/huge_pages.hpp"
#include "core/parallel.hpp"
#include "core/scratch.hpp"

namespace l3ext {
namespace cpu {
namespace {

// T: x and y. Row: how keys and values are stored; where not as T, with a scale for each: the keys'
// multiplies the score of its row, the values' the softmax weight. So quantised rows are exact, and
// widened nowhere but on the way to the registers.
template <typename T, typename Row>
class Forward {
 public:
  using Acc = Accumulator<T>;
  static constexpr bool kQuantized = !std::is_same_v<T, Row>;
  static constexpr bool kWidens = !std::is_same_v<T, Query<Row>>;

  explicit Forward(const SegmentedAttentionParams& params)
      : p_(params),
        queries_(row_kernels<T>(active_cpu_isa())),
        kernels_(row_kernels<Row>(active_cpu_isa())) {}

  void run() {
    advise_huge_pages(p_.y.data, extent<T>(p_.y, p_.plan.num_tokens));
    const std::vector<Unit> units = make_units(p_.plan, kernels_.query_lanes, kernels_.query_block);
    constexpr size_t kUnitsPerThread = 8;
    if (p_.num_threads > 1 && units.size() < kUnitsPerThread * p_.num_threads) {
      run_shared(units);
      return;
    }
    // About what the second-level cache keeps; the next one catches what it does not.
    constexpr int64_t kRiderBytes = int64_t{1} << 20;
    const int64_t row_bytes = (p_.d_in + p_.d_emb) * static_cast<int64_t>(sizeof(Row));
    const Schedule schedule = make_schedule(units, kernels_.few_queries,
                                            kernels_.asks_for_wanted ? kRiderBytes / row_bytes : 0);
    parallel_for_ahead(p_.num_threads, std::ssize(schedule.tasks) - 1,
                       [&](int64_t task, int64_t next) {
                         const auto unit = [&](int64_t i) { return &units[schedule.units[i]]; };
                         const int64_t begin = schedule.tasks[task], end = schedule.tasks[task + 1];
                         const Unit* after = next < 0 ? nullptr : unit(schedule.tasks[next]);
                         std::vector<Wanted::Range>& ranges = thread_ranges();
                         if (kernels_.asks_for_wanted) {
                           for (int64_t i = begin + 1; i < end; ++i) want_rows(*unit(i), ranges);
                           if (after != nullptr) want_queries(*after, ranges);
                         }
                         Wanted wanted(ranges.data(), ranges.data() + ranges.size());
                         for (int64_t i = begin; i < end; ++i) {
                           run_unit(*unit(i), i + 1 < end ? unit(i + 1) : after, wanted);
                         }
                       });
  }

 private:
  // Kept between calls, empty.
  static std::vector<Wanted::Range>& thread_ranges() {
    thread_local std::vector<Wanted::Range> ranges;
    ranges.clear();
    return ranges;
  }

  // All of a unit's rows: keys and values in one where they lie side by side.
  void want_rows(const Unit& unit, std::vector<Wanted::Range>& ranges) const {
    if (unit.rows() == 0) return;
    const auto range = [&](const RowBlock<Row>& block, int64_t columns) -> Wanted::Range {
      return {reinterpret_cast<const std::byte*>(block.data),
              reinterpret_cast<const std::byte*>(block.row(block.count - 1) + columns)};
    };
    const Wanted::Range of_values = range(values(unit), p_.d_emb);
    if (unit.rows() == 1) return ranges.push_back(of_values);
    Wanted::Range of_keys = range(keys(unit), p_.d_in);
    if (of_keys.begin <= of_values.begin && of_values.begin < of_keys.end) {
      of_keys.end = std::max(of_keys.end, of_values.end);
    } else {
      ranges.push_back(of_values);
    }
    ranges.push_back(of_keys);
  }

  void want_queries(const Unit& unit, std::vector<Wanted::Range>& ranges) const {
    if (unit.rows() <= 1) return;
    for (int64_t q = unit.query_begin; q < unit.query_end; ++q) {
      const T* x = x_row(q);
      ranges.push_back(
          {reinterpret_cast<const std::byte*>(x), reinterpret_cast<const std::byte*>(x + p_.d_in)});
    }
  }

  // A unit's working arrays.
  struct Work {
    const Query<Row>** x;  // [queries], where each query lies
    Query<Row>* widened;   // [queries, d_in], where x is not stored so
    Acc* packed;           // x as the kernel wants it
    Acc* scores;           // [rows, padded queries], then the softmax's numerators
    Acc* sums;             // [padded queries], of the numerators
    Acc* y;                // [queries, y_stride]
  };

  Work carve(Carver& carver, const Unit& unit) const {
    const int64_t padded = kernels_.padded(unit.queries());
    Work work;
    work.x = carver.take<const Query<Row>*>(unit.queries());
    work.widened = carver.take<Query<Row>>(kWidens ? unit.queries() * p_.d_in : 0);
    work.packed = carver.take<Acc>(kernels_.packed_elements(unit.queries(), p_.d_in));
    work.scores = carver.take<Acc>(unit.rows() * padded);
    work.sums = carver.take<Acc>(padded);
    work.y = carver.take<Acc>(unit.queries() * y_stride_);
    return work;
  }

  const T* x_row(int64_t q) const {
    return static_cast<const T*>(p_.x.data) + p_.plan.permutation[q] * p_.x.stride;
  }
  T* y_row(int64_t q) const {
    return static_cast<T*>(p_.y.data) + p_.plan.permutation[q] * p_.y.stride;
  }

  RowBlock<Row> keys(const Unit& unit) const {
    if (p_.directory != nullptr) {
      const int64_t address = p_.directory[p_.plan.segment_tokens[unit.segment]];
      // NOLINTNEXTLINE(performance-no-int-to-ptr): a directory holds addresses.
      const auto* first = reinterpret_cast<const Row*>(address);
      return {first, p_.keys.stride, unit.rows()};
    }
    return {static_cast<const Row*>(p_.keys.data) + unit.row_begin * p_.keys.stride, p_.keys.stride,
            unit.rows()};
  }
  RowBlock<Row> values(const Unit& unit) const {
    if (p_.directory != nullptr) {
      return {keys(unit).data + p_.value_offset, p_.values.stride, unit.rows()};
    }
    return {static_cast<const Row*>(p_.values.data) + unit.row_begin * p_.values.stride,
            p_.values.stride, unit.rows()};
  }

  // The scales of a unit's rows, from its first on.
  RowScales scales(const Unit& unit, const RowScales& table, bool of_values) const {
    if (p_.directory == nullptr) {
      return {table.data + unit.row_begin * table.stride, table.stride};
    }
    const int64_t second = of_values && p_.value_offset > 0 ? sizeof(float) : 0;
    const auto* row = reinterpret_cast<const std::byte*>(keys(unit).data);
    return {row + quantization_->scale_offset + second, p_.keys.stride};
  }

  // weights[row, all queries] *= scales[row], for rows row_begin to row_end.
  void multiply(const RowScales& scales, int64_t row_begin, int64_t row_end, int64_t padded,
                Acc* weights) const {
    for (int64_t r = row_begin; r < row_end; ++r) {
      const float scale = scales[r];
      for (int64_t q = 0; q < padded; ++q) weights[r * padded + q] *= scale;
    }
  }

  // No rows: the empty sum. One row: its weight is 1 whatever the key, so no key is read.
  bool run_trivial(const Unit& unit) const {
    if (unit.rows() > 1) return false;
    for (int64_t q = unit.query_begin; q < unit.query_end; ++q) {
      if (unit.rows() == 0) {
        std::fill_n(y_row(q), p_.d_emb, T{});
      } else {
        copy_value(unit, y_row(q));
      }
    }
    return true;
  }

  void copy_value(const Unit& unit, T* y) const {
    const Row* value = values(unit).data;
    if constexpr (kQuantized) {
      constexpr int64_t kPart = 256;
      const Acc scale = scales(unit, quantization_->values, /*of_values=*/true)[0];
      Acc widened[kPart];
      for (int64_t c = 0; c < p_.d_emb; c += kPart) {
        const int64_t count = std::min(kPart, p_.d_emb - c);
        kernels_.load(value + c, widened, count);
        queries_.store(widened, scale, y + c, count);
      }
    } else {
      std::copy_n(value, p_.d_emb, y);
    }
  }

  void prepare(const Unit& unit, const Work& work) const {
    for (int64_t q = 0; q < unit.queries(); ++q) {
      if constexpr (kWidens) {
        work.x[q] = work.widened + q * p_.d_in;
        queries_.load(x_row(unit.query_begin + q), work.widened + q * p_.d_in, p_.d_in);
      } else {
        work.x[q] = x_row(unit.query_begin + q);
      }
    }
    kernels_.pack(work.x, unit.queries(), p_.d_in, work.packed);
  }

  void score(const Unit& unit, const Work& work, int64_t row_begin, int64_t row_end,
             const Ahead<Row>& ahead) const {
    kernels_.scores(keys(unit).part(row_begin, row_end), work.packed, unit.queries(), p_.d_in,
                    static_cast<Acc>(p_.scale), ahead,
                    work.scores + row_begin * kernels_.padded(unit.queries()));
    if constexpr (kQuantized) {
      multiply(scales(unit, quantization_->keys, /*of_values=*/false), row_begin, row_end,
               kernels_.padded(unit.queries()), work.scores);
    }
  }

  void normalise(const Unit& unit, const Work& work) const {
    kernels_.exponentials(work.scores, unit.rows(), unit.queries(), work.sums);
    if constexpr (kQuantized) {
      multiply(scales(unit, quantization_->values, /*of_values=*/true), 0, unit.rows(),
               kernels_.padded(unit.queries()), work.scores);
    }
  }

  void sum_values(const Unit& unit, const Work& work, int64_t column, int64_t columns,
                  const Ahead<Row>& ahead) const {
    RowBlock<Row> block = values(unit);
    block.data += column;
    kernels_.accumulate(block, work.scores, 1, kernels_.padded(unit.queries()), unit.queries(),
                        columns, ahead, /*add=*/false, work.y + column, y_stride_);
    for (int64_t q = 0; q < unit.queries(); ++q) {
      queries_.store(work.y + q * y_stride_ + column, Acc{1} / work.sums[q],
                     y_row(unit.query_begin + q) + column, columns);
    }
  }

  // `next`: the thread's next unit, or null.
  void run_unit(const Unit& unit, const Unit* next, Wanted& wanted) const {
    if (run_trivial(unit)) return;
    Carver sizes;
    carve(sizes, unit);
    Carver carver(thread_scratch(sizes.bytes()));
    const Work work = carve(carver, unit);
    prepare(unit, work);
    // Values are asked for as their keys pass, the next unit's first rows as values do.
    const bool few = unit.queries() <= kernels_.few_queries;
    RowBlock<Row> next_keys = {}, next_values = {};
    if (next != nullptr && next->rows() > 0) next_values = values(*next);
    if (next != nullptr && next->rows() > 1) next_keys = keys(*next);
    score(unit, work, 0, unit.rows(), {few ? next_keys : values(unit), &wanted});
    normalise(unit, work);
    sum_values(unit, work, 0, p_.d_emb, {next_values, &wanted});
  }

  // A slice of one unit's rows or columns.
  struct Task {
    size_t unit;
    int64_t begin;
    int64_t end;
  };

  static std::vector<Task> slice(const std::vector<Unit>& units, int64_t size, auto extent) {
    std::vector<Task> tasks;
    for (size_t u = 0; u < units.size(); ++u) {
      if (units[u].rows() <= 1) continue;
      const int64_t end = extent(units[u]);
      for (int64_t i = 0; i < end; i += size) tasks.push_back({u, i, std::min(i + size, end)});
    }
    return tasks;
  }

  void run_shared(const std::vector<Unit>& units) const {
    Carver sizes;
    for (const Unit& unit : units) carve(sizes, unit);
    Carver carver(thread_scratch(sizes.bytes()));
    std::vector<Work> work;
    work.reserve(units.size());
    for (const Unit& unit : units) work.push_back(carve(carver, unit));

    for (size_t u = 0; u < units.size(); ++u) {
      if (!run_trivial(units[u])) prepare(units[u], work[u]);
    }
    // Of a row at least a KiB: memory brings shorter pieces at half the rate.
    constexpr int64_t kRowSlice = 64, kColumnSlice = 1024 / sizeof(Row);
    const auto rows = slice(units, kRowSlice, [](const Unit& unit) { return unit.rows(); });
    parallel_for(p_.num_threads, static_cast<int64_t>(rows.size()), [&](int64_t i) {
      const auto [u, begin, end] = rows[i];
      score(units[u], work[u], begin, end, {values(units[u]).part(begin, end)});
    });
    for (size_t u = 0; u < units.size(); ++u) {
      if (units[u].rows() > 1) normalise(units[u], work[u]);
    }
    const auto columns = slice(units, kColumnSlice, [&](const Unit&) { return p_.d_emb; });
    parallel_for(p_.num_threads, static_cast<int64_t>(columns.size()), [&](int64_t i) {
      const auto [u, begin, end] = columns[i];
      sum_values(units[u], work[u], begin, end - begin, {});
    });
  }

  const SegmentedAttentionParams& p_;
  const Quantization* quantization_ = p_.quantization ? &*p_.quantization : nullptr;
  const RowKernels<T>& queries_;
  const RowKernels<Row>& kernels_;
  const int64_t y_stride_ = spread<Acc>(p_.d_emb);
};

void check_quantization(const Quantization& quantization, DType dtype) {
  if (dtype != DType::kFloat64) return;
  throw Error(ErrorCode::kType, concat("x: expected float32, bfloat16 or float16 for rows of ",
                                       dtype_name(quantization.dtype), ", got float64"));
}

template <typename T>
void run_forward(const SegmentedAttentionParams& params) {
  if (!params.quantization) {
    Forward<T, T>(params).run();
  } else if constexpr (!std::is_same_v<T, double>) {
    dispatch_quantized(params.quantization->dtype, "keys",
                       [&](auto tag) { Forward<T, typename decltype(tag)::type>(params).run(); });
  }
}

}  // namespace
}  // namespace cpu

void segmented_attention(const SegmentedAttentionParams& params) {
  const bool anywhere = params.directory != nullptr;
  cpu::check_plan(params.plan, anywhere ? std::numeric_limits<int64_t>::max() : params.table_rows,
                  /*disjoint_rows=*/false);
  if (anywhere) cpu::check_directory(params);
  if (params.quantization) cpu::check_quantization(*params.quantization, params.dtype);
  dispatch_float(params.dtype, "x",
                 [&](auto tag) { cpu::run_forward<typename decltype(tag)::type>(params); });
}

}  // namespace l3ext
