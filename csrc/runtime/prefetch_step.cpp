// The life of a step: begin, wait, end.
#include <algorithm>
#include <chrono>
#include <utility>

#include "core/error.hpp"
#include "runtime/prefetcher_state.hpp"

namespace l3ext {

namespace {

// Leaves every token once, ascending; returns how often each was there.
std::vector<int64_t> sort_and_count(std::vector<int32_t>& tokens) {
  const auto not_ascending = [](int32_t a, int32_t b) { return a >= b; };
  if (std::ranges::adjacent_find(tokens, not_ascending) == tokens.end()) {
    return std::vector<int64_t>(tokens.size(), 1);
  }
  std::ranges::sort(tokens);
  std::vector<int64_t> counts;
  for (const int32_t token : tokens) {
    if (!counts.empty() && tokens[counts.size() - 1] == token) {
      ++counts.back();
    } else {
      tokens[counts.size()] = token;
      counts.push_back(1);
    }
  }
  tokens.resize(counts.size());
  return counts;
}

}  // namespace

Prefetcher::Step Prefetcher::begin(const std::shared_ptr<Prefetcher>& self,
                                   std::span<const int32_t> token_ids) {
  self->check_home();
  // Workers write to it: in a child of fork() it may be in the midst of that.
  const std::shared_ptr<StepState> state(new StepState, DeleteAtHome());
  state->record.begin_ns = self->ledger_->now();
  for (size_t i = 0; i < token_ids.size(); ++i) {
    L3EXT_CHECK(token_ids[i] >= 0 && token_ids[i] < self->vocab_size_, "token_ids[", i,
                "]: expected an id in [0, ", self->vocab_size_, "), got ", token_ids[i]);
  }
  std::vector<int32_t>& tokens = state->tokens;
  tokens.assign(token_ids.begin(), token_ids.end());
  const std::vector<int64_t> queries = sort_and_count(tokens);

  Step step(self, state);  // from here on the handle gives back what was taken, whatever happens
  {
    const std::scoped_lock lock(self->mutex_);
    self->check_open();
    self->open_steps_.insert(state.get());
    state->layers.resize(self->layers_.size());
    for (size_t i = 0; i < self->layers_.size(); ++i) {
      StepLayer& layer = state->layers[i];
      layer.fetch = std::make_shared<Fetch>();
      layer.fetch->layer = self->layers_[i].get();
      layer.fetch->target = self->layers_[i]->arena;
      layer.fetch->users = 1;
      self->place(layer, tokens, queries);
    }
    for (const StepLayer& layer : state->layers) self->enqueue(layer.fetch);
    state->record.step = self->next_step_++;
    state->queued = true;
  }
  self->work_.notify_all();
  return step;
}

// Decides where every token's rows lie, and what has to be copied for that.
void Prefetcher::place(StepLayer& step, std::span<const int32_t> tokens,
                       std::span<const int64_t> queries) {
  const PrefetchLayer& layer = *step.fetch->layer;
  const RowOwners& owners = *layer.table.owners;
  LayerRecord& record = step.fetch->record;
  record.tokens = static_cast<int64_t>(tokens.size());
  for (const int32_t token : tokens) record.rows += owners.rows(token);
  step.first_row.reserve(tokens.size());
  if (layer.in_place) {
    record.in_place_bytes = record.rows * layer.row_bytes;
    for (const int32_t token : tokens) step.first_row.push_back(owners.offsets[token]);
    return;
  }
  for (const int32_t token : tokens) {
    if (layer.hot.row[token] < 0) continue;
    ++record.hits;
    record.hit_bytes += owners.rows(token) * layer.row_bytes;
  }
  place_near(step, tokens, queries);
  if (!place_in_ring(step, tokens)) place_in_own_buffer(step, tokens);
}

// Decides what is neither here nor worth being brought.
void Prefetcher::place_near(StepLayer& step, std::span<const int32_t> tokens,
                            std::span<const int64_t> queries) {
  step.near.resize(tokens.size());
  if (!near_data_) return;
  const PrefetchLayer& layer = *step.fetch->layer;
  const RowOwners& owners = *layer.table.owners;
  std::vector<size_t> segments;
  std::vector<ColdBlock> cold;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const int64_t rows = owners.rows(tokens[i]);
    if (rows == 0 || layer.hot.row[tokens[i]] >= 0 || layer.ring->find(tokens[i])) continue;
    segments.push_back(i);
    cold.push_back({rows * layer.row_bytes, queries[i]});
  }
  const std::vector<bool> near = choose_near(cold, *near_data_);
  for (size_t i = 0; i < cold.size(); ++i) {
    if (!near[i]) continue;
    step.near[segments[i]] = true;
    ++step.fetch->record.near;
    step.fetch->record.near_bytes += cold[i].bytes;
  }
}

