#include "emulated_accesses.hpp"

#include <algorithm>
#include <set>

#include "core/error.hpp"

namespace l3ext::cuda {

AccessCounter::AccessCounter() {
  L3EXT_CHECK(emulated::access_counter == nullptr, "AccessCounter: expected one at a time");
  emulated::access_counter = this;
}
AccessCounter::~AccessCounter() { emulated::access_counter = nullptr; }

namespace emulated {
namespace {

constexpr uintptr_t kSectorBytes = 32, kBankBytes = 4, kBanks = 32;

AccessCount count_global(int bytes, uint32_t lanes, const std::array<uintptr_t, 32>& addresses) {
  std::set<uintptr_t> sectors, pieces;
  for (int lane = 0; lane < 32; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    const uintptr_t first = addresses[lane], last = first + static_cast<uintptr_t>(bytes) - 1;
    pieces.insert(first);
    for (uintptr_t s = first / kSectorBytes; s <= last / kSectorBytes; ++s) sectors.insert(s);
  }
  const auto wanted = static_cast<int64_t>(pieces.size()) * bytes;
  return {1, static_cast<int64_t>(sectors.size()), (wanted + 31) / 32};
}

AccessCount count_shared(int bytes, uint32_t lanes, const std::array<uintptr_t, 32>& addresses) {
  AccessCount count = {1, 0, 0};
  const int together = std::min(32, 128 / bytes);
  for (int begin = 0; begin < 32; begin += together) {
    std::set<uintptr_t> words;
    for (int lane = begin; lane < begin + together; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      for (int b = 0; b < bytes; b += static_cast<int>(kBankBytes)) {
        words.insert((addresses[lane] + static_cast<uintptr_t>(b)) / kBankBytes);
      }
    }
    std::array<int64_t, kBanks> of_bank = {};
    for (const uintptr_t word : words) ++of_bank[word % kBanks];
    count.transactions += *std::max_element(of_bank.begin(), of_bank.end());
    count.least += (static_cast<int64_t>(words.size()) + 31) / 32;
  }
  return count;
}

}  // namespace

AccessCount count_instruction(Access access, int bytes, uint32_t lanes,
                              const std::array<uintptr_t, 32>& addresses) {
  const bool shared = access == Access::kSharedLoad || access == Access::kSharedStore;
  return (shared ? count_shared : count_global)(bytes, lanes, addresses);
}

void WarpAccesses::add(const void* place, Access access, int bytes, int lane, const void* address) {
  Place& here = places_[{place, access, bytes}];
  const size_t i = here.done[lane]++;
  if (i == here.instructions.size()) here.instructions.emplace_back();
  here.instructions[i].lanes |= 1u << lane;
  here.instructions[i].addresses[lane] = reinterpret_cast<uintptr_t>(address);
}

void WarpAccesses::close(LaunchAccesses& launch) {
  for (const auto& [key, place] : places_) {
    const auto& [at, access, bytes] = key;
    for (const Instruction& i : place.instructions) {
      launch.counts[{access, bytes}] += count_instruction(access, bytes, i.lanes, i.addresses);
    }
  }
  places_.clear();
}

}  // namespace emulated
}  // namespace l3ext::cuda
