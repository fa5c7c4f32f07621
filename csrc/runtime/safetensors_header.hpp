// The JSON header of a safetensors file: an 8-byte little-endian length, then
// {"__metadata__": {string: string}, name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0,
// 24]}} and the tensors' bytes without holes. The parser takes this grammar and nothing else: no
// escapes, no negative or fractional numbers, no unknown or repeated fields, no recursion.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.hpp"

namespace l3ext {

struct TensorEntry {
  std::string dtype;  // "F32", "I64", ...
  std::vector<int64_t> shape;
  int64_t begin = 0;  // bytes, from the end of the header
  int64_t end = 0;
};

struct SafetensorsHeader {
  std::map<std::string, std::string, std::less<>> metadata;
  std::map<std::string, TensorEntry, std::less<>> tensors;
};

// Throws kIo with `path` and the byte where the text leaves the grammar.
SafetensorsHeader parse_safetensors_header(std::string_view json, const std::string& path);

// Throws kIo unless the tensors fill [0, data_bytes) without holes or overlaps and each is as long
// as its dtype and shape say.
void check_safetensors_layout(const SafetensorsHeader& header, int64_t data_bytes,
                              const std::string& path);

// The length and the JSON text, padded with spaces to a multiple of `alignment` bytes.
std::string format_safetensors_header(const SafetensorsHeader& header, int64_t alignment);

// safetensors' name of a floating-point dtype, and back (throws kIo for any other name).
const char* safetensors_dtype(DType dtype);
DType dtype_from_safetensors(const std::string& name, const std::string& path);

}  // namespace l3ext
