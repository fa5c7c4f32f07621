// A table in RAM whose reads behave as a disk's do at their worst: they take their time, are
// complete in any order, fail, or do not return until the test says so. What the runtime's side of
// the contract is (see TableReader) is counted where it is broken.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/error.hpp"
#include "runtime/table.hpp"

namespace examples {

using namespace l3ext;

struct Faults {
  int depth = 8;      // at most; a reader has this or what it was asked for
  unsigned seed = 0;  // of delays and order
  std::chrono::microseconds longest_delay{0};  // a result comes after 0 to this
  bool in_order = false;                       // else any of those on their way is next
  std::set<int64_t> failing = {};              // reads that cover one of these bytes fail
  std::set<int64_t> stalling = {};             // ... do not return before release()
  bool no_readers = false;                     // make_reader() fails
};

class FaultyTable final : public TableSource {
 public:
  // `data` outlives the table.
  FaultyTable(const void* data, Faults faults)
      : data_(static_cast<const std::byte*>(data)), faults_(std::move(faults)) {}

  std::unique_ptr<TableReader> make_reader(int depth) override {
    if (faults_.no_readers) throw Error(ErrorCode::kRuntime, "no reader can be made");
    return std::make_unique<Reader>(*this, std::min(depth, faults_.depth),
                                    faults_.seed + made_.fetch_add(1));
  }
  Error corrupt(int64_t begin, const std::string& what) const override {
    return Error::io("faulty", 0, concat("byte ", begin, ": ", what));
  }

  // What is stalled goes on, and nothing stalls any more.
  void release() {
    {
      const std::scoped_lock lock(mutex_);
      released_ = true;
    }
    changed_.notify_all();
  }
  // Blocks until `readers` readers are in complete() and have nothing but stalled reads.
  void wait_until_stalled(int readers = 1) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return stalled_ >= readers; });
  }

  int64_t reads() const { return reads_; }            // submitted so far
  int64_t readers_made() const { return made_; }      // so far
  int64_t readers_alive() const { return alive_; }    // now
  int most_on_their_way() const { return most_; }     // in one reader
  int64_t times_misused() const { return misused_; }  // stderr says how

 private:
  class Reader final : public TableReader {
   public:
    Reader(FaultyTable& table, int depth, unsigned seed)
        : table_(table), depth_(std::max(1, depth)), random_(seed) {
      ++table_.alive_;
    }
    ~Reader() override {
      table_.check(pending_.empty(), "destroyed with reads on their way");
      --table_.alive_;
    }
    int depth() const override { return depth_; }

    void submit(const Read& read) override {
      table_.check_thread(thread_);
      table_.check(std::ssize(pending_) < depth_, "more reads than its depth");
      table_.check(read.bytes > 0, "an empty read");
      table_.check(reinterpret_cast<uintptr_t>(read.scratch) % 4096 == 0, "unaligned scratch");
      for (const Read& other : pending_) {
        table_.check(read.scratch + read.bytes + TableSource::kScratchMargin <= other.scratch ||
                         other.scratch + other.bytes + TableSource::kScratchMargin <= read.scratch,
                     "a scratch that another read uses");
      }
      // As far as a disk may write; what is used before it is there shows.
      std::memset(read.scratch, 0xee,
                  static_cast<size_t>(read.bytes + TableSource::kScratchMargin));
      pending_.push_back(read);
      ++table_.reads_;
      for (int most = table_.most_; most < std::ssize(pending_);) {
        if (table_.most_.compare_exchange_weak(most, static_cast<int>(pending_.size()))) break;
      }
    }

    ReadResult complete() override {
      table_.check_thread(thread_);
      table_.check(!pending_.empty(), "asked for a result with no read on its way");
      const Read read = take();
      if (table_.faults_.longest_delay.count() > 0) {
        const auto most = static_cast<uint64_t>(table_.faults_.longest_delay.count());
        std::this_thread::sleep_for(std::chrono::microseconds(random_() % (most + 1)));
      }
      ReadResult result;
      result.tag = read.tag;
      if (covers(table_.faults_.failing, read)) {
        result.error = std::make_exception_ptr(Error::io(
            "faulty", 5, concat("cannot read ", read.bytes, " bytes at offset ", read.begin)));
        return result;
      }
      std::byte* to = read.scratch + read.begin % 4096;  // as O_DIRECT leaves it
      std::memcpy(to, table_.data_ + read.begin, static_cast<size_t>(read.bytes));
      result.data = to;
      return result;
    }

   private:
    static bool covers(const std::set<int64_t>& bytes, const Read& read) {
      const auto first = bytes.lower_bound(read.begin);
      return first != bytes.end() && *first < read.begin + read.bytes;
    }

    // The read that is complete next; waits while all of them are stalled.
    Read take() {
      std::unique_lock lock(table_.mutex_);
      std::vector<size_t> ready;
      const auto find = [&] {
        ready.clear();
        for (size_t i = 0; i < pending_.size(); ++i) {
          if (table_.released_ || !covers(table_.faults_.stalling, pending_[i])) ready.push_back(i);
        }
        return !ready.empty();
      };
      if (!find()) {
        ++table_.stalled_;
        table_.changed_.notify_all();
        table_.changed_.wait(lock, find);
        --table_.stalled_;
      }
      const size_t at = ready[table_.faults_.in_order ? 0 : random_() % ready.size()];
      const Read read = pending_[at];
      pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(at));
      return read;
    }

    FaultyTable& table_;
    int depth_;
    std::minstd_rand random_;
    std::vector<Read> pending_;  // in the order in which they came
    std::thread::id thread_;     // of the first use
  };

  void check(bool holds, const char* what) {
    if (holds) return;
    ++misused_;
    std::fprintf(stderr, "a reader was misused: %s\n", what);
  }
  void check_thread(std::thread::id& owner) {
    if (owner == std::thread::id()) owner = std::this_thread::get_id();
    check(owner == std::this_thread::get_id(), "by two threads");
  }

  const std::byte* data_;
  const Faults faults_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool released_ = false;
  int stalled_ = 0;
  std::atomic<int64_t> reads_{0}, alive_{0}, misused_{0};
  std::atomic<unsigned> made_{0};
  std::atomic<int> most_{0};
};

}  // namespace examples
