#include "runtime/graph_runtime.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "core/cuda_devices.hpp"
#include "core/error.hpp"
#include "runtime/cuda/fetch_blocks.hpp"
#include "runtime/hot_set.hpp"

namespace l3ext {
namespace {

constexpr int64_t kAlignment = 16;  // of rows that a kernel loads, and of slots in the ring

int64_t address_of(const void* p) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)); }

template <typename T>
T* array(const std::shared_ptr<DeviceBuffer>& buffer) {
  return reinterpret_cast<T*>(buffer->data());
}

}  // namespace

GraphRuntime::GraphRuntime(std::vector<Table> tables, std::shared_ptr<Device> device,
                           const GraphOptions& options)
    : options_(options), device_(std::move(device)) {
  L3EXT_CHECK(!tables.empty(), "tables: expected at least one, got none");
  L3EXT_CHECK(options.cache_bytes >= 0, "cache_bytes: expected at least 0, got ",
              options.cache_bytes);
  L3EXT_CHECK(options.ring_bytes >= 0, "ring_bytes: expected at least 0, got ", options.ring_bytes);
  L3EXT_CHECK(options.fetch_blocks >= 1 && options.fetch_blocks <= 1024,
              "fetch_blocks: expected 1 to 1024, got ", options.fetch_blocks);
  L3EXT_CHECK(tables[0].owners != nullptr && !tables[0].owners->offsets.empty(),
              "tables[0]: expected offsets, got none");
  vocab_size_ = tables[0].owners->vocab_size();
  const auto layers = static_cast<int64_t>(tables.size());
  const auto queue = device_->make_queue();
  for (int64_t i = 0; i < layers; ++i) layers_.push_back(make_layer(tables[i], i, layers, *queue));
  counters_ = std::make_shared<DeviceBuffer>(device_, layers * 4 * sizeof(int64_t));
  queue->fill(counters_->data(), 0, counters_->bytes());
  if (!device_->is_host()) {
    // A plan names every token once, those of no table behind all others.
    workspace_ = std::make_shared<DeviceBuffer>(
        device_, static_cast<size_t>(cuda::fetch_step_workspace(vocab_size_)));
    branch_ = device_->make_branch(layers);
  }
  if (const FencePtr filled = queue->record()) filled->wait();
}

GraphRuntime::Layer GraphRuntime::make_layer(const Table& table, int64_t index, int64_t layers,
                                             CopyQueue& queue) {
  const std::string name = concat("tables[", index, "]");
  const RowOwners& owners = *table.owners;
  table.shape.check(name);
  owners.check(owners.offsets.empty() ? 0 : owners.total_rows(), name);
  L3EXT_CHECK(owners.vocab_size() == vocab_size_, name, ": expected a vocabulary of ", vocab_size_,
              " (that of tables[0]), got ", owners.vocab_size());
  const int64_t row_bytes = table.shape.row_bytes(), table_bytes = owners.total_rows() * row_bytes;
  const std::byte* memory = table.source->memory();
  L3EXT_CHECK(memory != nullptr || table_bytes == 0, name,
              ": expected a table in host memory, where a kernel can read it, got one in a file");
  LayerPlacement place;
  place.table_bytes = table_bytes;
  place.in_place = options_.in_place && device_->is_host();
  Layer layer;
  layer.source = table.source;
  if (!device_->is_host()) {
    L3EXT_CHECK(!is_quantized(table.shape.dtype), name,
                ": expected float32, bfloat16 or float16 on ", device_->name(), ", got ",
                dtype_name(table.shape.dtype));
    L3EXT_CHECK(address_of(memory) % kAlignment == 0 && row_bytes % kAlignment == 0, name,
                ": expected rows aligned to ", kAlignment, " bytes for ", device_->name(),
                ", got rows of ", row_bytes, " bytes from the address ",
                static_cast<const void*>(memory));
    layer.pinned = device_->pin(memory, static_cast<size_t>(table_bytes));
  }

  std::vector<int64_t> resident(static_cast<size_t>(vocab_size_)), sources = resident,
                                                                   source_bytes = resident;
  std::vector<int64_t> hot_rows(static_cast<size_t>(vocab_size_), -1);
  if (!place.in_place) {
    HotSet hot = choose_hot_set(owners, row_bytes, options_.cache_bytes / layers);
    hot_rows = std::move(hot.row);
    place.hot_tokens = hot.tokens;
    place.hot_bytes = hot.rows * row_bytes;
    // No step needs more than every token's rows, each from an aligned address on.
    place.ring_bytes =
        std::min(options_.ring_bytes / layers, table_bytes + vocab_size_ * kAlignment);
  }
  layer.hot = std::make_shared<DeviceBuffer>(device_, static_cast<size_t>(place.hot_bytes));
  layer.ring = std::make_shared<DeviceBuffer>(device_, static_cast<size_t>(place.ring_bytes));
  queue.fill(layer.ring->data(), 0, layer.ring->bytes());  // no step shall pay for page faults
  for (int64_t token = 0; token < vocab_size_; ++token) {
    if (owners.rows(token) == 0) {  // none is read there, but 0 would mean that rows are missing
      resident[token] = address_of(layer.ring->data());
      continue;
    }
    sources[token] = address_of(memory) + owners.offsets[token] * row_bytes;
    source_bytes[token] = owners.rows(token) * row_bytes;
    if (place.in_place) resident[token] = sources[token];
    if (hot_rows[token] >= 0) {
      resident[token] = address_of(layer.hot->data()) + hot_rows[token] * row_bytes;
    }
  }
  layer.resident = upload(resident, queue);
  layer.sources = upload(sources, queue);
  layer.source_bytes = upload(source_bytes, queue);
  layer.directory = upload(resident, queue);
  load_hot_set(table, hot_rows, layer, queue);
  placement_.push_back(place);
  return layer;
}

