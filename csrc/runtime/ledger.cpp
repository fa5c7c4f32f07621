#include "runtime/ledger.hpp"

#include <algorithm>
#include <utility>

#include "core/atomic_file.hpp"
#include "core/error.hpp"

namespace l3ext {
namespace {

// Trace lanes ("threads"): workers from 1000 on, then two lanes for each concurrent step.
constexpr int kWorkerLane = 1000;

// With three decimals, and in whole numbers: %f would follow the program's locale.
std::string microseconds(int64_t ns) {
  const std::string decimals = concat(1000 + ns % 1000);
  return concat(ns / 1000, ".", decimals.substr(1));
}

class TraceWriter {
 public:
  explicit TraceWriter(const std::string& path) : file_(path) {
    put("{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n");
  }
  void name_lane(int lane, const std::string& name) {
    put(concat("{\"ph\":\"M\",\"pid\":1,\"tid\":", lane,
               ",\"name\":\"thread_name\",\"args\":{\"name\":\"", name, "\"}},\n"));
  }
  void span(const char* name, int64_t step, int64_t layer, int lane, int64_t begin_ns,
            int64_t end_ns, int64_t bytes) {
    put(concat("{\"ph\":\"X\",\"pid\":1,\"tid\":", lane, ",\"cat\":\"", name, "\",\"name\":\"",
               name, " layer ", layer, "\",\"ts\":", microseconds(begin_ns),
               ",\"dur\":", microseconds(end_ns - begin_ns), ",\"args\":{\"step\":", step,
               ",\"layer\":", layer, ",\"bytes\":", bytes, "}},\n"));
  }
  void commit() {
    put("{\"ph\":\"M\",\"pid\":1,\"tid\":0,\"name\":\"process_name\","
        "\"args\":{\"name\":\"l3ext\"}}\n]}\n");
    file_.commit();
  }

