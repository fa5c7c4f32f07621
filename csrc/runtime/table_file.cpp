#include "runtime/table_file.hpp"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>
#include <utility>

#include "core/atomic_file.hpp"
#include "core/checksum.hpp"
#include "runtime/file_table.hpp"
#include "runtime/safetensors_header.hpp"

namespace l3ext {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

constexpr int64_t kAlignment = FileReader::kAlignment;
constexpr int64_t kMaxHeaderBytes = int64_t{16} << 20;
constexpr int64_t kMaxLayers = 4096;
constexpr const char* kFormat = "l3ext.tables";
constexpr const char* kVersion = "1";

// The checksum of everything but the rows: shapes, owners, the rows' own checksums. As those stand
// for the rows, it identifies the whole content.
uint32_t content_checksum(uint32_t crc, int64_t layer, const TableShape& shape,
                          const RowOwners& owners, const std::vector<uint32_t>& checksums) {
  const std::string text =
      concat("layer ", layer, " ", dtype_name(shape.dtype), " d_in ", shape.d_in, " d_emb ",
             shape.d_emb, " tied ", shape.tied, " vocab ", owners.vocab_size(), " frequency ",
             !owners.frequency.empty(), "\n");
  crc = crc32c(text.data(), text.size(), crc);
  crc = crc32c(owners.offsets.data(), owners.offsets.size() * 8, crc);
  crc = crc32c(owners.frequency.data(), owners.frequency.size() * 8, crc);
  return crc32c(checksums.data(), checksums.size() * 4, crc);
}

// Of a row as the file's header describes it.
int64_t stored_columns(const TableShape& shape) {
  return is_quantized(shape.dtype) ? shape.row_bytes() : shape.width();
}

std::string layer_key(int64_t layer, const char* field) {
  return concat("layers.", layer, ".", field);
}

// Lays the tensors out one after another and remembers what to write.
class Layout {
 public:
  void add(const std::string& name, const char* dtype, std::vector<int64_t> shape, const void* data,
           int64_t bytes) {
    header.tensors[name] = {dtype, std::move(shape), end_, end_ + bytes};
    parts.emplace_back(data, bytes);
    end_ += bytes;
  }
  void align() {
    static constexpr std::byte kZeros[kAlignment] = {};
    const int64_t bytes = (kAlignment - end_ % kAlignment) % kAlignment;
    if (bytes > 0) add(concat("padding.", paddings_++), "U8", {bytes}, kZeros, bytes);
  }

  SafetensorsHeader header;
  std::vector<std::pair<const void*, int64_t>> parts;

 private:
  int64_t end_ = 0;
  int paddings_ = 0;
};

class MappedTable final : public BlockingTable {
 public:
  MappedTable(std::shared_ptr<const MappedFile> file, int64_t base)
      : file_(std::move(file)), base_(base) {}
  const std::byte* memory() const override { return file_->data() + base_; }
  const std::byte* read(int64_t begin, int64_t, std::byte*) override { return memory() + begin; }
  Error corrupt(int64_t begin, const std::string& what) const override {
    return Error::io(file_->file().path(), 0, concat("offset ", base_ + begin, ": ", what));
  }

 private:
  std::shared_ptr<const MappedFile> file_;
  int64_t base_;
};

// Reads what the header describes, with every claim checked before it is used.
class Opener {
 public:
  explicit Opener(std::shared_ptr<const FileReader> reader,
                  std::shared_ptr<const MappedFile> mapped = nullptr)
      : reader_(std::move(reader)), mapped_(std::move(mapped)), path_(reader_->path()) {}

  std::vector<Table> open() {
    read_header();
    const int64_t layers = number("layers");
    if (layers < 1 || layers > kMaxLayers)
      fail(concat("metadata.layers: expected 1 to ", kMaxLayers));
    std::vector<Table> tables;
    uint32_t crc = 0;
    for (int64_t layer = 0; layer < layers; ++layer) {
      tables.push_back(read_table(layer));
      const Table& table = tables.back();
      crc = content_checksum(crc, layer, table.shape, *table.owners, table.checksums);
    }
    if (concat(crc) != metadata("content_crc32c")) {
      fail("the checksum over offsets, frequencies and block checksums does not match");
    }
    for (int64_t layer = 0; layer < layers; ++layer) check_owners(layer, tables[layer]);
    share_equal_owners(tables);
    return tables;
  }

 private:
  void read_header() {
    if (reader_->size() < 8) fail(concat("expected a table file, got ", reader_->size(), " bytes"));
    uint64_t length = 0;
    copy(0, 8, &length);
    if (length < 2 || length > static_cast<uint64_t>(kMaxHeaderBytes) ||
        static_cast<int64_t>(length) > reader_->size() - 8) {
      fail(concat("expected a header of 2 to ", kMaxHeaderBytes, " bytes within the file, got ",
                  length, ": no table file, or cut short"));
    }
    std::string json(length, '\0');
    copy(8, static_cast<int64_t>(length), json.data());
    header_ = parse_safetensors_header(json, path_);
    data_begin_ = 8 + static_cast<int64_t>(length);
    if (metadata("format") != kFormat) {
      fail(concat("expected format '", kFormat, "', got '", metadata("format"), "'"));
    }
    if (metadata("version") != kVersion) {
      fail(concat("expected version ", kVersion, ", got '", metadata("version"), "'"));
    }
    check_safetensors_layout(header_, reader_->size() - data_begin_, path_);
  }