void GraphRuntime::load_hot_set(const Table& table, const std::vector<int64_t>& hot_rows,
                                Layer& layer, CopyQueue& queue) const {
  const int64_t row_bytes = table.shape.row_bytes();
  std::vector<Copy> copies;
  const auto flush = [&] {
    if (!copies.empty()) queue.copy(copies);
    copies.clear();
  };
  for (int64_t token = 0; token < vocab_size_; ++token) {
    if (hot_rows[token] < 0 || table.owners->rows(token) == 0) continue;
    copies.push_back({layer.hot->data() + hot_rows[token] * row_bytes,
                      table.source->memory() + table.owners->offsets[token] * row_bytes,
                      static_cast<size_t>(table.owners->rows(token) * row_bytes)});
    if (copies.size() >= queue.batch()) flush();
  }
  flush();
}

std::shared_ptr<DeviceBuffer> GraphRuntime::upload(const std::vector<int64_t>& values,
                                                   CopyQueue& queue) const {
  const size_t bytes = values.size() * sizeof(int64_t);
  auto buffer = std::make_shared<DeviceBuffer>(device_, bytes);
  if (bytes == 0) return buffer;
  const std::shared_ptr<void> staging(device_->allocate_staging(bytes), [&](void* memory) {
    device_->deallocate_staging(memory, bytes);
  });
  std::memcpy(staging.get(), values.data(), bytes);
  const Copy copy = {buffer->data(), staging.get(), bytes};
  queue.copy({&copy, 1});
  if (const FencePtr there = queue.record()) there->wait();
  return buffer;
}

void GraphRuntime::begin(const int32_t* tokens, const int32_t* num_tokens, int64_t most_tokens,
                         const void* step, void* stream) {
  check_home();
  const std::scoped_lock lock(mutex_);
  step_ = step;
  joined_ = 0;
  void* branch = nullptr;
  std::optional<CudaDeviceGuard> current;
  if (branch_) {
    current.emplace(device_->index());
    branch = branch_->fork(stream);
  }
  for (int64_t i = 0; i < num_layers(); ++i) {
    const Layer& layer = layers_[i];
    cuda::FetchStepParams params;
    params.tokens = tokens;
    params.num_tokens = num_tokens;
    params.most_tokens = std::min(most_tokens, vocab_size_);
    params.vocab_size = vocab_size_;
    params.resident = array<const int64_t>(layer.resident);
    params.sources = array<const int64_t>(layer.sources);
    params.source_bytes = array<const int64_t>(layer.source_bytes);
    params.ring = layer.ring->data();
    params.ring_bytes = placement_[i].ring_bytes;
    params.directory = array<int64_t>(layer.directory);
    params.counters = array<int64_t>(counters_) + 4 * i;
    params.blocks = options_.fetch_blocks;
    if (!branch_) {
      cuda::fetch_step_on_host(params);
      continue;
    }
    cuda::fetch_step(params, workspace_->data(), static_cast<int64_t>(workspace_->bytes()), branch);
    branch_->mark(i);
  }
}

void GraphRuntime::wait(int64_t layer, const void* step, void* stream) {
  check_home();
  check_layer(layer);
  const std::scoped_lock lock(mutex_);
  if (step != step_ || step == nullptr) {
    throw Error(ErrorCode::kRuntime,
                "step: expected the one that began last, as its rows are where those of the steps "
                "before were, got an earlier one");
  }
  if (branch_) branch_->join(stream, layer);
  joined_ = std::max(joined_, layer + 1);
}

void GraphRuntime::end(const void* step, void* stream) {
  if (!is_home()) return;
  const std::scoped_lock lock(mutex_);
  if (step != step_ || step == nullptr) return;
  // The branch has all layers in order: its last point is after all others.
  if (branch_ && joined_ < num_layers()) branch_->join(stream, num_layers() - 1);
  step_ = nullptr;
}

const std::shared_ptr<DeviceBuffer>& GraphRuntime::directory(int64_t layer) const {
  check_layer(layer);
  return layers_[layer].directory;
}

void GraphRuntime::check_layer(int64_t layer) const {
  L3EXT_CHECK(layer >= 0 && layer < num_layers(), "layer: expected 0 to ", num_layers() - 1,
              ", got ", layer);
}

}  // namespace l3ext
