#include "runtime/table.hpp"

#include "core/checksum.hpp"

namespace l3ext {

void RowOwners::check(int64_t total, const std::string& name) const {
  L3EXT_CHECK(offsets.size() >= 2, name, ".offsets: expected at least 2 entries (one token), got ",
              offsets.size());
  L3EXT_CHECK(offsets[0] == 0, name, ".offsets[0]: expected 0, got ", offsets[0]);
  for (size_t i = 1; i < offsets.size(); ++i) {
    L3EXT_CHECK(offsets[i] >= offsets[i - 1], name, ".offsets[", i, "]: expected at least ",
                offsets[i - 1], " (offsets never fall), got ", offsets[i]);
  }
  L3EXT_CHECK(offsets.back() == total, name, ".offsets[", offsets.size() - 1, "]: expected ", total,
              " (the table's rows), got ", offsets.back());
  L3EXT_CHECK(frequency.empty() || frequency.size() + 1 == offsets.size(), name,
              ".frequency: expected ", offsets.size() - 1, " entries, got ", frequency.size());
}

void TableShape::check(const std::string& name) const {
  if (!is_quantized(dtype)) dispatch_float(dtype, name.c_str(), [](auto) {});
  // The bound keeps every product of a row count and a row size far from overflow.
  constexpr int64_t kMaxColumns = int64_t{1} << 24;
  L3EXT_CHECK(d_in > 0 && d_in <= kMaxColumns, name, ".d_in: expected 1 to ", kMaxColumns, ", got ",
              d_in);
  L3EXT_CHECK(d_emb > 0 && d_emb <= kMaxColumns, name, ".d_emb: expected 1 to ", kMaxColumns,
              ", got ", d_emb);
  L3EXT_CHECK(!tied || d_emb == d_in, name, ".d_emb: expected ", d_in,
              " (d_in, the table is tied), got ", d_emb);
}

namespace {

// Reads when asked for the result: at most one thread ever waits for it, its own.
class BlockingReader final : public TableReader {
 public:
  explicit BlockingReader(BlockingTable& table) : table_(table) {}
  int depth() const override { return 1; }
  void submit(const Read& read) override { read_ = read; }
  ReadResult complete() override {
    ReadResult result;
    result.tag = read_.tag;
    try {
      result.data = table_.read(read_.begin, read_.bytes, read_.scratch);
    } catch (...) {
      result.error = std::current_exception();
    }
    return result;
  }

 private:
  BlockingTable& table_;
  Read read_;
};

}  // namespace

std::unique_ptr<TableReader> BlockingTable::make_reader(int) {
  return std::make_unique<BlockingReader>(*this);
}

std::vector<uint32_t> block_checksums(const void* data, int64_t row_bytes,
                                      const RowOwners& owners) {
  const auto* bytes = static_cast<const std::byte*>(data);
  std::vector<uint32_t> checksums(static_cast<size_t>(owners.vocab_size()));
  for (int64_t token = 0; token < owners.vocab_size(); ++token) {
    checksums[token] = crc32c(bytes + owners.offsets[token] * row_bytes,
                              static_cast<size_t>(owners.rows(token) * row_bytes));
  }
  return checksums;
}

}  // namespace l3ext