  Table read_table(int64_t layer) {
    const std::string key = layer_key(layer, "table");
    const TensorEntry& rows = tensor(key);
    const TensorEntry& checksums = tensor(layer_key(layer, "crc32c"));
    Table table;
    table.shape.dtype =
        rows.dtype == "U8" ? quantized_dtype(layer) : dtype_from_safetensors(rows.dtype, path_);
    table.shape.d_in = number(layer_key(layer, "d_in"));
    table.shape.d_emb = number(layer_key(layer, "d_emb"));
    const std::string& tied = metadata(layer_key(layer, "tied"));
    table.shape.tied = tied == "true";
    if (tied != "true" && tied != "false") fail(concat(key, ": expected tied true or false"));
    try {
      table.shape.check(key);
    } catch (const Error& error) {
      fail(error.what());
    }
    if (rows.shape.size() != 2 || rows.shape[1] != stored_columns(table.shape)) {
      fail(concat(key, ": expected shape [v, ", stored_columns(table.shape), "]"));
    }
    const int64_t begin = data_begin_ + rows.begin;
    if (begin % kAlignment != 0)
      fail(concat(key, ": expected an offset divisible by ", kAlignment));

    auto owners = std::make_shared<RowOwners>();
    if (checksums.shape.size() != 1) fail(concat(key, ": expected crc32c of shape [V]"));
    const int64_t vocab = checksums.shape[0];
    owners->offsets = vector<int64_t>(layer_key(layer, "offsets"), "I64", vocab + 1);
    if (header_.tensors.contains(layer_key(layer, "frequency"))) {
      owners->frequency = vector<int64_t>(layer_key(layer, "frequency"), "I64", vocab);
    }
    table.checksums = vector<uint32_t>(layer_key(layer, "crc32c"), "U32", vocab);
    table.owners = std::move(owners);
    if (mapped_) {
      table.source = std::make_shared<MappedTable>(mapped_, begin);
    } else {
      table.source = std::make_shared<FileTable>(reader_, begin);
    }
    return table;
  }

  DType quantized_dtype(int64_t layer) {
    const std::string& name = metadata(layer_key(layer, "dtype"));
    if (const auto dtype = l3ext::quantized_dtype(name)) return *dtype;
    fail(concat("metadata.", layer_key(layer, "dtype"),
                ": expected float8_e4m3fn or int8 for a table of U8, got '", name, "'"));
  }

  // After the checksum: what a damaged file and what a wrong writer did are told apart.
  void check_owners(int64_t layer, const Table& table) {
    const int64_t rows = tensor(layer_key(layer, "table")).shape[0];
    try {
      table.owners->check(rows, concat("layers.", layer));
    } catch (const Error& error) {
      fail(error.what());
    }
  }

  static void share_equal_owners(std::vector<Table>& tables) {
    for (size_t i = 1; i < tables.size(); ++i) {
      const RowOwners& previous = *tables[i - 1].owners;
      if (tables[i].owners->offsets == previous.offsets &&
          tables[i].owners->frequency == previous.frequency) {
        tables[i].owners = tables[i - 1].owners;
      }
    }
  }

  template <typename T>
  std::vector<T> vector(const std::string& name, const char* dtype, int64_t length) {
    const TensorEntry& entry = tensor(name);
    if (entry.dtype != dtype || entry.shape != std::vector<int64_t>{length}) {
      fail(concat(name, ": expected ", dtype, " [", length, "]"));
    }
    std::vector<T> values(static_cast<size_t>(length));  // the layout check bounds it by the file
    copy(data_begin_ + entry.begin, length * static_cast<int64_t>(sizeof(T)), values.data());
    return values;
  }

  // Copies a range of the file through an aligned buffer.
  void copy(int64_t begin, int64_t bytes, void* target) {
    constexpr int64_t kChunk = int64_t{1} << 20;
    if (!scratch_) {
      scratch_.reset(static_cast<std::byte*>(
          ::operator new(kChunk + TableSource::kScratchMargin, std::align_val_t{kAlignment})));
    }
    auto* to = static_cast<std::byte*>(target);
    for (int64_t done = 0; done < bytes; done += kChunk) {
      const int64_t chunk = std::min(kChunk, bytes - done);
      std::memcpy(to + done, reader_->read(begin + done, chunk, scratch_.get()),
                  static_cast<size_t>(chunk));
    }
  }