// False, and nothing taken, where pinned blocks leave no room.
bool Prefetcher::place_in_ring(StepLayer& step, std::span<const int32_t> tokens) {
  Fetch& fetch = *step.fetch;
  PrefetchLayer& layer = *fetch.layer;
  const RowOwners& owners = *layer.table.owners;
  // What is there is pinned before anything is allocated, which may evict.
  step.holds.reserve(tokens.size());
  size_t missing = 0, fences = 0;
  int64_t missing_rows = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const int32_t token = tokens[i];
    if (step.near[i] || layer.hot.row[token] >= 0 || owners.rows(token) == 0) continue;
    if (RingBlock* block = layer.ring->find(token)) {
      ++block->pins;
      step.holds.push_back(block);
      fences += block->landed.size();
    } else {
      ++missing;
      missing_rows += owners.rows(token);
    }
  }
  // Where memory is lacking, every block that was taken is known to whoever gives it back.
  const size_t found = step.holds.size();
  step.needs.reserve(found);
  step.landed.reserve(fences);
  fetch.brings.reserve(missing);
  fetch.blocks.reserve(missing);
  bool room = missing_rows <= layer.ring->rows();
  for (size_t i = 0; i < tokens.size() && room; ++i) {
    const int32_t token = tokens[i];
    const int64_t rows = owners.rows(token);
    const int64_t hot_row = layer.hot.row[token];
    if (step.near[i] || hot_row >= 0 || rows == 0) {
      step.first_row.push_back(std::max<int64_t>(hot_row, 0));
      continue;
    }
    RingBlock* block = layer.ring->find(token);
    if (block == nullptr) {
      block = layer.ring->allocate(token, rows, fetch.after);
      room = block != nullptr;
      if (!room) break;
      ++block->pins;  // the fetch's own
      block->fetch = step.fetch;
      step.holds.push_back(block);
      fetch.brings.push_back(block);
      fetch.record.bytes += rows * layer.row_bytes;
      const int64_t target = layer.hot.rows + block->begin;
      fetch.blocks.push_back({token, owners.offsets[token] * layer.row_bytes,
                              target * layer.row_bytes, rows * layer.row_bytes, false});
    }
    step.first_row.push_back(layer.hot.rows + block->begin);
  }
  if (!room) {
    for (RingBlock* block : fetch.brings) {  // its place has the fences of those that had to go
      for (const FencePtr& fence : fetch.after) block->add_fence(fence);
      layer.ring->forget(*block);
      block->fetch = nullptr;
      --block->pins;
    }
    for (RingBlock* block : step.holds) --block->pins;
    step.holds.clear();
    step.first_row.clear();
    fetch.brings.clear();
    fetch.blocks.clear();
    fetch.after.clear();
    fetch.record.bytes = 0;
    return false;
  }
  for (const RingBlock* block : std::span(step.holds).first(found)) {
    ++fetch.record.reused;
    fetch.record.reused_bytes += block->rows * layer.row_bytes;
    if (block->fetch == nullptr) {
      step.landed.insert(step.landed.end(), block->landed.begin(), block->landed.end());
    } else if (std::ranges::find(step.needs, block->fetch) == step.needs.end()) {
      ++block->fetch->users;
      step.needs.push_back(block->fetch);
    }
  }
  return true;
}

void Prefetcher::place_in_own_buffer(StepLayer& step, std::span<const int32_t> tokens) {
  Fetch& fetch = *step.fetch;
  const PrefetchLayer& layer = *fetch.layer;
  const RowOwners& owners = *layer.table.owners;
  const int64_t bytes = fetch.record.rows * layer.row_bytes - fetch.record.near_bytes;
  fetch.record.bytes = bytes - fetch.record.hit_bytes;
  spares_.reserve(spares_.size() + lent_ + 1);  // it comes back, also when memory is lacking then
  fetch.target = take_spare(static_cast<size_t>(bytes), fetch.after);
  fetch.record.spilled = true;  // not before: where memory is lacking the target is the arena
  ++lent_;
  int64_t next_row = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const int32_t token = tokens[i];
    if (step.near[i]) {
      step.first_row.push_back(0);
      continue;
    }
    const int64_t hot_row = layer.hot.row[token];
    const int64_t rows = owners.rows(token);
    step.first_row.push_back(next_row);
    fetch.blocks.push_back({token,
                            (hot_row >= 0 ? hot_row : owners.offsets[token]) * layer.row_bytes,
                            next_row * layer.row_bytes, rows * layer.row_bytes, hot_row >= 0});
    next_row += rows;
  }
}

