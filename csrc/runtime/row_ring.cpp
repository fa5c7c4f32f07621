#include "runtime/row_ring.hpp"

namespace l3ext {

std::optional<RowRing::Run> RowRing::allocate(int64_t rows) {
  int64_t begin = 0;
  if (!slots_.empty()) {
    const int64_t head = slots_.back().end;
    const int64_t tail = slots_.front().begin;
    const bool wrapped = slots_.back().begin < tail;
    if (wrapped) {
      if (rows > tail - head) return std::nullopt;
      begin = head;
    } else if (rows <= rows_ - head) {
      begin = head;
    } else if (rows <= tail) {
      begin = 0;  // the rest of the buffer's end stays unused this time round
    } else {
      return std::nullopt;
    }
  } else if (rows > rows_) {
    return std::nullopt;
  }
  slots_.push_back({begin, begin + rows, false});
  return Run{begin, first_ticket_ + static_cast<int64_t>(slots_.size()) - 1};
}

void RowRing::release(const Run& run) {
  slots_[static_cast<size_t>(run.ticket - first_ticket_)].released = true;
  while (!slots_.empty() && slots_.front().released) {
    slots_.pop_front();
    ++first_ticket_;
  }
}

}  // namespace l3ext
