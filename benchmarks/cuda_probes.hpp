// What the CUDA benchmarks need on the device besides the kernels they measure.
#pragma once

#include <cstdint>

namespace l3ext::bench {

// Reads `bytes` (a multiple of 16) once, in the order of the stream: afterwards the second-level
// cache holds none of what was in it before, and no dirty lines that someone else would have to
// write back.
void read_all(const void* data, int64_t bytes, void* stream);

}  // namespace l3ext::bench
