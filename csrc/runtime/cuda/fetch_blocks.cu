#include <algorithm>

#include "runtime/cuda/fetch_blocks.cuh"

namespace l3ext::cuda {
namespace {

void check_blocks(int blocks) {
  L3EXT_CHECK(blocks > 0, "blocks: expected at least 1, got ", blocks);
}
bool is_aligned(const void* p, size_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

}  // namespace

void fetch_blocks(std::span<const Copy> copies, int blocks, void* stream) {
  check_blocks(blocks);
  while (!copies.empty()) {
    const size_t count = std::min<size_t>(copies.size(), FetchBlocksArgs::kMost);
    FetchBlocksArgs args = {};
    for (const Copy& copy : copies.first(count)) {
      args.copies[args.count++] = {static_cast<std::byte*>(copy.target),
                                   static_cast<const std::byte*>(copy.source),
                                   static_cast<int64_t>(copy.bytes)};
    }
    launch(fetch_blocks_kernel, blocks, kFetchThreads, 0, static_cast<Stream>(stream), args);
    copies = copies.subspan(count);
  }
}

int64_t fetch_step_workspace(int64_t most_tokens) {
  L3EXT_CHECK(most_tokens >= 0, "most_tokens: expected at least 0, got ", most_tokens);
  return static_cast<int64_t>(sizeof(FetchTotals)) +
         most_tokens * static_cast<int64_t>(sizeof(FetchSlot));
}

void fetch_step(const FetchStepParams& params, void* workspace, int64_t workspace_bytes,
                void* stream) {
  check_blocks(params.blocks);
  const int64_t needed = fetch_step_workspace(params.most_tokens);
  L3EXT_CHECK(workspace_bytes >= needed, "workspace: expected ", needed, " bytes for ",
              params.most_tokens, " tokens, got ", workspace_bytes);
  L3EXT_CHECK(workspace != nullptr && is_aligned(workspace, 16),
              "workspace: expected an address aligned to 16 bytes, got ", workspace);
  L3EXT_CHECK(params.ring_bytes >= 0, "ring: expected at least 0 bytes, got ", params.ring_bytes);
  L3EXT_CHECK(is_aligned(params.ring, static_cast<size_t>(kSlotBytes)),
              "ring: expected an address aligned to ", kSlotBytes, " bytes, got ",
              static_cast<const void*>(params.ring));
  // Else the rows of this step would be taken for resident ones in the next.
  L3EXT_CHECK(params.directory != params.resident,
              "directory: expected another array than that of the resident rows");
  FetchStepArgs args = {};
  args.params = params;
  args.totals = static_cast<FetchTotals*>(workspace);
  args.slots = reinterpret_cast<FetchSlot*>(args.totals + 1);
  const auto on = static_cast<Stream>(stream);
  launch(claim_slots_kernel, 1, kFetchThreads, kFetchWarps * int64_t{sizeof(int64_t)}, on, args);
  launch(fetch_step_kernel, params.blocks, kFetchThreads, 0, on, args);
}

}  // namespace l3ext::cuda
