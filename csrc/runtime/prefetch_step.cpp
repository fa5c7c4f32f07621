// The life of a step: begin, wait, end.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "core/error.hpp"
#include "runtime/prefetcher_state.hpp"

namespace l3ext {

Prefetcher::Step Prefetcher::begin(const std::shared_ptr<Prefetcher>& self,
                                   std::span<const int32_t> token_ids) {
  self->check_process();
  auto state = std::make_shared<StepState>();
  state->record.begin_ns = self->ledger_->now();
  for (size_t i = 0; i < token_ids.size(); ++i) {
    L3EXT_CHECK(token_ids[i] >= 0 && token_ids[i] < self->vocab_size_, "token_ids[", i,
                "]: expected an id in [0, ", self->vocab_size_, "), got ", token_ids[i]);
  }
  std::vector<int32_t>& tokens = state->tokens;
  tokens.assign(token_ids.begin(), token_ids.end());
  const auto not_ascending = [](int32_t a, int32_t b) { return a >= b; };
  if (std::adjacent_find(tokens.begin(), tokens.end(), not_ascending) != tokens.end()) {
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  }
  for (const auto& layer : self->layers_) state->fetches.push_back(count(*layer, tokens));

  // From here on the handle gives back what was taken, whatever happens.
  Step step(self, state);
  {
    const std::scoped_lock lock(self->mutex_);
    self->check_open();
    self->open_steps_.insert(state.get());
    for (const auto& fetch : state->fetches) self->take_rows(*fetch);
  }
  for (const auto& fetch : state->fetches) place(*fetch, tokens, self->device_);
  {
    const std::scoped_lock lock(self->mutex_);
    if (state->ended) self->check_open();  // closed meanwhile
    state->record.step = self->next_step_++;
    for (const auto& fetch : state->fetches) self->enqueue(fetch);
    state->queued = true;
  }
  self->work_.notify_all();
  return step;
}

// What the ledger says of one layer, known before anything is fetched.
std::shared_ptr<Prefetcher::Fetch> Prefetcher::count(Layer& layer,
                                                     std::span<const int32_t> tokens) {
  auto fetch = std::make_shared<Fetch>();
  fetch->layer = &layer;
  LayerRecord& record = fetch->record;
  record.tokens = static_cast<int64_t>(tokens.size());
  for (const int32_t token : tokens) {
    const int64_t rows = layer.table.owners->rows(token);
    const bool hit = layer.hot.row[token] >= 0;
    record.rows += rows;
    record.hits += hit;
    (hit ? record.hit_bytes : record.bytes) += rows * layer.row_bytes;
  }
  return fetch;
}

void Prefetcher::take_rows(Fetch& fetch) {
  Layer& layer = *fetch.layer;
  fetch.target = layer.arena;
  if (fetch.record.bytes == 0) return;
  fetch.run = layer.ring.allocate(fetch.record.bytes / layer.row_bytes);
  fetch.record.spilled = !fetch.run.has_value();
}

// Decides where every token's rows lie in the target, and what has to be copied for that.
void Prefetcher::place(Fetch& fetch, std::span<const int32_t> tokens,
                       const std::shared_ptr<Device>& device) {
  const Layer& layer = *fetch.layer;
  const RowOwners& owners = *layer.table.owners;
  const bool spilled = fetch.record.spilled;
  int64_t next_row = 0;
  if (spilled) {
    fetch.target = std::make_shared<DeviceBuffer>(
        device, static_cast<size_t>(fetch.record.rows * layer.row_bytes));
  } else if (fetch.run) {
    next_row = layer.hot.rows + fetch.run->begin;
  }
  fetch.first_row.reserve(tokens.size());
  for (const int32_t token : tokens) {
    const int64_t hot_row = layer.hot.row[token];
    if (hot_row >= 0 && !spilled) {
      fetch.first_row.push_back(hot_row);
      continue;
    }
    const int64_t rows = owners.rows(token);
    fetch.first_row.push_back(next_row);
    fetch.blocks.push_back({token,
                            (hot_row >= 0 ? hot_row : owners.offsets[token]) * layer.row_bytes,
                            next_row * layer.row_bytes, rows * layer.row_bytes, hot_row >= 0});
    next_row += rows;
  }
}

void Prefetcher::enqueue(const std::shared_ptr<Fetch>& fetch) {
  fetch->pieces = plan_fetch(fetch->blocks, options_.piece_bytes);
  fetch->part_checksums.resize(fetch->pieces.size());
  fetch->record.spans.reserve(static_cast<size_t>(options_.num_workers));  // leave() cannot fail
  if (fetch->pieces.empty()) {
    fetch->complete = true;
  } else {
    queue_.push_back(fetch);
  }
}

void Prefetcher::end_locked(StepState& step) {
  if (step.ended) return;
  step.ended = true;
  open_steps_.erase(&step);
  step.record.end_ns = ledger_->now();
  for (const auto& fetch : step.fetches) {
    fetch->record.cancelled = !fetch->complete;
    fetch->cancel_rest();
    if (fetch->active > 0) {
      fetch->abandoned = true;
    } else {
      fetch->complete = true;
      give_back(*fetch);
    }
  }
  if (!step.queued) return;
  for (const auto& fetch : step.fetches) step.record.layers.push_back(fetch->record);
  ledger_->add(std::move(step.record));
}

void Prefetcher::give_back(Fetch& fetch) {
  const Layer& layer = *fetch.layer;
  if (options_.poison && fetch.target) {
    if (fetch.record.spilled) {
      fetch.target->fill(0xff, 0, fetch.target->bytes());
    } else if (fetch.run) {
      fetch.target->fill(0xff,
                         static_cast<size_t>((layer.hot.rows + fetch.run->begin) * layer.row_bytes),
                         static_cast<size_t>(fetch.record.bytes));
    }
  }
  if (fetch.run) fetch.layer->ring.release(*fetch.run);
  fetch.run.reset();
  fetch.target.reset();
}

// --- the handle --------------------------------------------------------------------------------

Prefetcher::Step::~Step() {
  if (!state_ || prefetcher_->process_ != ::getpid()) return;
  try {
    end();
  } catch (...) {
    return;  // no memory for the ledger's record; the rows were given back before
  }
}

std::span<const int32_t> Prefetcher::Step::tokens() const { return state_->tokens; }

void Prefetcher::Step::wait(int64_t layer, const std::function<bool()>& interrupted) {
  Prefetcher& prefetcher = *prefetcher_;
  prefetcher.check_process();
  prefetcher.check_layer(layer);
  Fetch& fetch = *state_->fetches[layer];
  const Ledger& ledger = *prefetcher.ledger_;
  const int64_t begin = ledger.now();
  int64_t exposed = 0;
  std::unique_lock lock(prefetcher.mutex_);
  while (true) {
    check_open();
    if (fetch.complete) break;
    const int64_t blocked = ledger.now();
    const auto status = prefetcher.done_.wait_for(lock, std::chrono::milliseconds(100));
    exposed += ledger.now() - blocked;
    if (status == std::cv_status::timeout && interrupted) {
      lock.unlock();  // the hook may need other locks (Python's)
      if (interrupted()) throw Error(ErrorCode::kInterrupted, "interrupted");
      lock.lock();
    }
  }
  LayerRecord& record = fetch.record;
  if (record.wait_end_ns == 0) record.wait_begin_ns = begin;
  record.wait_end_ns = ledger.now();
  record.exposed_ns += exposed;
  if (fetch.error) std::rethrow_exception(fetch.error);
}

void Prefetcher::Step::segment_rows(int64_t layer, int64_t* rows) const {
  prefetcher_->check_layer(layer);
  const std::scoped_lock lock(prefetcher_->mutex_);
  check_open();
  const Fetch& fetch = *state_->fetches[layer];
  const RowOwners& owners = *fetch.layer->table.owners;
  for (size_t s = 0; s < state_->tokens.size(); ++s) {
    rows[2 * s] = fetch.first_row[s];
    rows[2 * s + 1] = fetch.first_row[s] + owners.rows(state_->tokens[s]);
  }
}

std::shared_ptr<DeviceBuffer> Prefetcher::Step::spill(int64_t layer) const {
  prefetcher_->check_layer(layer);
  const std::scoped_lock lock(prefetcher_->mutex_);
  check_open();
  const Fetch& fetch = *state_->fetches[layer];
  return fetch.record.spilled ? fetch.target : nullptr;
}

void Prefetcher::Step::end() {
  prefetcher_->check_process();
  {
    const std::scoped_lock lock(prefetcher_->mutex_);
    prefetcher_->end_locked(*state_);
  }
  prefetcher_->done_.notify_all();  // somebody may be waiting for it
}

void Prefetcher::Step::check_open() const {
  prefetcher_->check_open();
  if (state_->ended) throw Error(ErrorCode::kRuntime, "the step has ended");
}

}  // namespace l3ext