  const TensorEntry& tensor(const std::string& name) {
    const auto found = header_.tensors.find(name);
    if (found == header_.tensors.end()) fail(concat("expected a tensor '", name, "', got none"));
    return found->second;
  }
  const std::string& metadata(const std::string& key) {
    const auto found = header_.metadata.find(key);
    if (found == header_.metadata.end()) {
      fail(concat("expected metadata '", key, "', got none: no table file"));
    }
    return found->second;
  }
  int64_t number(const std::string& key) {
    const std::string& text = metadata(key);
    int64_t value = -1;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc{} || end != text.data() + text.size() || value < 0) {
      fail(concat("metadata.", key, ": expected a number, got '", text, "'"));
    }
    return value;
  }
  [[noreturn]] void fail(const std::string& message) const { throw Error::io(path_, 0, message); }

  struct AlignedDelete {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
  };

  std::shared_ptr<const FileReader> reader_;
  std::shared_ptr<const MappedFile> mapped_;
  const std::string& path_;
  SafetensorsHeader header_;
  int64_t data_begin_ = 0;
  std::unique_ptr<std::byte, AlignedDelete> scratch_;
};

}  // namespace

void write_table_file(const std::string& path, std::span<const TableData> tables,
                      const std::function<bool()>& interrupted) {
  L3EXT_CHECK(!tables.empty() && std::ssize(tables) <= kMaxLayers, "tables: expected 1 to ",
              kMaxLayers, " tables, got ", tables.size());
  const auto stop_if_interrupted = [&] {
    if (interrupted && interrupted()) throw Error(ErrorCode::kInterrupted, "interrupted");
  };
  // The header comes first in the file and holds a checksum of the content: one pass over the
  // tables in memory for the checksums, a second one to write.
  Layout layout;
  std::vector<std::vector<uint32_t>> checksums;
  uint32_t crc = 0;
  for (int64_t layer = 0; layer < std::ssize(tables); ++layer) {
    const TableData& table = tables[layer];
    stop_if_interrupted();
    table.shape.check(concat("tables[", layer, "]"));
    const RowOwners& owners = *table.owners;
    owners.check(owners.offsets.empty() ? 0 : owners.total_rows(), concat("tables[", layer, "]"));
    checksums.push_back(block_checksums(table.data, table.shape.row_bytes(), owners));
    crc = content_checksum(crc, layer, table.shape, owners, checksums.back());
    layout.align();
    const bool quantized = is_quantized(table.shape.dtype);
    layout.add(layer_key(layer, "table"), quantized ? "U8" : safetensors_dtype(table.shape.dtype),
               {owners.total_rows(), stored_columns(table.shape)}, table.data,
               owners.total_rows() * table.shape.row_bytes());
    auto& metadata = layout.header.metadata;
    if (quantized) metadata[layer_key(layer, "dtype")] = dtype_name(table.shape.dtype);
    metadata[layer_key(layer, "d_in")] = concat(table.shape.d_in);
    metadata[layer_key(layer, "d_emb")] = concat(table.shape.d_emb);
    metadata[layer_key(layer, "tied")] = table.shape.tied ? "true" : "false";
  }
  layout.align();  // eight-byte elements first, so that every small tensor is aligned as well
  for (int64_t layer = 0; layer < std::ssize(tables); ++layer) {
    const RowOwners& owners = *tables[layer].owners;
    const int64_t vocab = owners.vocab_size();
    layout.add(layer_key(layer, "offsets"), "I64", {vocab + 1}, owners.offsets.data(),
               (vocab + 1) * 8);
    if (!owners.frequency.empty()) {
      layout.add(layer_key(layer, "frequency"), "I64", {vocab}, owners.frequency.data(), vocab * 8);
    }
  }
  for (int64_t layer = 0; layer < std::ssize(tables); ++layer) {
    const auto vocab = static_cast<int64_t>(checksums[layer].size());
    layout.add(layer_key(layer, "crc32c"), "U32", {vocab}, checksums[layer].data(), vocab * 4);
  }
  auto& metadata = layout.header.metadata;
  metadata.emplace("format", kFormat);
  metadata.emplace("version", kVersion);
  metadata.emplace("layers", concat(tables.size()));
  metadata.emplace("content_crc32c", concat(crc));

  AtomicFile file(path);
  const std::string header = format_safetensors_header(layout.header, kAlignment);
  file.write(header.data(), header.size());
  constexpr int64_t kChunk = int64_t{8} << 20;
  for (const auto& [data, bytes] : layout.parts) {
    for (int64_t done = 0; done < bytes; done += kChunk) {
      stop_if_interrupted();
      file.write(static_cast<const char*>(data) + done,
                 static_cast<size_t>(std::min(kChunk, bytes - done)));
    }
  }
  file.commit();
}

TableFile::TableFile(const std::string& path, DirectIo direct_io, IoEngine engine)
    : reader_(std::make_shared<FileReader>(path, direct_io, engine)),
      tables_(Opener(reader_).open()) {}

MappedTables map_table_file(const std::string& path, const MapOptions& options) {
  // Through the page cache, which is what the mapping shows.
  const auto reader = std::make_shared<FileReader>(path, DirectIo::kOff, IoEngine::kPread);
  if (reader->size() == 0) throw Error::io(path, 0, "expected a table file, got 0 bytes");
  const auto mapped = std::make_shared<MappedFile>(reader, options);
  return {mapped, Opener(reader, mapped).open()};
}

}  // namespace l3ext
