// Attention of one unit: all of it by one thread, or pieces of it by several.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "attention/cpu/ahead.hpp"
#include "attention/cpu/row_kernels.hpp"
#include "attention/cpu/schedule.hpp"
#include "attention/segmented_attention.hpp"
#include "core/scratch.hpp"

namespace l3ext::cpu {

// T: x and y. Row: how keys and values are stored; where not as T, with a scale for each: the keys'
// multiplies the score of its row, the values' the softmax weight. So quantised rows are exact, and
// widened nowhere but on the way to the registers.
template <typename T, typename Row>
class ForwardUnits {
 public:
  using Acc = Accumulator<T>;
  static constexpr bool kQuantized = !std::is_same_v<T, Row>;
  static constexpr bool kWidens = !std::is_same_v<T, Query<Row>>;

  explicit ForwardUnits(const SegmentedAttentionParams& params)
      : p_(params),
        queries_(row_kernels<T>(active_cpu_isa())),
        kernels_(row_kernels<Row>(active_cpu_isa())) {}

  const RowKernels<Row>& kernels() const { return kernels_; }
  int64_t d_in() const { return p_.d_in; }
  int64_t d_emb() const { return p_.d_emb; }

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
  // Outputs too: a store to a line that no cache holds reads it first.
  void wish_for_queries(const Unit& unit, WishList& wishes) const {
    for (int64_t q = unit.query_begin; q < unit.query_end; ++q) {
      if (unit.rows() > 1) wishes.add(range_of(RowBlock<T>{x_row(q), p_.d_in, 1}, p_.d_in));
      wishes.add(range_of(RowBlock<T>{y_row(q), p_.d_emb, 1}, p_.d_emb));
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

  // The steps of all other units, in this order; those of different rows or columns in any.
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
    const int64_t padded = kernels_.padded(unit.queries());
    kernels_.scores(keys(unit).part(row_begin, row_end), work.packed, unit.queries(), p_.d_in,
                    static_cast<Acc>(p_.scale), ahead, work.scores + row_begin * padded);
    if constexpr (kQuantized) {
      multiply(scales(unit, quantization_->keys, /*of_values=*/false), row_begin, row_end, padded,
               work.scores);
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

 private:
  const T* x_row(int64_t q) const {
    return static_cast<const T*>(p_.x.data) + p_.plan.permutation[q] * p_.x.stride;
  }
  T* y_row(int64_t q) const {
    return static_cast<T*>(p_.y.data) + p_.plan.permutation[q] * p_.y.stride;
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

  const SegmentedAttentionParams& p_;
  const Quantization* quantization_ = p_.quantization ? &*p_.quantization : nullptr;
  const RowKernels<T>& queries_;
  const RowKernels<Row>& kernels_;
  const int64_t y_stride_ = spread<Acc>(p_.d_emb);
};

}  // namespace l3ext::cpu
