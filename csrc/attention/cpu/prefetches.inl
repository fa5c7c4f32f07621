// What to ask memory for while a product runs: the rows that come after those of `a`, line by line
// as these pass, and a share of what is wanted later.
struct Prefetches {
  const BFloat16* rows = nullptr;
  int64_t stride = 0;
  Wanted* wanted = nullptr;

  // For each line of the rows. About what memory can bring meanwhile.
  static constexpr int kWantedLines = 6;

  // Inlined, or every register of sums would be saved around it.
  [[gnu::always_inline]] void ask(int64_t row, int64_t count, int64_t column) const {
    if (rows != nullptr) {
      const BFloat16* line = rows + row * stride + column;
      for (int64_t r = 0; r < count; ++r, line += stride) __builtin_prefetch(line, 0, 2);
    }
    if (wanted != nullptr) wanted->ask(kWantedLines);
  }
};
