// One file holds all tables of a model: a safetensors file (any safetensors reader opens it) in
// which
//   layers.{i}.table      [v, width]  row-interleaved keys and values; starts at a multiple of
//   4096;
//                                     quantised: U8 [v, row_bytes], see TableShape
//   layers.{i}.offsets    I64 [V+1]   rows of token t: offsets[t]..offsets[t+1]
//   layers.{i}.crc32c     U32 [V]     checksum of each token's block
//   layers.{i}.frequency  I64 [V]     where known
//   padding.{n}           U8          what keeps the tables aligned (the format allows no holes)
// and the metadata names the format, each table's widths and the dtype of a quantised one, and
// carries a checksum over all of that but the rows, which have their own.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "runtime/file_reader.hpp"
#include "runtime/mapped_file.hpp"
#include "runtime/table.hpp"

namespace l3ext {

// A table to write: `data` holds owners->total_rows() rows of shape.row_bytes() in host memory.
struct TableData {
  TableShape shape;
  std::shared_ptr<const RowOwners> owners;
  const void* data = nullptr;
};

// Writes atomically: on any failure (disk full, interrupt) the old file stays as it was. Streams:
// needs 4 bytes of memory for each token beyond the tables. `interrupted` is asked now and then
// and stops the writing with kInterrupted. Throws kIo, kValue, kInterrupted.
void write_table_file(const std::string& path, std::span<const TableData> tables,
                      const std::function<bool()>& interrupted = {});

// An open table file. Everything but the rows is read and checked on opening; rows are read, and
// checked against their checksums, when they are fetched.
class TableFile {
 public:
  // Throws kIo: unreadable, foreign, cut short, or of another version; kRuntime: kUring where
  // there is no io_uring.
  TableFile(const std::string& path, DirectIo direct_io, IoEngine engine = IoEngine::kAuto);

  const std::string& path() const { return reader_->path(); }
  int64_t size() const { return reader_->size(); }
  bool direct() const { return reader_->direct(); }
  // "io_uring" or "pread": how rows are read. kAuto falls back to pread where the kernel has no
  // io_uring, and where it has none left when a reader is made.
  const char* io_engine() const { return reader_->uring() ? "io_uring" : "pread"; }
  // The tables hold the open file: they outlive this object.
  const std::vector<Table>& tables() const { return tables_; }

 private:
  std::shared_ptr<FileReader> reader_;
  std::vector<Table> tables_;
};

// The tables of a table file, mapped: in host memory, one copy for all processes that map it.
struct MappedTables {
  std::shared_ptr<const MappedFile> file;
  std::vector<Table> tables;  // hold the mapping: they outlive this object
};

// Everything but the rows is checked on opening; rows are, where the tables' checksums are kept,
// when they are fetched. Throws as TableFile, and what MappedFile throws.
MappedTables map_table_file(const std::string& path, const MapOptions& options = {});

}  // namespace l3ext
