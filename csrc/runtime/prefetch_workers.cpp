// The worker threads: they take pieces of the nearest layer first, keep reads on their way, check
// what came, and copy it to where attention reads it.
#include <pthread.h>

#include <algorithm>
#include <csignal>
#include <system_error>
#include <utility>

#include "core/checksum.hpp"
#include "core/error.hpp"
#include "runtime/prefetcher_state.hpp"

namespace l3ext {
namespace {

// Where a piece lies in memory that copies can read; null: it must be read first.
const std::byte* memory_of(const Fetch& fetch, const Piece& piece) {
  if (piece.resident) return fetch.layer->arena->data() + piece.source;
  const std::byte* table = fetch.layer->table.source->memory();
  return table == nullptr ? nullptr : table + piece.source;
}

void check_block(const Table& table, const Block& block, uint32_t checksum) {
  if (checksum == table.checksums[static_cast<size_t>(block.token)]) return;
  throw table.source->corrupt(
      block.source,
      concat("the rows of token ", block.token, " (", block.bytes,
             " bytes) do not match their checksum: the table was damaged or changed"));
}

// The checksums of whole blocks are compared, those of parts kept until all parts are there.
void check_piece(Fetch& fetch, int64_t index, const std::byte* rows) {
  const Table& table = fetch.layer->table;
  const Piece& piece = fetch.pieces[static_cast<size_t>(index)];
  if (table.checksums.empty() || piece.resident) return;
  if (piece.part) {
    fetch.part_checksums[static_cast<size_t>(index)] =
        crc32c(rows, static_cast<size_t>(piece.bytes));
    return;
  }
  for (int64_t b = piece.first_block; b < piece.last_block; ++b) {
    const Block& block = fetch.blocks[static_cast<size_t>(b)];
    check_block(table, block,
                crc32c(rows + (block.source - piece.source), static_cast<size_t>(block.bytes)));
  }
}

void check_parts(const Fetch& fetch) {
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

}  // namespace

// --- a worker's memory ---------------------------------------------------------------------------

Prefetcher::Worker::Worker(std::shared_ptr<Device> on,
                           std::span<const std::unique_ptr<PrefetchLayer>> layers, int depth,
                           int64_t piece_bytes)
    : device(std::move(on)), queue(device->make_queue()), on_their_way(layers.size()) {
  copies.reserve(queue->batch());
  int deepest = 0;
  for (const auto& layer : layers) {
    TableSource& source = *layer->table.source;
    readers.push_back(source.memory() != nullptr ? nullptr : source.make_reader(depth));
    if (readers.back()) deepest = std::max(deepest, readers.back()->depth());
  }
  if (deepest == 0) return;
  slots.resize(static_cast<size_t>(deepest));
  for (std::vector<size_t>* list : {&reading, &free, &taken}) list->reserve(slots.size());
  const auto slot_bytes = static_cast<size_t>(piece_bytes + TableSource::kScratchMargin);
  staging_bytes = static_cast<size_t>(deepest) * slot_bytes;
  staging = static_cast<std::byte*>(device->allocate_staging(staging_bytes));
  for (size_t i = 0; i < slots.size(); ++i) {
    slots[i].scratch = staging + i * slot_bytes;
    free.push_back(i);
  }
}

Prefetcher::Worker::~Worker() {
  const auto finish = [&] {
    try {
      if (const FencePtr copied = queue->record()) copied->wait();
    } catch (...) {
      return;  // the device failed: nothing reads the scratch any more
    }
  };
  finish();
  if (staging != nullptr) device->deallocate_staging(staging, staging_bytes);
}

void Prefetcher::start_workers() {
  // Signals belong to the embedding program's threads: a worker that took one would keep it from
  // interrupting the thread it was meant for.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (int i = 0; i < options_.num_workers; ++i) {
      auto worker =
          std::make_unique<Worker>(device_, layers_, options_.queue_depth, options_.piece_bytes);
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

// --- their work ----------------------------------------------------------------------------------

void Prefetcher::work(int index, Worker& worker) {
  std::unique_lock lock(mutex_);
  while (true) {
    take_reads(index, worker, lock);
    if (take_copies(index, worker, lock)) continue;
    if (!worker.reading.empty()) {
      complete_read(index, worker, lock);
    } else if (stopping_) {
      return;
    } else {
      work_.wait(lock, [&] { return stopping_ || next_fetch(); });
    }
  }
}

// The fetch whose pieces are to be taken now.
std::shared_ptr<Fetch> Prefetcher::next_fetch() {
  while (!queue_.empty() && queue_.front()->exhausted()) queue_.pop_front();
  return queue_.empty() || stopping_ ? nullptr : queue_.front();
}

// Starts as many reads as may be on their way.
void Prefetcher::take_reads(int index, Worker& worker, std::unique_lock<std::mutex>& lock) {
  std::vector<size_t>& taken = worker.taken;
  std::vector<FencePtr> after;
  taken.clear();
  while (!worker.free.empty()) {
    const std::shared_ptr<Fetch> fetch = next_fetch();
    if (!fetch || memory_of(*fetch, fetch->pieces[fetch->next]) != nullptr) break;
    int& on_their_way = worker.on_their_way[fetch->layer->index];
    if (on_their_way == worker.readers[fetch->layer->index]->depth()) break;
    ++on_their_way;
    Worker::Slot& slot = worker.slots[worker.free.front()];
    slot.fetch = fetch;
    slot.piece = fetch->next;
    started(*fetch, index, after);
    taken.push_back(worker.free.front());
    worker.free.erase(worker.free.begin());
  }
  if (taken.empty()) return;
  lock.unlock();
  for (const size_t i : taken) {
    Worker::Slot& slot = worker.slots[i];
    try {
      for (const FencePtr& fence : std::exchange(after, {})) worker.queue->wait(fence);
      if (slot.copied) slot.copied->wait();
      slot.copied = nullptr;
      const Piece& piece = slot.fetch->pieces[slot.piece];
      worker.readers[slot.fetch->layer->index]->submit(
          {piece.source, piece.bytes, slot.scratch, static_cast<int64_t>(i)});
      worker.reading.push_back(i);
    } catch (...) {
      slot.error = std::current_exception();
    }
  }
  lock.lock();
  for (const size_t i : taken) {
    const std::exception_ptr error = std::exchange(worker.slots[i].error, nullptr);
    if (!error) continue;
    const std::shared_ptr<Fetch> fetch = std::exchange(worker.slots[i].fetch, nullptr);
    --worker.on_their_way[fetch->layer->index];
    worker.free.push_back(i);
    finished(*fetch, index, 1, nullptr, error);
  }
}

// Copies the next pieces if they are in memory already: as many as the device likes at a time.
bool Prefetcher::take_copies(int index, Worker& worker, std::unique_lock<std::mutex>& lock) {
  const std::shared_ptr<Fetch> fetch = next_fetch();
  if (!fetch) return false;
  const int64_t first = fetch->next;
  std::vector<Copy>& copies = worker.copies;
  std::vector<FencePtr> after;
  copies.clear();
  while (!fetch->exhausted() && copies.size() < worker.queue->batch()) {
    const Piece& piece = fetch->pieces[fetch->next];
    const std::byte* rows = memory_of(*fetch, piece);
    if (rows == nullptr) break;
    copies.push_back(
        {fetch->target->data() + piece.target, rows, static_cast<size_t>(piece.bytes)});
    started(*fetch, index, after);
  }
  if (copies.empty()) return false;
  lock.unlock();
  FencePtr copied;
  std::exception_ptr error;
  try {
    for (size_t i = 0; i < copies.size(); ++i) {
      check_piece(*fetch, first + static_cast<int64_t>(i),
                  static_cast<const std::byte*>(copies[i].source));
    }
    for (const FencePtr& fence : after) worker.queue->wait(fence);
    worker.queue->copy(copies);
    copied = worker.queue->record();
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  finished(*fetch, index, std::ssize(copies), copied, error);
  return true;
}

// Waits for a read of the nearest layer and copies what it brought.
void Prefetcher::complete_read(int index, Worker& worker, std::unique_lock<std::mutex>& lock) {
  lock.unlock();
  const int64_t layer = worker.slots[worker.reading.front()].fetch->layer->index;
  const ReadResult read = worker.readers[layer]->complete();
  const auto i = static_cast<size_t>(read.tag);
  Worker::Slot& slot = worker.slots[i];
  const std::shared_ptr<Fetch> fetch = std::exchange(slot.fetch, nullptr);
  std::exception_ptr error = read.error;
  if (!error) {
    try {
      const Piece& piece = fetch->pieces[slot.piece];
      check_piece(*fetch, slot.piece, read.data);
      const Copy copy = {fetch->target->data() + piece.target, read.data,
                         static_cast<size_t>(piece.bytes)};
      worker.queue->copy({&copy, 1});
      slot.copied = worker.queue->record();
    } catch (...) {
      error = std::current_exception();
    }
  }
  std::erase(worker.reading, i);
  worker.free.push_back(i);
  --worker.on_their_way[layer];
  lock.lock();
  finished(*fetch, index, 1, slot.copied, error);
}

void Prefetcher::started(Fetch& fetch, int worker, std::vector<FencePtr>& after) {
  ++fetch.next;
  ++fetch.active;
  std::vector<WorkerSpan>& spans = fetch.record.spans;
  if (std::ranges::find(spans, worker, &WorkerSpan::worker) != spans.end()) return;
  spans.push_back({worker, ledger_->now(), 0});
  after.insert(after.end(), fetch.after.begin(), fetch.after.end());
}

void Prefetcher::finished(Fetch& fetch, int worker, int64_t pieces, const FencePtr& copied,
                          const std::exception_ptr& error) {
  std::ranges::find(fetch.record.spans, worker, &WorkerSpan::worker)->end_ns = ledger_->now();
  if (copied) fetch.copies[static_cast<size_t>(worker)] = copied;
  if (error) {
    if (!fetch.error) fetch.error = error;
    cancel(fetch);
  }
  fetch.active -= pieces;
  fetch.finished += pieces;
  if (fetch.active == 0 && fetch.exhausted()) complete(fetch);
}

// What nobody has begun to bring stays where it is, and no later step may count on it.
void Prefetcher::cancel(Fetch& fetch) {
  for (; !fetch.exhausted(); ++fetch.next) {
    const Piece& piece = fetch.pieces[fetch.next];
    if (!piece.resident) fetch.record.bytes -= piece.bytes;
  }
  for (RingBlock* block : fetch.brings) fetch.layer->ring->forget(*block);
}

void Prefetcher::complete(Fetch& fetch) {
  fetch.record.time_fetch();
  if (fetch.whole()) {
    try {
      check_parts(fetch);
    } catch (...) {
      fetch.error = std::current_exception();
    }
  }
  fetch.complete = true;
  std::erase(fetch.copies, nullptr);
  for (RingBlock* block : std::exchange(fetch.brings, {})) {
    block->landed = fetch.copies;
    if (!fetch.whole()) {  // nobody may have waited yet for what had to go
      for (const FencePtr& fence : fetch.after) block->add_fence(fence);
    }
    block->fetch = nullptr;
    if (fetch.error) fetch.layer->ring->forget(*block);
    unpin(*fetch.layer, *block);
  }
  if (fetch.users == 0) retire(fetch);
  done_.notify_all();
}

}  // namespace l3ext