// The smallest buffer that an ended step has left and nobody else holds, else a new one.
std::shared_ptr<DeviceBuffer> Prefetcher::take_spare(size_t bytes, std::vector<FencePtr>& fences) {
  auto best = spares_.end();
  for (auto spare = spares_.begin(); spare != spares_.end(); ++spare) {
    if (spare->buffer->bytes() < bytes || spare->buffer.use_count() > 1) continue;
    if (best == spares_.end() || spare->buffer->bytes() < best->buffer->bytes()) best = spare;
  }
  if (best == spares_.end()) return std::make_shared<DeviceBuffer>(device_, bytes);
  const std::shared_ptr<DeviceBuffer> buffer = best->buffer;
  fences = std::move(best->fences);
  spares_.erase(best);
  return buffer;
}

void Prefetcher::enqueue(const std::shared_ptr<Fetch>& fetch) {
  fetch->pieces = plan_fetch(fetch->blocks, options_.piece_bytes);
  fetch->part_checksums.resize(fetch->pieces.size());
  // What workers do with it cannot fail for want of memory.
  fetch->copies.resize(static_cast<size_t>(options_.num_workers));
  fetch->record.spans.reserve(static_cast<size_t>(options_.num_workers));
  if (!fetch->pieces.empty()) queue_.push_back(fetch);
  fetch->queued = true;
  if (fetch->pieces.empty()) complete(*fetch);
}

void Prefetcher::end_locked(StepState& step, const FencePtr& read) {
  if (step.ended) return;
  step.ended = true;
  open_steps_.erase(&step);
  step.record.end_ns = ledger_->now();
  for (StepLayer& layer : step.layers) {
    if (!layer.fetch) continue;  // begin() did not get that far
    layer.fetch->record.cancelled = !layer.fetch->complete;
    layer.fetch->read = read;
    for (RingBlock* block : layer.holds) {
      block->add_fence(read);
      unpin(*layer.fetch->layer, *block);
    }
    leave(*layer.fetch);
    for (const auto& fetch : layer.needs) leave(*fetch);
    layer.needs.clear();
  }
  if (!step.queued) return;
  for (const StepLayer& layer : step.layers) {
    LayerRecord& record = step.record.layers.emplace_back(layer.fetch->record);
    for (WorkerSpan& span : record.spans) {  // of workers that are still at it, the step's part
      if (span.end_ns == 0) span.end_ns = step.record.end_ns;
    }
    record.time_fetch();
  }
  ledger_->add(std::move(step.record));
}

// A step needs the fetch no more.
void Prefetcher::leave(Fetch& fetch) {
  if (--fetch.users > 0) return;
  if (fetch.complete) {
    retire(fetch);
    return;
  }
  cancel(fetch);
  if (fetch.active == 0) complete(fetch);
}

// Gives up one hold on a block.
void Prefetcher::unpin(PrefetchLayer& layer, RingBlock& block) {
  if (--block.pins > 0 || !options_.poison) return;
  layer.ring->forget(block);
  for (const FencePtr& fence : block.landed) fills_->wait(fence);
  for (const FencePtr& fence : block.fences) fills_->wait(fence);
  fills_->fill(
      layer.arena->data() + static_cast<size_t>((layer.hot.rows + block.begin) * layer.row_bytes),
      0xff, static_cast<size_t>(block.rows * layer.row_bytes));
  block.landed.clear();
  block.fences.clear();  // it has waited for all of them
  block.add_fence(fills_->record());
}

// Nobody needs the fetch and nothing more will come: a buffer of its own serves later steps.
void Prefetcher::retire(Fetch& fetch) {
  const std::shared_ptr<DeviceBuffer> buffer = std::exchange(fetch.target, nullptr);
  if (!fetch.record.spilled || !buffer) return;
  --lent_;
  Spare spare{buffer, fetch.copies};  // null fences have passed, and are left out
  if (fetch.read) spare.fences.push_back(fetch.read);
  if (!fetch.whole()) {
    spare.fences.insert(spare.fences.end(), fetch.after.begin(), fetch.after.end());
  }
  if (options_.poison) {
    for (const FencePtr& fence : spare.fences) fills_->wait(fence);
    fills_->fill(buffer->data(), 0xff, buffer->bytes());
    spare.fences.clear();  // it has waited for all of them
    if (const FencePtr filled = fills_->record()) spare.fences.push_back(filled);
  }
  // Two steps at once are the normal case; of what more of them left, the oldest that nothing reads
  // any more goes.
  if (spares_.size() >= 2 * layers_.size()) {
    const auto idle = std::ranges::find_if(spares_, [](const Spare& old) {
      return std::ranges::all_of(old.fences, [](const FencePtr& fence) { return fence->passed(); });
    });
    if (idle != spares_.end()) spares_.erase(idle);
  }
  spares_.push_back(std::move(spare));
}

// --- the handle --------------------------------------------------------------------------------

