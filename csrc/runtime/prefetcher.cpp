#include "runtime/prefetcher.hpp"

#include <algorithm>
#include <utility>

#include "core/error.hpp"
#include "runtime/prefetcher_state.hpp"

namespace l3ext {

// --- construction and the end of it ------------------------------------------------------------

std::shared_ptr<Prefetcher> Prefetcher::create(std::vector<Table> tables,
                                               std::shared_ptr<Device> device,
                                               const PrefetchOptions& options) {
  std::shared_ptr<Prefetcher> self(new Prefetcher(std::move(tables), std::move(device), options),
                                   DeleteAtHome());
  self->start_workers();
  self->load_hot_sets();
  return self;
}

Prefetcher::Prefetcher(std::vector<Table> tables, std::shared_ptr<Device> device,
                       const PrefetchOptions& options)
    : options_(options),
      device_(std::move(device)),
      ledger_(std::make_shared<Ledger>(options.record_steps)) {
  L3EXT_CHECK(!tables.empty(), "tables: expected at least one, got none");
  L3EXT_CHECK(options.cache_bytes >= 0, "cache_bytes: expected at least 0, got ",
              options.cache_bytes);
  L3EXT_CHECK(options.ring_bytes >= 0, "ring_bytes: expected at least 0, got ", options.ring_bytes);
  L3EXT_CHECK(options.num_workers >= 1 && options.num_workers <= 256,
              "num_workers: expected 1 to 256, got ", options.num_workers);
  constexpr int64_t kMostPieceBytes = int64_t{1} << 30;
  L3EXT_CHECK(options.piece_bytes >= 4096 && options.piece_bytes <= kMostPieceBytes &&
                  options.piece_bytes % 4096 == 0,
              "piece_bytes: expected a multiple of 4096 up to ", kMostPieceBytes, ", got ",
              options.piece_bytes);
  L3EXT_CHECK(options.record_steps >= 0, "record_steps: expected at least 0, got ",
              options.record_steps);

  L3EXT_CHECK(options.queue_depth >= 1 && options.queue_depth <= 1024,
              "queue_depth: expected 1 to 1024, got ", options.queue_depth);

  vocab_size_ = tables[0].owners->vocab_size();
  fills_ = device_->make_queue();
  const auto layers = static_cast<int64_t>(tables.size());
  for (int64_t i = 0; i < layers; ++i) {
    layers_.push_back(make_layer(std::move(tables[i]), i, layers));
    const PrefetchLayer& layer = *layers_.back();
    placement_.push_back({layer.table.owners->total_rows() * layer.row_bytes, layer.in_place,
                          layer.hot.tokens, layer.hot.rows * layer.row_bytes,
                          layer.ring->rows() * layer.row_bytes});
  }
  if (const FencePtr filled = fills_->record()) filled->wait();
}

std::unique_ptr<PrefetchLayer> Prefetcher::make_layer(Table table, int64_t index, int64_t layers) {
  const RowOwners& owners = *table.owners;
  const std::string name = concat("tables[", index, "]");
  table.shape.check(name);
  owners.check(owners.offsets.empty() ? 0 : owners.total_rows(), name);
  L3EXT_CHECK(owners.vocab_size() == vocab_size_, name, ": expected a vocabulary of ", vocab_size_,
              " (that of tables[0]), got ", owners.vocab_size());
  L3EXT_CHECK(table.checksums.empty() || std::ssize(table.checksums) == vocab_size_, name,
              ".checksums: expected ", vocab_size_, " entries, got ", table.checksums.size());

  auto layer = std::make_unique<PrefetchLayer>();
  layer->index = index;
  layer->row_bytes = table.shape.row_bytes();
  const int64_t table_bytes = owners.total_rows() * layer->row_bytes;
  const std::byte* memory = table.source->memory();
  layer->in_place =
      options_.in_place && device_->is_host() && memory != nullptr && table.checksums.empty();
  if (layer->in_place) {
    layer->hot.row.assign(static_cast<size_t>(vocab_size_), -1);
    layer->ring = std::make_unique<BlockRing>(0, vocab_size_);
    layer->arena_rows = owners.total_rows();
    layer->arena =
        std::make_shared<DeviceBuffer>(memory, static_cast<size_t>(table_bytes), table.source);
  } else {
    layer->hot = choose_hot_set(owners, layer->row_bytes, options_.cache_bytes / layers);
    // Two steps at once never need more than the table twice.
    const int64_t ring_bytes = std::min(options_.ring_bytes / layers, 2 * table_bytes);
    layer->ring = std::make_unique<BlockRing>(ring_bytes / layer->row_bytes, vocab_size_);
    layer->arena_rows = layer->hot.rows + layer->ring->rows();
    layer->arena = std::make_shared<DeviceBuffer>(
        device_, static_cast<size_t>(layer->arena_rows * layer->row_bytes));
    // Touched now, so that no step pays for page faults.
    fills_->fill(layer->arena->data(), options_.poison ? 0xff : 0, layer->arena->bytes());
    if (memory != nullptr) layer->pinned = device_->pin(memory, static_cast<size_t>(table_bytes));
  }
  layer->table = std::move(table);
  return layer;
}

Prefetcher::~Prefetcher() {
  stop_workers();
  wait_for_the_device();
}

void Prefetcher::load_hot_sets() {
  std::vector<std::shared_ptr<Fetch>> fetches;
  for (const auto& layer : layers_) {
    auto fetch = std::make_shared<Fetch>();
    fetch->layer = layer.get();
    fetch->target = layer->arena;
    fetch->users = 1;
    const RowOwners& owners = *layer->table.owners;
    for (int64_t token = 0; token < vocab_size_; ++token) {
      if (layer->hot.row[token] < 0) continue;
      fetch->blocks.push_back({token, owners.offsets[token] * layer->row_bytes,
                               layer->hot.row[token] * layer->row_bytes,
                               owners.rows(token) * layer->row_bytes, false});
    }
    fetches.push_back(std::move(fetch));
  }
  std::unique_lock lock(mutex_);
  for (const auto& fetch : fetches) enqueue(fetch);
  work_.notify_all();
  for (const auto& fetch : fetches) {
    done_.wait(lock, [&] { return fetch->complete; });
    if (fetch->error) std::rethrow_exception(fetch->error);
    for (const FencePtr& fence : fetch->copies) fence->wait();
  }
}

// Until nothing that was put into streams before a step's end reads our memory any more.
void Prefetcher::wait_for_the_device() noexcept {
  const auto wait = [](std::span<const FencePtr> fences) {
    for (const FencePtr& fence : fences) {
      try {
        fence->wait();
      } catch (...) {
        return;  // the device failed: nothing reads there any more
      }
    }
  };
  for (const auto& layer : layers_) wait(layer->ring->fences());
  for (const Spare& spare : spares_) wait(spare.fences);
}

void Prefetcher::close() {
  if (!home_.is_here()) return;
  {
    const std::scoped_lock lock(mutex_);
    if (closed_) return;
    closed_ = true;
    while (!open_steps_.empty()) end_locked(**open_steps_.begin(), nullptr);
  }
  done_.notify_all();
  stop_workers();
  std::vector<std::shared_ptr<void>> garbage;  // freed after the lock: see TableSource's owner
  const std::scoped_lock lock(mutex_);
  wait_for_the_device();
  for (const auto& layer : layers_) {
    garbage.push_back(std::exchange(layer->table.source, nullptr));
    garbage.push_back(std::exchange(layer->arena, nullptr));
    garbage.push_back(std::exchange(layer->pinned, nullptr));
  }
  for (Spare& spare : spares_) garbage.push_back(std::move(spare.buffer));
  spares_.clear();
  queue_.clear();
}

// --- what callers may ask ----------------------------------------------------------------------

void Prefetcher::check_open() const {
  if (closed_) throw Error(ErrorCode::kRuntime, "the runtime is closed");
}

void Prefetcher::use_near_data(const std::optional<NearDataCosts>& costs) {
  check_home();
  if (costs) check_costs(*costs);
  const std::scoped_lock lock(mutex_);
  check_open();
  for (const auto& layer : layers_) {
    const bool in_file =
        layer->table.source->memory() == nullptr && layer->table.owners->total_rows() > 0;
    L3EXT_CHECK(!costs || !in_file,
                "near_data: expected tables in host memory, where attention can read them, got "
                "tables[",
                layer->index, "] in a file");
  }
  near_data_ = costs;
}

std::shared_ptr<DeviceBuffer> Prefetcher::arena(int64_t layer) const {
  check_home();
  check_layer(layer);
  const std::scoped_lock lock(mutex_);
  check_open();
  return layers_[layer]->arena;
}

int64_t Prefetcher::arena_rows(int64_t layer) const {
  check_layer(layer);
  return layers_[layer]->arena_rows;
}

const TableShape& Prefetcher::shape(int64_t layer) const {
  check_layer(layer);
  return layers_[layer]->table.shape;
}

void Prefetcher::check_layer(int64_t layer) const {
  L3EXT_CHECK(layer >= 0 && layer < num_layers(), "layer: expected 0 to ", num_layers() - 1,
              ", got ", layer);
}

}  // namespace l3ext
