// The counter's file: a header, then three sections of little-endian arrays, each with a CRC-32C.
//
//   header     Header below, its own checksum last
//   frequency  int64 [vocab_size]
//   edges      uint32 [num_codewords - vocab_size, 2]   parent, last token; single tokens need none
//   counts     int64 [num_codewords]
//
// load() believes nothing: size and checksums first, then every parent, token, count and duplicate.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include "core/atomic_file.hpp"
#include "core/checksum.hpp"
#include "core/error.hpp"
#include "lzw/counter.hpp"

namespace l3ext::lzw {
namespace {

static_assert(std::endian::native == std::endian::little, "the file is little-endian");

constexpr char kMagic[8] = {'L', '3', 'L', 'Z', 'W', '\r', '\n', '\0'};
constexpr uint32_t kVersion = 2;  // 1 had no max_codewords

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t parse;
  uint64_t vocab_size;
  uint64_t num_codewords;
  uint64_t max_codewords;  // 2^32 - 1: unbounded
  uint64_t num_tokens;
  uint32_t frequency_crc;
  uint32_t edges_crc;
  uint32_t counts_crc;
  uint32_t header_crc;  // of all bytes before it
};
static_assert(sizeof(Header) == 64);

uint32_t header_crc(const Header& header) { return crc32c(&header, offsetof(Header, header_crc)); }

// An open file that reads whole sections or throws.
class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path) {
    fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO must not block
    if (fd_ < 0) fail_with_errno("cannot open");
    struct stat status{};
    if (::fstat(fd_, &status) != 0 || !S_ISREG(status.st_mode)) {
      ::close(fd_);
      fail("expected a regular file");
    }
    bytes_ = static_cast<uint64_t>(status.st_size);
  }
  ~Reader() { ::close(fd_); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  uint64_t bytes() const { return bytes_; }

  void read(void* data, size_t bytes) {
    auto* p = static_cast<char*>(data);
    while (bytes > 0) {
      const ssize_t got = ::read(fd_, p, bytes);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail_with_errno("cannot read");
      if (got == 0) fail("the file became shorter while it was read");
      p += got;
      bytes -= static_cast<size_t>(got);
    }
  }
  template <typename T>
  void read_section(T* data, size_t count, uint32_t crc, const char* section) {
    read(data, count * sizeof(T));
    check(crc32c(data, count * sizeof(T)) == crc, "wrong checksum of the ", section);
  }

  template <typename... Args>
  void check(bool holds, const Args&... what) const {
    if (!holds) fail(concat(what...));
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error::io(path_, 0, concat("not a usable LZW counter: ", what));
  }
  [[noreturn]] void fail_with_errno(const char* what) const {
    const int error = errno;
    throw Error::io(path_, error, concat(what, ": ", std::strerror(error)));
  }

  std::string path_;
  int fd_ = -1;
  uint64_t bytes_ = 0;
};

Header read_header(Reader& reader) {
  Header header;
  reader.check(reader.bytes() >= sizeof(header), "expected a header of ", sizeof(header),
               " bytes, got a file of ", reader.bytes());
  reader.read(&header, sizeof(header));
  reader.check(std::memcmp(header.magic, kMagic, sizeof(kMagic)) == 0,
               "it is another kind of file");
  reader.check(header.version == kVersion, "expected version ", kVersion, ", got ", header.version);
  reader.check(header.header_crc == header_crc(header), "wrong checksum of the header");
  // The checksum does not prove who wrote it: the sizes are bounded before they are multiplied.
  reader.check(header.parse <= static_cast<uint32_t>(Parse::kLzw), "unknown parse ", header.parse);
  reader.check(header.vocab_size >= 1 && header.vocab_size <= INT32_MAX, "vocab_size ",
               header.vocab_size);
  reader.check(header.max_codewords >= header.vocab_size && header.max_codewords <= UINT32_MAX,
               "max_codewords ", header.max_codewords);
  reader.check(
      header.num_codewords >= header.vocab_size && header.num_codewords <= header.max_codewords,
      "num_codewords ", header.num_codewords);
  const uint64_t expected = sizeof(Header) + 8 * header.vocab_size +
                            8 * (header.num_codewords - header.vocab_size) +
                            8 * header.num_codewords;
  reader.check(reader.bytes() == expected, "expected ", expected, " bytes, got ", reader.bytes());
  return header;
}

}  // namespace

void Counter::save(const std::string& path) const {
  const auto singles = static_cast<size_t>(vocab_size());
  const Dictionary::Edge* edges = dictionary_.edges().data() + singles;
  const size_t edges_bytes = (dictionary_.size() - singles) * sizeof(*edges);
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.version = kVersion;
  header.parse = static_cast<uint32_t>(parse_);
  header.vocab_size = singles;
  header.num_codewords = dictionary_.size();
  header.max_codewords = max_codewords_;
  header.num_tokens = static_cast<uint64_t>(num_tokens_);
  header.frequency_crc = crc32c(frequency_.data(), frequency_.nbytes());
  header.edges_crc = crc32c(edges, edges_bytes);
  header.counts_crc = crc32c(counts_.data(), counts_.nbytes());
  header.header_crc = header_crc(header);

  AtomicFile file(path);
  file.write(&header, sizeof(header));
  file.write(frequency_.data(), frequency_.nbytes());
  file.write(edges, edges_bytes);
  file.write(counts_.data(), counts_.nbytes());
  file.commit();
}

Counter Counter::load(const std::string& path) {
  Reader reader(path);
  const Header header = read_header(reader);
  Counter counter(static_cast<int64_t>(header.vocab_size), static_cast<Parse>(header.parse));
  counter.max_codewords_ = static_cast<uint32_t>(header.max_codewords);
  counter.num_tokens_ = static_cast<int64_t>(header.num_tokens);

  FlatArray<int64_t>& frequency = counter.frequency_;
  reader.read_section(frequency.data(), frequency.size(), header.frequency_crc, "frequencies");
  uint64_t sum = 0;
  for (size_t token = 0; token < frequency.size(); ++token) {
    reader.check(frequency[token] >= 0 && frequency[token] <= INT64_MAX - static_cast<int64_t>(sum),
                 "frequency ", frequency[token], " of token ", token);
    sum += static_cast<uint64_t>(frequency[token]);
  }
  reader.check(sum == header.num_tokens, "expected frequencies that sum up to ", header.num_tokens,
               ", got ", sum);

  FlatArray<Dictionary::Edge> edges;
  edges.resize(header.num_codewords - header.vocab_size);
  reader.read_section(edges.data(), edges.size(), header.edges_crc, "codewords");
  counter.dictionary_.reserve_slots(header.num_codewords);
  for (size_t i = 0; i < edges.size(); ++i) {
    const auto [parent, token] = edges[i];
    const bool valid = parent < counter.num_codewords() && token < header.vocab_size &&
                       counter.dictionary_.find(parent, token) == Dictionary::kNone;
    reader.check(valid, "codeword ", header.vocab_size + i, " has parent ", parent, " and token ",
                 token);
    counter.dictionary_.insert(parent, token);
  }

  counter.counts_.resize(header.num_codewords);
  reader.read_section(counter.counts_.data(), counter.counts_.size(), header.counts_crc, "counts");
  for (size_t id = 0; id < counter.counts_.size(); ++id) {
    reader.check(counter.counts_[id] >= 0, "count ", counter.counts_[id], " of codeword ", id);
  }
  return counter;
}

}  // namespace l3ext::lzw
