// Runs units of work in parallel, each thread's memory asked for ahead of its reads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention/cpu/ahead.hpp"
#include "attention/cpu/row_kernels.hpp"
#include "attention/cpu/schedule.hpp"
#include "core/parallel.hpp"

namespace l3ext::cpu {

// All of a unit's rows: keys and values in one where they lie side by side.
template <typename Inputs>
void wish_for_rows(const Inputs& inputs, const Unit& unit, WishList& wishes) {
  const MemoryRange of_values = range_of(inputs.values(unit), inputs.d_emb());
  if (unit.rows() <= 1) return wishes.add(of_values);
  MemoryRange of_keys = range_of(inputs.keys(unit), inputs.d_in());
  if (of_keys.begin <= of_values.begin && of_values.begin < of_keys.begin + of_keys.bytes) {
    of_keys.bytes = std::max(of_keys.bytes, of_values.begin - of_keys.begin + of_values.bytes);
  } else {
    wishes.add(of_values);
  }
  wishes.add(of_keys);
}

// Calls run(i, unit, next, wanted) once for each units[i]; `next`: what the thread runs then, or
// null.
//
// Inputs: keys(unit) and values(unit), RowBlocks of d_in() and d_emb() columns, and
// wish_for_queries(unit, wishes): for what belongs to its queries.
template <typename Row, typename Inputs, typename Run>
void run_units(int num_threads, const RowKernels<Row>& kernels, const Inputs& inputs,
               const std::vector<Unit>& units, const Run& run) {
  // More than the second-level cache keeps; the next one catches what it does not.
  constexpr int64_t kRiderBytes = int64_t{1} << 21;
  constexpr int64_t kFirstRows = 32;  // as many as products of many queries take at once
  const bool asks = kernels.asks_for_wanted;
  const int64_t row_bytes = (inputs.d_in() + inputs.d_emb()) * static_cast<int64_t>(sizeof(Row));
  const Schedule schedule =
      make_schedule(units, kernels.few_queries, asks ? kRiderBytes / row_bytes : 0);
  // In the order of work, so that they are read one after the other: here and there, each would be
  // a cache line that another core holds.
  std::vector<Unit> ordered(units.size());
  std::transform(schedule.units.begin(), schedule.units.end(), ordered.begin(),
                 [&](int32_t i) { return units[i]; });
  parallel_for_ahead(
      num_threads, std::ssize(schedule.tasks) - 1, [&](int64_t task, int64_t next_task) {
        const int64_t begin = schedule.tasks[task], end = schedule.tasks[task + 1];
        const Unit* const after = next_task < 0 ? nullptr : &ordered[schedule.tasks[next_task]];
        thread_local WishList wishes;  // kept between calls, empty
        wishes.clear();
        if (asks) {
          const Unit& first = ordered[begin];
          if (first.queries() > kernels.few_queries && first.rows() > 1) {
            wishes.add(rows_of(inputs.values(first), inputs.d_emb()));
          }
          for (int64_t i = begin + 1; i < end; ++i) {
            inputs.wish_for_queries(ordered[i], wishes);
            wish_for_rows(inputs, ordered[i], wishes);
          }
          if (after != nullptr) {
            inputs.wish_for_queries(*after, wishes);
            if (end == begin + 1) {
              wish_for_rows(inputs, *after, wishes);
            } else if (after->rows() > 1) {  // it asks for the others itself, while these pass
              wishes.add(rows_of(inputs.keys(*after).part(0, std::min(after->rows(), kFirstRows)),
                                 inputs.d_in()));
            }
          }
        }
        Wanted wanted = wishes.wanted();
        for (int64_t i = begin; i < end; ++i) {
          run(schedule.units[i], ordered[i], i + 1 < end ? &ordered[i + 1] : after, wanted);
        }
      });
}

}  // namespace l3ext::cpu
