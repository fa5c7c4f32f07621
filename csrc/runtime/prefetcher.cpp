#include "runtime/prefetcher.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <system_error>
#include <unordered_set>
#include <utility>

#include "core/checksum.hpp"
#include "core/error.hpp"
#include "runtime/prefetcher_state.hpp"

namespace l3ext {

// What one worker reads into and copies with.
struct Prefetcher::Worker {
  Worker(std::shared_ptr<Device> on, int64_t piece_bytes)
      : device(std::move(on)),
        queue(device->make_queue()),
        bytes(static_cast<size_t>(piece_bytes + TableSource::kScratchMargin)),
        scratch(static_cast<std::byte*>(device->allocate_staging(bytes))) {}
  ~Worker() { device->deallocate_staging(scratch, bytes); }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  std::shared_ptr<Device> device;
  std::unique_ptr<CopyQueue> queue;
  size_t bytes;
  std::byte* scratch;
};

// --- construction and the end of it ------------------------------------------------------------

std::shared_ptr<Prefetcher> Prefetcher::create(std::vector<Table> tables,
                                               std::shared_ptr<Device> device,
                                               const PrefetchOptions& options) {
  // A child of fork() has no workers, and locks and condition variables in whatever state they were
  // in: there, leaving the object alone is the only safe end.
  std::shared_ptr<Prefetcher> self(new Prefetcher(std::move(tables), std::move(device), options),
                                   [](Prefetcher* prefetcher) {
                                     if (prefetcher->process_ == ::getpid()) delete prefetcher;
                                   });
  self->start_workers();
  self->load_hot_sets();
  return self;
}

Prefetcher::Prefetcher(std::vector<Table> tables, std::shared_ptr<Device> device,
                       const PrefetchOptions& options)
    : options_(options),
      process_(::getpid()),
      device_(std::move(device)),
      ledger_(std::make_shared<Ledger>(options.record_steps)) {
  L3EXT_CHECK(!tables.empty(), "tables: expected at least one, got none");
  L3EXT_CHECK(options.cache_bytes >= 0, "cache_bytes: expected at least 0, got ",
              options.cache_bytes);
  L3EXT_CHECK(options.ring_bytes >= 0, "ring_bytes: expected at least 0, got ", options.ring_bytes);
  L3EXT_CHECK(options.num_workers >= 1 && options.num_workers <= 256,
              "num_workers: expected 1 to 256, got ", options.num_workers);
  L3EXT_CHECK(options.piece_bytes >= 4096 && options.piece_bytes % 4096 == 0,
              "piece_bytes: expected a multiple of 4096, got ", options.piece_bytes);
  L3EXT_CHECK(options.record_steps >= 0, "record_steps: expected at least 0, got ",
              options.record_steps);

  const auto layers = static_cast<int64_t>(tables.size());
  vocab_size_ = tables[0].owners->vocab_size();
  for (int64_t i = 0; i < layers; ++i) {
    auto layer = std::make_unique<Layer>();
    layer->table = std::move(tables[i]);
    const Table& table = layer->table;
    const RowOwners& owners = *table.owners;
    const std::string name = concat("tables[", i, "]");
    table.shape.check(name);
    owners.check(owners.offsets.empty() ? 0 : owners.total_rows(), name);
    L3EXT_CHECK(owners.vocab_size() == vocab_size_, name, ": expected a vocabulary of ",
                vocab_size_, " (that of tables[0]), got ", owners.vocab_size());
    L3EXT_CHECK(table.checksums.empty() || std::ssize(table.checksums) == vocab_size_, name,
                ".checksums: expected ", vocab_size_, " entries, got ", table.checksums.size());

    layer->row_bytes = table.shape.row_bytes();
    const int64_t table_bytes = owners.total_rows() * layer->row_bytes;
    layer->hot = choose_hot_set(owners, layer->row_bytes, options.cache_bytes / layers);
    // Two steps at once never need more than the table twice.
    const int64_t ring_bytes = std::min(options.ring_bytes / layers, 2 * table_bytes);
    layer->ring = RowRing(ring_bytes / layer->row_bytes);
    const int64_t hot_bytes = layer->hot.rows * layer->row_bytes;
    const int64_t ring_size = layer->ring.rows() * layer->row_bytes;
    layer->arena =
        std::make_shared<DeviceBuffer>(device_, static_cast<size_t>(hot_bytes + ring_size));
    // Touched now, so that no step pays for page faults.
    layer->arena->fill(options.poison ? 0xff : 0, static_cast<size_t>(hot_bytes),
                       static_cast<size_t>(ring_size));
    placement_.push_back({table_bytes, layer->hot.tokens, hot_bytes, ring_size});
    layers_.push_back(std::move(layer));
  }
}

Prefetcher::~Prefetcher() { stop_workers(); }

void Prefetcher::start_workers() {
  // Signals belong to the embedding program's threads: a worker that took one would keep it from
  // interrupting the thread it was meant for.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (int i = 0; i < options_.num_workers; ++i) {
      auto worker = std::make_unique<Worker>(device_, options_.piece_bytes);
      workers_.emplace_back([this, i, worker = std::move(worker)] { work(i, *worker); });
    }
  } catch (const std::system_error& error) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw Error(ErrorCode::kRuntime,
                concat("cannot start ", options_.num_workers, " worker threads: ", error.what()));
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Prefetcher::stop_workers() {
  {
    const std::scoped_lock lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

void Prefetcher::load_hot_sets() {
  std::vector<std::shared_ptr<Fetch>> fetches;
  for (const auto& layer : layers_) {
    auto fetch = std::make_shared<Fetch>();
    fetch->layer = layer.get();
    fetch->target = layer->arena;
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
  }
}

void Prefetcher::close() {
  check_process();
  {
    const std::scoped_lock lock(mutex_);
    if (closed_) return;
    closed_ = true;
    while (!open_steps_.empty()) end_locked(**open_steps_.begin());
  }
  done_.notify_all();
  stop_workers();
  std::vector<std::shared_ptr<void>> garbage;  // freed after the lock: see TableSource's owner
  const std::scoped_lock lock(mutex_);
  for (const auto& layer : layers_) {
    garbage.push_back(std::exchange(layer->table.source, nullptr));
    garbage.push_back(std::exchange(layer->arena, nullptr));
  }
  queue_.clear();
}

// --- the workers -------------------------------------------------------------------------------

void Prefetcher::work(int index, Worker& worker) {
  std::unique_lock lock(mutex_);
  while (true) {
    work_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    const std::shared_ptr<Fetch> fetch = queue_.front();
    if (fetch->exhausted()) {  // every piece is taken, or it was cancelled
      queue_.pop_front();
      continue;
    }
    ++fetch->active;
    lock.unlock();
    WorkerSpan span{index, ledger_->now(), 0};
    std::exception_ptr error;
    try {
      run_pieces(*fetch, worker);
    } catch (...) {
      error = std::current_exception();
    }
    span.end_ns = ledger_->now();
    lock.lock();
    leave(*fetch, span, error);
  }
}

void Prefetcher::run_pieces(Fetch& fetch, Worker& worker) {
  const Table& table = fetch.layer->table;
  for (int64_t i; (i = fetch.next.fetch_add(1)) < fetch.num_pieces();) {
    const Piece& piece = fetch.pieces[i];
    const std::byte* rows = piece.resident
                                ? fetch.layer->arena->data() + piece.source
                                : table.source->read(piece.source, piece.bytes, worker.scratch);
    if (!table.checksums.empty() && !piece.resident) {
      if (piece.part) {
        fetch.part_checksums[i] = crc32c(rows, static_cast<size_t>(piece.bytes));
      } else {
        for (int64_t b = piece.first_block; b < piece.last_block; ++b) {
          const Block& block = fetch.blocks[b];
          check_block(
              table, block,
              crc32c(rows + (block.source - piece.source), static_cast<size_t>(block.bytes)));
        }
      }
    }
    worker.queue->copy(fetch.target->data() + piece.target, rows, static_cast<size_t>(piece.bytes));
    worker.queue->finish();  // the scratch buffer is free again
  }
}

void Prefetcher::check_block(const Table& table, const Block& block, uint32_t checksum) {
  if (checksum == table.checksums[block.token]) return;
  throw table.source->corrupt(
      block.source,
      concat("the rows of token ", block.token, " (", block.bytes,
             " bytes) do not match their checksum: the table was damaged or changed"));
}

// The checksums of blocks that were read in parts: put together once all parts are there.
void Prefetcher::check_parts(const Fetch& fetch) {
  const Table& table = fetch.layer->table;
  if (table.checksums.empty()) return;
  for (int64_t i = 0; i < fetch.num_pieces();) {
    const Piece& first = fetch.pieces[i];
    if (!first.part || first.resident) {
      ++i;
      continue;
    }
    uint32_t checksum = 0;
    for (; i < fetch.num_pieces() && fetch.pieces[i].part && !fetch.pieces[i].resident &&
           fetch.pieces[i].first_block == first.first_block;
         ++i) {
      checksum = crc32c_combine(checksum, fetch.part_checksums[i],
                                static_cast<uint64_t>(fetch.pieces[i].bytes));
    }
    check_block(table, fetch.blocks[first.first_block], checksum);
  }
}

void Prefetcher::leave(Fetch& fetch, const WorkerSpan& span, const std::exception_ptr& error) {
  LayerRecord& record = fetch.record;
  record.fetch_begin_ns =
      record.spans.empty() ? span.begin_ns : std::min(record.fetch_begin_ns, span.begin_ns);
  record.fetch_end_ns = std::max(record.fetch_end_ns, span.end_ns);
  record.spans.push_back(span);
  if (error) {
    if (!fetch.error) fetch.error = error;
    fetch.cancel_rest();
  }
  if (--fetch.active > 0 || !fetch.exhausted()) return;
  if (!fetch.error && !fetch.abandoned) {
    try {
      check_parts(fetch);
    } catch (...) {
      fetch.error = std::current_exception();
    }
  }
  fetch.complete = true;
  if (fetch.abandoned) give_back(fetch);
  done_.notify_all();
}

// --- what callers may ask ----------------------------------------------------------------------

void Prefetcher::check_process() const {
  if (process_ == ::getpid()) return;
  throw Error(
      ErrorCode::kRuntime,
      concat("this runtime belongs to process ", process_, " and came to process ", ::getpid(),
             " through fork(), which leaves its workers behind; make a new one "
             "here"));
}

void Prefetcher::check_open() const {
  if (closed_) throw Error(ErrorCode::kRuntime, "the runtime is closed");
}

std::shared_ptr<DeviceBuffer> Prefetcher::arena(int64_t layer) const {
  check_process();
  check_layer(layer);
  const std::scoped_lock lock(mutex_);
  check_open();
  return layers_[layer]->arena;
}

int64_t Prefetcher::arena_rows(int64_t layer) const {
  check_layer(layer);
  return layers_[layer]->hot.rows + layers_[layer]->ring.rows();
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
