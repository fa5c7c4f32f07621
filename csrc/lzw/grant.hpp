// Turns counted codewords into rows: how many rows of the table each token owns.
#pragma once

#include <cstdint>
#include <vector>

#include "lzw/counter.hpp"

namespace l3ext::lzw {

// Every token gets one row. The codewords, by count descending and then by insertion order, each
// give one row to their last token unless it owns max_rows already, until total_rows are given; the
// walk starts over as often as needed. Returns rows [vocab_size]. O(codewords + total_rows) time.
// Throws kValue unless max_rows >= 1 and vocab_size <= total_rows <= vocab_size * max_rows;
// kInterrupted.
std::vector<int32_t> grant_rows(const Counter& counter, int64_t total_rows, int64_t max_rows,
                                const InterruptHook& interrupted = {});

}  // namespace l3ext::lzw