 private:
  void put(const std::string& text) { file_.write(text.data(), text.size()); }
  AtomicFile file_;
};

// The steps in the order in which they began, each on the first lane that is free by then: spans of
// one lane never overlap.
std::vector<int> assign_lanes(std::vector<StepRecord>& steps) {
  std::sort(steps.begin(), steps.end(),
            [](const auto& a, const auto& b) { return a.begin_ns < b.begin_ns; });
  std::vector<int> lanes;
  std::vector<int64_t> free_from;
  for (const StepRecord& step : steps) {
    size_t lane = 0;
    while (lane < free_from.size() && free_from[lane] > step.begin_ns) ++lane;
    if (lane == free_from.size()) free_from.push_back(0);
    free_from[lane] = step.end_ns;
    lanes.push_back(static_cast<int>(lane));
  }
  return lanes;
}

}  // namespace

void LayerRecord::time_fetch() {
  for (const WorkerSpan& span : spans) {
    const bool first = &span == &spans.front();
    fetch_begin_ns = first ? span.begin_ns : std::min(fetch_begin_ns, span.begin_ns);
    fetch_end_ns = std::max(fetch_end_ns, span.end_ns);
  }
}

void Ledger::add(StepRecord record) {
  const auto held = lock();
  ++totals_.steps;
  for (const LayerRecord& layer : record.layers) {
    totals_.tokens += layer.tokens;
    totals_.rows += layer.rows;
    totals_.bytes += layer.bytes;
    totals_.hits += layer.hits;
    totals_.hit_bytes += layer.hit_bytes;
    totals_.reused += layer.reused;
    totals_.reused_bytes += layer.reused_bytes;
    totals_.in_place_bytes += layer.in_place_bytes;
    totals_.near += layer.near;
    totals_.near_bytes += layer.near_bytes;
    totals_.spilled += layer.spilled;
    totals_.fetch_ns += layer.fetch_end_ns - layer.fetch_begin_ns;
    totals_.exposed_ns += layer.exposed_ns;
  }
  steps_.push_back(std::move(record));
  if (static_cast<int64_t>(steps_.size()) <= capacity_) return;
  settle();
  for (const LayerRecord& layer : steps_.front().layers) {
    stalls_.insert(stalls_.end(), layer.stalls.begin(), layer.stalls.end());
  }
  steps_.pop_front();
  if (settled_ > 0) --settled_;
}

void Ledger::settle() const {
  const auto settled = [&](const std::shared_ptr<Stall>& stall, int64_t& exposed_ns) {
    const std::optional<int64_t> ns = stall->ns();
    exposed_ns += ns.value_or(0);
    return ns.has_value();
  };
  for (size_t i = settled_; i < steps_.size(); ++i) {
    bool all = i == settled_;  // what is settled once is not looked at in every step
    for (LayerRecord& layer : steps_[i].layers) {
      const int64_t before = layer.exposed_ns;
      std::erase_if(layer.stalls,
                    [&](const auto& stall) { return settled(stall, layer.exposed_ns); });
      totals_.exposed_ns += layer.exposed_ns - before;
      all = all && layer.stalls.empty();
    }
    if (all) ++settled_;
  }
  std::erase_if(stalls_, [&](const auto& stall) { return settled(stall, totals_.exposed_ns); });
}

std::unique_lock<std::mutex> Ledger::lock() const {
  home_.check("ledger");
  return std::unique_lock(mutex_);
}

void Ledger::clear() {
  const auto held = lock();
  steps_.clear();
  settled_ = 0;
  stalls_.clear();
  totals_ = {};
}

std::vector<StepRecord> Ledger::steps() const {
  const auto held = lock();
  settle();
  return {steps_.begin(), steps_.end()};
}

LedgerTotals Ledger::totals() const {
  const auto held = lock();
  settle();
  return totals_;
}

void Ledger::write_chrome_trace(const std::string& path) const {
  std::vector<StepRecord> steps = this->steps();
  const std::vector<int> lanes = assign_lanes(steps);
  int workers = 0;
  int step_lanes = 0;
  TraceWriter trace(path);
  for (size_t i = 0; i < steps.size(); ++i) {
    const StepRecord& step = steps[i];
    const int compute_lane = 2 * lanes[i] + 1;
    step_lanes = std::max(step_lanes, lanes[i] + 1);

    std::vector<std::pair<int64_t, int64_t>> waits;  // (begin, layer)
    for (int64_t layer = 0; layer < std::ssize(step.layers); ++layer) {
      const LayerRecord& record = step.layers[layer];
      for (const WorkerSpan& span : record.spans) {
        workers = std::max(workers, span.worker + 1);
        trace.span("fetch", step.step, layer, kWorkerLane + span.worker, span.begin_ns, span.end_ns,
                   record.bytes);
      }
      if (record.wait_end_ns != 0) waits.emplace_back(record.wait_begin_ns, layer);
    }
    // Between two waits the caller computes; what comes before a layer's wait is named after it.
    std::sort(waits.begin(), waits.end());
    int64_t reached = step.begin_ns;
    for (const auto& [begin, layer] : waits) {
      const LayerRecord& record = step.layers[layer];
      const int64_t wait_begin = std::max(begin, reached);
      const int64_t wait_end = std::max(record.wait_end_ns, wait_begin);
      trace.span("compute", step.step, layer, compute_lane, reached, wait_begin, 0);
      trace.span("wait", step.step, layer, compute_lane + 1, wait_begin, wait_end, record.bytes);
      reached = wait_end;
    }
    trace.span("compute", step.step, std::ssize(step.layers), compute_lane, reached,
               std::max(step.end_ns, reached), 0);
  }
  for (int lane = 0; lane < step_lanes; ++lane) {
    trace.name_lane(2 * lane + 1, concat("compute ", lane));
    trace.name_lane(2 * lane + 2, concat("wait ", lane));
  }
  for (int worker = 0; worker < workers; ++worker) {
    trace.name_lane(kWorkerLane + worker, concat("fetch worker ", worker));
  }
  trace.commit();
}

}  // namespace l3ext
