#include "runtime/safetensors_header.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/error.hpp"

namespace l3ext {
namespace {

class Parser {
 public:
  Parser(std::string_view text, const std::string& path) : text_(text), path_(path) {}

  SafetensorsHeader parse() {
    SafetensorsHeader header;
    members([&](const std::string& name) {
      if (name == "__metadata__") {
        if (!header.metadata.empty()) fail("one __metadata__");
        members([&](const std::string& key) {
          if (!header.metadata.emplace(key, string()).second) fail("no repeated key");
        });
      } else if (!header.tensors.emplace(name, tensor()).second) {
        fail("no repeated tensor name");
      }
    });
    space();
    if (at_ != text_.size()) fail("the end of the header");
    return header;
  }

 private:
  TensorEntry tensor() {
    TensorEntry entry;
    int seen = 0;
    members([&](const std::string& key) {
      int field;
      if (key == "dtype") {
        field = 1;
        entry.dtype = string();
      } else if (key == "shape") {
        field = 2;
        entry.shape = integers();
      } else if (key == "data_offsets") {
        field = 4;
        const std::vector<int64_t> range = integers();
        if (range.size() != 2) fail("two data_offsets");
        entry.begin = range[0];
        entry.end = range[1];
      } else {
        fail("dtype, shape or data_offsets");
      }
      if (seen & field) fail("no repeated field");
      seen |= field;
    });
    if (seen != 7) fail("dtype, shape and data_offsets");
    return entry;
  }

  // Reads "{key: ..., key: ...}"; `member` reads the value of the key it is given.
  template <typename F>
  void members(F&& member) {
    expect('{');
    if (take('}')) return;
    do {
      const std::string key = string();
      expect(':');
      member(key);
    } while (take(','));
    expect('}');
  }

  std::vector<int64_t> integers() {
    std::vector<int64_t> values;
    expect('[');
    if (take(']')) return values;
    do {
      values.push_back(integer());
    } while (take(','));
    expect(']');
    return values;
  }

  int64_t integer() {
    space();
    const size_t start = at_;
    int64_t value = 0;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      if (value > (std::numeric_limits<int64_t>::max() - 9) / 10) fail("an integer below 2^63");
      value = value * 10 + (text_[at_++] - '0');
    }
    if (at_ == start) fail("a non-negative integer");
    return value;
  }

  std::string string() {
    expect('"');
    const size_t start = at_;
    while (at_ < text_.size() && text_[at_] != '"') {
      const auto c = static_cast<unsigned char>(text_[at_]);
      if (c < 0x20 || c > 0x7e || c == '\\') fail("a string of plain ASCII");
      ++at_;
    }
    std::string value(text_.substr(start, at_ - start));
    expect('"');
    return value;
  }

  void space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) {
      ++at_;
    }
  }
  bool take(char c) {
    space();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!take(c)) fail(concat("'", c, "'"));
  }
  [[noreturn]] void fail(const std::string& expected) const {
    throw Error::io(path_, 0,
                    concat("header, byte ", at_, ": expected ", expected,
                           "; the file is corrupt or no table file"));
  }

  std::string_view text_;
  const std::string& path_;
  size_t at_ = 0;
};

int64_t element_bytes(const std::string& dtype, const std::string& path) {
  static constexpr std::pair<const char*, int> kSizes[] = {
      {"F64", 8}, {"F32", 4}, {"BF16", 2}, {"F16", 2}, {"I64", 8}, {"U32", 4}, {"U8", 1}};
  for (const auto& [name, bytes] : kSizes) {
    if (dtype == name) return bytes;
  }
  throw Error::io(path, 0, concat("header: no table file holds a tensor of dtype '", dtype, "'"));
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view json, const std::string& path) {
  return Parser(json, path).parse();
}

void check_safetensors_layout(const SafetensorsHeader& header, int64_t data_bytes,
                              const std::string& path) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (const auto& [name, tensor] : header.tensors) {
    int64_t bytes = element_bytes(tensor.dtype, path);
    for (const int64_t length : tensor.shape) {
      if (__builtin_mul_overflow(bytes, length, &bytes)) {
        throw Error::io(path, 0, concat("header: tensor '", name, "' is longer than 2^63 bytes"));
      }
    }
    if (tensor.begin > tensor.end || tensor.end - tensor.begin != bytes) {
      throw Error::io(path, 0,
                      concat("header: tensor '", name, "': expected ", bytes,
                             " bytes for its dtype and shape, got data_offsets ", tensor.begin,
                             " to ", tensor.end));
    }
    ranges.emplace_back(tensor.begin, tensor.end);
  }
  std::sort(ranges.begin(), ranges.end());
  int64_t reached = 0;
  for (const auto& [begin, end] : ranges) {
    if (begin != reached) {
      throw Error::io(
          path, 0,
          concat("header: expected a tensor at data offset ", reached, ", got one at ", begin));
    }
    reached = end;
  }
  if (reached != data_bytes) {
    throw Error::io(
        path, 0,
        concat("expected ", reached, " bytes of tensors after the header, the file has ",
               data_bytes, ": it was cut short or is corrupt"));
  }
}

std::string format_safetensors_header(const SafetensorsHeader& header, int64_t alignment) {
  std::string json = "{\"__metadata__\":{";
  const char* comma = "";
  for (const auto& [key, value] : header.metadata) {
    json += concat(comma, '"', key, "\":\"", value, '"');
    comma = ",";
  }
  json += '}';
  for (const auto& [name, tensor] : header.tensors) {
    json += concat(",\"", name, "\":{\"dtype\":\"", tensor.dtype, "\",\"shape\":[");
    comma = "";
    for (const int64_t length : tensor.shape) {
      json += concat(comma, length);
      comma = ",";
    }
    json += concat("],\"data_offsets\":[", tensor.begin, ",", tensor.end, "]}");
  }
  json += '}';
  json.resize((json.size() + 8 + alignment - 1) / alignment * alignment - 8, ' ');
  std::string bytes(8, '\0');
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(json.size() >> (8 * i) & 0xff);
  return bytes + json;
}

const char* safetensors_dtype(DType dtype) {
  return dispatch_float(dtype, "dtype", [](auto tag) -> const char* {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, double>) return "F64";
    if constexpr (std::is_same_v<T, float>) return "F32";
    if constexpr (std::is_same_v<T, BFloat16>) return "BF16";
    return "F16";
  });
}

DType dtype_from_safetensors(const std::string& name, const std::string& path) {
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    if (name == safetensors_dtype(dtype)) return dtype;
  }
  throw Error::io(
      path, 0, concat("header: expected a table of F64, F32, BF16, F16 or U8, got '", name, "'"));
}

}  // namespace l3ext
