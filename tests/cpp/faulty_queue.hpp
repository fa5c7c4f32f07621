// A ReadQueue whose system is unkind: it hides a part of what another queue read, interrupts, fails
// at given places, and hands out results late and in any order.
#pragma once

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/read_queue.hpp"

namespace examples {

using namespace l3ext;

class FaultyQueue final : public ReadQueue {
 public:
  struct Faults {
    unsigned seed = 0;
    bool shorten = false;    // reads come back short, cut anywhere
    bool interrupt = false;  // reads come back with EINTR or EAGAIN
    std::chrono::microseconds longest_delay{0};
    std::set<int64_t> failing = {};  // a read that covers one of these bytes of the file: EIO
  };

  FaultyQueue(std::unique_ptr<ReadQueue> queue, Faults faults)
      : queue_(std::move(queue)), faults_(std::move(faults)), random_(faults_.seed) {}

  void push(const RawRead& read) override {
    int64_t tag = 0;
    while (reads_.size() > static_cast<size_t>(tag) && reads_[tag].to != nullptr) ++tag;
    if (reads_.size() == static_cast<size_t>(tag)) reads_.emplace_back();
    reads_[tag] = read;
    queue_->push({read.to, read.bytes, read.offset, tag});
    ++open_;
  }

  RawResult pop() override {
    while (open_ > 0 && (held_.empty() || random_() % 2 == 0)) {
      held_.push_back(queue_->pop());
      --open_;
    }
    if (faults_.longest_delay.count() > 0) {
      std::this_thread::sleep_for(
          std::chrono::microseconds(random_() % (faults_.longest_delay.count() + 1)));
    }
    const size_t at = random_() % held_.size();
    const RawResult raw = held_[at];
    held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(at));
    const RawRead read = std::exchange(reads_[raw.tag], {});
    return {read.tag, spoil(read, raw.result)};
  }

 private:
  int64_t spoil(const RawRead& read, int64_t result) {
    const auto bad = faults_.failing.lower_bound(read.offset);
    if (bad != faults_.failing.end() && *bad < read.offset + static_cast<int64_t>(read.bytes)) {
      return -EIO;
    }
    if (result <= 0) return result;
    int64_t kept = result;
    if (faults_.interrupt && random_() % 3 == 0) {
      kept = random_() % 2 == 0 ? -EINTR : -EAGAIN;
    } else if (faults_.shorten && random_() % 3 != 0) {
      kept = 1 + static_cast<int64_t>(random_() % static_cast<uint64_t>(result));
    }
    // What was not read must not be there.
    const int64_t good = std::max<int64_t>(kept, 0);
    std::memset(read.to + good, 0xee, static_cast<size_t>(result - good));
    return kept;
  }

  std::unique_ptr<ReadQueue> queue_;
  const Faults faults_;
  std::minstd_rand random_;
  std::vector<RawRead> reads_;   // by our tag; null: free
  std::vector<RawResult> held_;  // read, and not handed out
  int open_ = 0;
};

}  // namespace examples
