#include "runtime/near_data.hpp"

#include <utility>

#include "core/error.hpp"

namespace l3ext {

void check_costs(const NearDataCosts& costs) {
  for (const auto& [name, cost] : {std::pair{"fetch_us_per_byte", costs.fetch_us_per_byte},
                                   {"attend_us", costs.attend_us},
                                   {"attend_us_per_byte", costs.attend_us_per_byte}}) {
    L3EXT_CHECK(cost >= 0, name, ": expected at least 0, got ", cost);
  }
}

std::vector<bool> choose_near(std::span<const ColdBlock> blocks, const NearDataCosts& costs) {
  std::vector<bool> near(blocks.size());
  double saved = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const auto bytes = static_cast<double>(blocks[i].bytes);
    const auto queries = static_cast<double>(blocks[i].queries);
    const double gain = bytes * (costs.fetch_us_per_byte - queries * costs.attend_us_per_byte);
    near[i] = gain > 0;
    if (near[i]) saved += gain;
  }
  if (saved <= costs.attend_us) near.assign(blocks.size(), false);
  return near;
}

}  // namespace l3ext
