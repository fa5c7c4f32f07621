// A table in a file, read range by range.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/file_reader.hpp"
#include "runtime/table.hpp"

namespace l3ext {

// The table starts at byte `base` of the file.
class FileTable final : public TableSource {
 public:
  FileTable(std::shared_ptr<const FileReader> file, int64_t base)
      : file_(std::move(file)), base_(base) {}
  std::unique_ptr<TableReader> make_reader(int depth) override;
  Error corrupt(int64_t begin, const std::string& what) const override;

 private:
  std::shared_ptr<const FileReader> file_;
  int64_t base_;
};

class FileTableReader final : public TableReader {
 public:
  // `queue`: of this file, for `depth` reads at once.
  FileTableReader(std::shared_ptr<const FileReader> file, int64_t base, int depth,
                  std::unique_ptr<ReadQueue> queue);
  int depth() const override { return static_cast<int>(slots_.size()); }
  void submit(const Read& read) override;
  ReadResult complete() override;

 private:
  struct Slot {
    RangeRead range;
    int64_t tag = 0;
  };
  std::shared_ptr<const FileReader> file_;
  int64_t base_;
  std::vector<Slot> slots_;
  std::vector<int64_t> free_;         // slots
  std::unique_ptr<ReadQueue> queue_;  // its end waits for reads, which need the file
};

}  // namespace l3ext
