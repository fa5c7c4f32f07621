// One layer's lookup table as the runtime sees it: where its bytes come from, and which rows
// belong to which token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.hpp"
#include "core/error.hpp"

namespace l3ext {

// Which rows a token owns: rows offsets[t]..offsets[t+1] of the table.
struct RowOwners {
  std::vector<int64_t> offsets;    // [V+1], from 0, never falling
  std::vector<int64_t> frequency;  // [V], or empty where unknown

  int64_t vocab_size() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t total_rows() const { return offsets.back(); }
  int64_t rows(int64_t token) const { return offsets[token + 1] - offsets[token]; }

  // Throws kValue unless the fields above hold and the rows are `total_rows` in all.
  void check(int64_t total_rows, const std::string& name) const;
};

// One read of a table's bytes [begin, begin + bytes).
struct Read {
  int64_t begin = 0;
  int64_t bytes = 0;
  std::byte* scratch = nullptr;  // aligned to 4096, at least bytes + kScratchMargin long
  int64_t tag = 0;               // comes back with the result
};

struct ReadResult {
  int64_t tag = 0;
  const std::byte* data = nullptr;  // where byte `begin` lies: in the scratch, or in place
  std::exception_ptr error;         // kIo, with the path and the offset; null: all bytes are there
};

// Reads of one thread, many on their way at once, which may be complete in any order.
class TableReader {
 public:
  virtual ~TableReader() = default;  // none on their way
  virtual int depth() const = 0;     // reads that may be on their way at once
  // Starts a read.
  virtual void submit(const Read& read) = 0;
  // Blocks until one of them is complete, and takes it. There is at least one.
  virtual ReadResult complete() = 0;
};

// The bytes of a table, row after row. Thread-safe.
class TableSource {
 public:
  // What a scratch buffer holds beyond the bytes asked for: room to read whole pages.
  static constexpr int64_t kScratchMargin = 2 * 4096;

  virtual ~TableSource() = default;
  // Where the table lies in host memory; null: its bytes must be read.
  virtual const std::byte* memory() const { return nullptr; }
  // A reader for one thread, of this depth or less. Throws kRuntime.
  virtual std::unique_ptr<TableReader> make_reader(int depth) = 0;
  // A content error at `begin`, with the file's path and offset.
  virtual Error corrupt(int64_t begin, const std::string& what) const = 0;
};

// A source whose reads are done one by one, by the thread that asks.
class BlockingTable : public TableSource {
 public:
  std::unique_ptr<TableReader> make_reader(int depth) override;
  // Where byte `begin` lies, after reading `bytes` bytes into `scratch` if need be; throws kIo.
  virtual const std::byte* read(int64_t begin, int64_t bytes, std::byte* scratch) = 0;
};

// A table in host memory, used in place. `owner` keeps the memory alive; letting go of it may take
// locks (Python's), so the runtime does that while it holds none of its own.
class RamTable final : public BlockingTable {
 public:
  RamTable(const void* data, std::shared_ptr<void> owner)
      : data_(static_cast<const std::byte*>(data)), owner_(std::move(owner)) {}
  const std::byte* memory() const override { return data_; }
  const std::byte* read(int64_t begin, int64_t, std::byte*) override { return data_ + begin; }
  Error corrupt(int64_t begin, const std::string& what) const override {
    return Error::io("", 0, concat("table in RAM, byte ", begin, ": ", what));
  }

 private:
  const std::byte* data_;
  std::shared_ptr<void> owner_;
};

struct TableShape {
  DType dtype = DType::kFloat32;
  int64_t d_in = 0;   // key columns
  int64_t d_emb = 0;  // value columns
  bool tied = false;  // values are the keys: d_emb == d_in, stored once
  int64_t width() const { return tied ? d_in : d_in + d_emb; }
  // A quantised row: its elements, from the next multiple of 4 bytes a float32 scale of the keys
  // and one of the values (tied: one in all), filled up to whole 16 bytes. So a token's block stays
  // one contiguous range with everything in it.
  int64_t row_bytes() const {
    if (!is_quantized(dtype)) return width() * static_cast<int64_t>(dtype_bytes(dtype));
    return ((width() + 3) / 4 * 4 + (tied ? 4 : 8) + 15) / 16 * 16;
  }
  bool operator==(const TableShape&) const = default;

  // Throws kValue or kType unless this is a floating-point or quantised table of at least one
  // column.
  void check(const std::string& name) const;
};

struct Table {
  TableShape shape;
  std::shared_ptr<const RowOwners> owners;
  std::shared_ptr<TableSource> source;
  std::vector<uint32_t> checksums;  // CRC-32C of each token's block [V]; empty: not verified
};

// CRC-32C of each token's block of a table in memory.
std::vector<uint32_t> block_checksums(const void* data, int64_t row_bytes, const RowOwners& owners);

}  // namespace l3ext
