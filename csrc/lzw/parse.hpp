// How documents are cut into phrases.
#pragma once

#include <cstdint>

namespace l3ext::lzw {

enum class Parse : uint32_t {
  kPaper = 0,  // a phrase is the longest known prefix and one token more; a known tail is set back
  kLzw = 1,    // the textbook: a phrase is the longest known prefix, the next starts right after it
};

}  // namespace l3ext::lzw
