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
  if (of_keys.begin <= of_values.begin && of_values.begin < of_keys.end) {
    of_keys.end = std::max(of_keys.end, of_values.end);
  } else {
    wishes.add(of_values);
  }
  wishes.add(of_keys);
}

// Calls run(unit, next, wanted) once for each index of `units`; `next`: the index of the unit that
// the thread runs then, or -1.
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
  parallel_for_ahead(
      num_threads, std::ssize(schedule.tasks) - 1, [&](int64_t task, int64_t next_task) {
        const int64_t begin = schedule.tasks[task], end = schedule.tasks[task + 1];
        const auto unit = [&](int64_t i) -> const Unit& { return units[schedule.units[i]]; };
        const int64_t after = next_task < 0 ? -1 : schedule.units[schedule.tasks[next_task]];
        thread_local WishList wishes;  // kept between calls, empty
        wishes.clear();
        if (asks) {
          const bool many = unit(begin).queries() > kernels.few_queries;
          if (many && unit(begin).rows() > 1) {
            wishes.add_rows(inputs.values(unit(begin)), inputs.d_emb());
          }
          for (int64_t i = begin + 1; i < end; ++i) {
            inputs.wish_for_queries(unit(i), wishes);
            wish_for_rows(inputs, unit(i), wishes);
          }
          if (after >= 0) {
            const Unit& next = units[after];
            inputs.wish_for_queries(next, wishes);
            if (end == begin + 1) {
              wish_for_rows(inputs, next, wishes);
            } else if (next.rows() > 1) {  // it asks for the others itself, while these pass
              wishes.add_rows(inputs.keys(next).part(0, std::min(next.rows(), kFirstRows)),
                              inputs.d_in());
            }
          }
        }
        Wanted wanted = wishes.wanted();
        for (int64_t i = begin; i < end; ++i) {
          run(schedule.units[i], i + 1 < end ? schedule.units[i + 1] : after, wanted);
        }
      });
}

}  // namespace l3ext::cpu