Prefetcher::Step::~Step() {
  if (!state_) return;  // moved from
  try {
    end();
  } catch (...) {
    return;  // no memory for the ledger's record; the rows were given back before
  }
}

std::span<const int32_t> Prefetcher::Step::tokens() const { return state_->tokens; }

void Prefetcher::Step::wait(int64_t layer, void* stream, const std::function<bool()>& interrupted) {
  Prefetcher& prefetcher = *prefetcher_;
  prefetcher.check_home();
  prefetcher.check_layer(layer);
  const StepLayer& step = state_->layers[static_cast<size_t>(layer)];
  const Ledger& ledger = *prefetcher.ledger_;
  const int64_t begin = ledger.now();
  int64_t exposed = 0;
  std::unique_lock lock(prefetcher.mutex_);
  const auto complete = [](const std::shared_ptr<Fetch>& fetch) { return fetch->complete; };
  while (true) {
    check_open();
    if (complete(step.fetch) && std::ranges::all_of(step.needs, complete)) break;
    const int64_t blocked = ledger.now();
    const auto status = prefetcher.done_.wait_for(lock, std::chrono::milliseconds(100));
    exposed += ledger.now() - blocked;
    if (status == std::cv_status::timeout && interrupted) {
      lock.unlock();  // the hook may need other locks (Python's)
      if (interrupted()) throw Error(ErrorCode::kInterrupted, "interrupted");
      lock.lock();
    }
  }
  std::vector<FencePtr> fences = step.landed;
  for (const auto& fetch : step.needs) {
    if (fetch->error) std::rethrow_exception(fetch->error);
    fences.insert(fences.end(), fetch->copies.begin(), fetch->copies.end());
  }
  LayerRecord& record = step.fetch->record;
  if (!step.fetch->error) {
    fences.insert(fences.end(), step.fetch->copies.begin(), step.fetch->copies.end());
    if (auto stall = prefetcher.device_->wait(stream, fences)) {
      record.stalls.push_back(std::move(stall));
    }
  }
  if (record.wait_end_ns == 0) record.wait_begin_ns = begin;
  record.wait_end_ns = ledger.now();
  record.exposed_ns += exposed;
  if (step.fetch->error) std::rethrow_exception(step.fetch->error);
}

std::shared_ptr<DeviceBuffer> Prefetcher::Step::rows(int64_t layer) const {
  prefetcher_->check_layer(layer);
  const auto lock = lock_open();
  return state_->layers[static_cast<size_t>(layer)].fetch->target;
}

bool Prefetcher::Step::spilled(int64_t layer) const {
  prefetcher_->check_layer(layer);
  const auto lock = lock_open();
  return state_->layers[static_cast<size_t>(layer)].fetch->record.spilled;
}

void Prefetcher::Step::segment_rows(int64_t layer, int64_t* rows) const {
  prefetcher_->check_layer(layer);
  const auto lock = lock_open();
  const StepLayer& step = state_->layers[static_cast<size_t>(layer)];
  const RowOwners& owners = *step.fetch->layer->table.owners;
  for (size_t s = 0; s < state_->tokens.size(); ++s) {
    rows[2 * s] = step.first_row[s];
    const bool near = !step.near.empty() && step.near[s];
    rows[2 * s + 1] = step.first_row[s] + (near ? 0 : owners.rows(state_->tokens[s]));
  }
}

std::vector<int64_t> Prefetcher::Step::near_segments(int64_t layer) const {
  prefetcher_->check_layer(layer);
  const auto lock = lock_open();
  const std::vector<bool>& near = state_->layers[static_cast<size_t>(layer)].near;
  std::vector<int64_t> segments;
  for (size_t s = 0; s < near.size(); ++s) {
    if (near[s]) segments.push_back(static_cast<int64_t>(s));
  }
  return segments;
}

void Prefetcher::Step::end(void* stream) {
  if (!prefetcher_->is_home()) return;
  std::exception_ptr error;
  {
    const std::scoped_lock lock(prefetcher_->mutex_);
    if (state_->ended) return;
    FencePtr read;
    try {
      read = prefetcher_->device_->record(stream);
    } catch (...) {  // the device failed: nothing reads the rows any more
      error = std::current_exception();
    }
    prefetcher_->end_locked(*state_, read);
  }
  prefetcher_->done_.notify_all();  // somebody may be waiting for it
  if (error) std::rethrow_exception(error);
}

std::unique_lock<std::mutex> Prefetcher::Step::lock_open() const {
  prefetcher_->check_home();
  std::unique_lock lock(prefetcher_->mutex_);
  check_open();
  return lock;
}

void Prefetcher::Step::check_open() const {
  prefetcher_->check_open();
  if (state_->ended) throw Error(ErrorCode::kRuntime, "the step has ended");
}

}  // namespace l3ext
