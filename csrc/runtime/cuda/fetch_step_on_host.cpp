#include <algorithm>

#include "runtime/cuda/fetch_blocks.hpp"

namespace l3ext::cuda {

void fetch_step_on_host(const FetchStepParams& p) {
  constexpr int64_t kSlotBytes = 16;
  const int64_t count = std::min<int64_t>(*p.num_tokens, p.most_tokens);
  int64_t taken = 0, counts[4] = {};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = p.tokens[i];
    if (token < 0 || token >= p.vocab_size || (i > 0 && p.tokens[i - 1] == token)) continue;
    p.directory[token] = p.resident[token];
    counts[0] += p.resident[token] != 0;
    if (p.resident[token] != 0 || p.sources[token] == 0) continue;
    const int64_t bytes = p.source_bytes[token];
    if (taken + bytes <= p.ring_bytes) {
      std::byte* const slot = p.ring + taken;
      // NOLINTNEXTLINE(performance-no-int-to-ptr): a directory holds addresses.
      const auto* source = reinterpret_cast<const std::byte*>(p.sources[token]);
      std::copy_n(source, bytes, slot);
      p.directory[token] = static_cast<int64_t>(reinterpret_cast<uintptr_t>(slot));
      ++counts[1];
      counts[2] += bytes;
    } else {
      p.directory[token] = p.sources[token];
      ++counts[3];
    }
    taken += (bytes + kSlotBytes - 1) / kSlotBytes * kSlotBytes;
  }
  if (p.counters == nullptr) return;
  for (int c = 0; c < 4; ++c) p.counters[c] += counts[c];
}

}  // namespace l3ext::cuda
