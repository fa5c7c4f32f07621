#include "runtime/file_table.hpp"

#include <algorithm>
#include <exception>
#include <numeric>
#include <utility>

#include "core/error.hpp"

namespace l3ext {

std::unique_ptr<TableReader> FileTable::make_reader(int depth) {
  // Far more than any disk needs, and as many as io_uring allows.
  depth = std::clamp(depth, 1, 4096);
  return std::make_unique<FileTableReader>(file_, base_, depth, file_->make_queue(depth));
}

Error FileTable::corrupt(int64_t begin, const std::string& what) const {
  return Error::io(file_->path(), 0, concat("offset ", base_ + begin, ": ", what));
}

FileTableReader::FileTableReader(std::shared_ptr<const FileReader> file, int64_t base, int depth,
                                 std::unique_ptr<ReadQueue> queue)
    : file_(std::move(file)),
      base_(base),
      slots_(static_cast<size_t>(depth)),
      free_(static_cast<size_t>(depth)),
      queue_(std::move(queue)) {
  std::iota(free_.begin(), free_.end(), int64_t{0});
}

void FileTableReader::submit(const Read& read) {
  const int64_t slot = free_.back();
  slots_[slot] = {RangeRead(*file_, base_ + read.begin, read.bytes, read.scratch), read.tag};
  queue_->push(slots_[slot].range.next(slot));
  free_.pop_back();
}

ReadResult FileTableReader::complete() {
  while (true) {
    const RawResult raw = queue_->pop();
    Slot& slot = slots_[raw.tag];
    ReadResult result;
    result.tag = slot.tag;
    try {
      if (!slot.range.advance(raw.result)) {
        queue_->push(slot.range.next(raw.tag));
        continue;
      }
      result.data = slot.range.data();
    } catch (...) {
      result.error = std::current_exception();
    }
    free_.push_back(raw.tag);
    return result;
  }
}

}  // namespace l3ext
