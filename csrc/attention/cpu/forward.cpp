// Forward on the CPU. Units of work (some queries of one segment against all its rows) run in
// parallel; where there are too few of them, they are shared. Memory-bound while segments have few
// queries, FMA-bound beyond.
#include <algorithm>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention/cpu/ahead.hpp"
#include "attention/cpu/forward_unit.hpp"
#include "attention/cpu/row_kernels.hpp"
#include "attention/cpu/run_units.hpp"
#include "attention/cpu/schedule.hpp"
#include "attention/segmented_attention.hpp"
#include "core/huge_pages.hpp"
#include "core/parallel.hpp"
#include "core/scratch.hpp"

namespace l3ext {
namespace cpu {
namespace {

template <typename T, typename Row>
class Forward : ForwardUnits<T, Row> {
  using Units = ForwardUnits<T, Row>;
  using Work = typename Units::Work;

 public:
  explicit Forward(const SegmentedAttentionParams& params) : Units(params), p_(params) {}

  void run() {
    advise_huge_pages(p_.y.data, extent<T>(p_.y, p_.plan.num_tokens));
    const std::vector<Unit> units =
        make_units(p_.plan, this->kernels().query_lanes, this->kernels().query_block);
    constexpr size_t kUnitsPerThread = 8;
    if (p_.num_threads > 1 && units.size() < kUnitsPerThread * p_.num_threads) {
      run_shared(units);
    } else {
      run_units(p_.num_threads, this->kernels(), static_cast<const Units&>(*this), units,
                [&](int64_t, const Unit& unit, const Unit* next, Wanted& wanted) {
                  run_unit(unit, next, wanted);
                });
    }
  }

 private:
  // `next`: the thread's next unit, or null.
  void run_unit(const Unit& unit, const Unit* next, Wanted& wanted) const {
    if (this->run_trivial(unit)) return;
    Carver sizes;
    this->carve(sizes, unit);
    Carver carver(thread_scratch(sizes.bytes()));
    const Work work = this->carve(carver, unit);
    this->prepare(unit, work);
    // Values are asked for as their keys pass, the next unit's first rows as values do.
    const bool few = unit.queries() <= this->kernels().few_queries;
    RowBlock<Row> next_keys = {}, next_values = {};
    if (next != nullptr && next->rows() > 0) next_values = this->values(*next);
    if (next != nullptr && next->rows() > 1) next_keys = this->keys(*next);
    this->score(unit, work, 0, unit.rows(), {few ? next_keys : this->values(unit), &wanted});
    this->normalise(unit, work);
    this->sum_values(unit, work, 0, p_.d_emb, {next_values, &wanted});
  }

  // Rows or columns of a unit.
  struct Piece {
    size_t unit;
    int64_t begin;
    int64_t end;
  };

  // Appends pieces of `size` of [0, end).
  static void cut(size_t unit, int64_t end, int64_t size, std::vector<Piece>& pieces) {
    for (int64_t i = 0; i < end; i += size) pieces.push_back({unit, i, std::min(i + size, end)});
  }

  // Threads share each unit by rows for its scores, then by columns for its sums: so each sum is
  // one thread's, in the order of a whole unit.
  void run_shared(const std::vector<Unit>& units) const {
    Carver sizes;
    for (const Unit& unit : units) this->carve(sizes, unit);
    Carver carver(thread_scratch(sizes.bytes()));
    std::vector<Work> work;
    work.reserve(units.size());
    // Of a row at least a KiB: memory brings shorter pieces at half the rate.
    constexpr int64_t kRows = 64, kColumns = 1024 / sizeof(Row);
    std::vector<Piece> rows, columns;
    int64_t cost = 0;
    for (size_t u = 0; u < units.size(); ++u) {
      cost += units[u].cost();
      work.push_back(this->carve(carver, units[u]));
      if (this->run_trivial(units[u])) continue;
      this->prepare(units[u], work[u]);
      cut(u, units[u].rows(), kRows, rows);
      cut(u, p_.d_emb, kColumns, columns);
    }
    // Another thread's start and end take as long as so many bytes of rows.
    constexpr int64_t kBytesOfThread = int64_t{96} << 10;
    const int64_t bytes = cost / 8 * (p_.d_in + p_.d_emb) * static_cast<int64_t>(sizeof(Row));
    const int threads =
        static_cast<int>(std::clamp<int64_t>(bytes / kBytesOfThread, 1, p_.num_threads));
    parallel_for(threads, std::ssize(rows), [&](int64_t i) {
      const auto [u, begin, end] = rows[i];
      const RowBlock<Row> values = this->values(units[u]).part(begin, end);
      touch_pages(range_of(this->keys(units[u]).part(begin, end), p_.d_in));
      touch_pages(range_of(values, p_.d_emb));
      this->score(units[u], work[u], begin, end, {values});
    });
    for (size_t u = 0; u < units.size(); ++u) {
      if (units[u].rows() > 1) this->normalise(units[u], work[u]);
    }
    parallel_for(threads, std::ssize(columns), [&](int64_t i) {
      const auto [u, begin, end] = columns[i];
      this->sum_values(units[u], work[u], begin, end - begin, {});
    });
  }

  const SegmentedAttentionParams& p_;
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
