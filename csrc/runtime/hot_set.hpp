// The tokens whose rows stay in device memory for good. Static: chosen once from how often each
// token is looked up, so there is no eviction, no lock and no pointer that moves.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/table.hpp"

namespace l3ext {

struct HotSet {
  std::vector<int64_t> row;  // [V] first row in the arena, -1: not in the set
  int64_t tokens = 0;        // that own rows
  int64_t rows = 0;          // in all: they fill arena rows [0, rows) in id order
};

// Keeping token t costs rows(t) rows and saves frequency(t) * rows(t) row fetches, so the benefit
// per byte is the frequency alone: takes tokens by frequency, descending (ties, and unknown
// frequencies: by rows owned, then by id), each that still fits the budget.
HotSet choose_hot_set(const RowOwners& owners, int64_t row_bytes, int64_t budget_bytes);

}  // namespace l3ext
