// Hands out contiguous runs of rows of a circular buffer. Runs may be released in any order; space
// is reused in the order in which it was handed out, once everything before it is released.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>

namespace l3ext {

class RowRing {
 public:
  explicit RowRing(int64_t rows = 0) : rows_(rows) {}

  struct Run {
    int64_t begin = 0;  // row in [0, rows())
    int64_t ticket = 0;
  };
  // `rows` (at least 1) contiguous rows, or nothing where they are not free.
  std::optional<Run> allocate(int64_t rows);
  void release(const Run& run);

  int64_t rows() const { return rows_; }

 private:
  struct Slot {
    int64_t begin;
    int64_t end;
    bool released;
  };
  int64_t rows_;
  std::deque<Slot> slots_;    // oldest first
  int64_t first_ticket_ = 0;  // of slots_.front()
};

}  // namespace l3ext
