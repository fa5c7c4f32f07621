// CRC-32C (Castagnoli, polynomial 0x1EDC6F41, reflected, initial and final XOR 0xFFFFFFFF).
#pragma once

#include <cstddef>
#include <cstdint>

namespace l3ext {

// Extends `crc` (0 for a fresh start) by `bytes` bytes: crc32c(ab) == crc32c(b, crc32c(a)).
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0);

// crc32c(ab) from crc32c(a), crc32c(b) and the length of b: parts can be summed on their own.
uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t bytes_b);

}  // namespace l3ext
