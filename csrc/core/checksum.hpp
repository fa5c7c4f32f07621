// CRC-32C (Castagnoli, polynomial 0x1EDC6F41, reflected, initial and final XOR 0xFFFFFFFF).
#pragma once

#include <cstddef>
#include <cstdint>

namespace l3ext {

// Extends `crc` (0 for a fresh start) by `bytes` bytes: crc32c(ab) == crc32c(b, crc32c(a)).
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0);

}  // namespace l3ext
