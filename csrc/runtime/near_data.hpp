// Near data: attention to a token's rows runs where they lie, in host memory, and its results
// travel instead of the rows: some kilobytes a query for megabytes a token. It pays for blocks that
// the device does not hold and that few queries ask for.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace l3ext {

// What either way costs, as measured.
struct NearDataCosts {
  double fetch_us_per_byte = 0;   // that a step waits for; infinite: attention always goes there
  double attend_us = 0;           // to host memory and back, once for a layer of a step
  double attend_us_per_byte = 0;  // one query reading rows there
};

// Throws kValue for a cost that is negative or no number.
void check_costs(const NearDataCosts& costs);

// A token's rows that the device does not hold, and the positions of the step that attend to them.
struct ColdBlock {
  int64_t bytes = 0;
  int64_t queries = 0;
};

// Which blocks to leave where they are: those whose fetch takes longer than its queries do there,
// if together they save more than the way there takes. Several queries of a block are taken to cost
// as much as one each, which is too much rather than too little.
std::vector<bool> choose_near(std::span<const ColdBlock> blocks, const NearDataCosts& costs);

}  // namespace l3ext
