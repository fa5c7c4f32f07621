#include "lzw/dictionary.hpp"

#include <algorithm>
#include <bit>
#include <new>
#include <utility>

#include "core/error.hpp"

namespace l3ext::lzw {
namespace {

// Three and a half edges a line on average, of five, at most: fuller lines send more edges on.
constexpr size_t edges_in(size_t lines) { return lines * 7 / 2; }

// The smallest 2^k lines, or 3 * 2^k where the table has 64 MB and more, that take so many edges:
// growth costs time where tables are small and memory where they are large. A function of the
// number alone, so that dictionaries with equal content have equal size.
size_t lines_for(size_t edges) {
  constexpr size_t kLarge = size_t{1} << 20;
  const size_t power = std::bit_ceil((2 * edges + 6) / 7);
  return power > kLarge && edges_in(power / 4 * 3) >= edges ? power / 4 * 3 : power;
}

}  // namespace

Dictionary::Dictionary(uint32_t vocab_size) : vocab_size_(vocab_size) {
  edges_.resize(vocab_size);
  for (uint32_t token = 0; token < vocab_size; ++token) edges_[token] = {kNone, token};
  reserve_slots(vocab_size);
}

void Dictionary::refuse() {
  throw Error(ErrorCode::kRuntime,
              "dictionary: expected at most 4294967295 codewords; count the corpus in parts");
}

void Dictionary::reserve_slots(size_t size) {
  const size_t lines = lines_for(size - vocab_size_);
  if (lines > lines_.size()) move_to(lines);
}

void Dictionary::truncate(uint32_t size) noexcept {
  if (size < this->size()) remove_from(size);
  edges_.truncate(size);
  try {
    const size_t lines = lines_for(size - vocab_size_);
    if (lines < lines_.size()) move_to(lines);
  } catch (const std::bad_alloc&) {  // NOLINT(bugprone-empty-catch)
    // Nothing to move to: the table stays larger than it need be.
  }
}

uint32_t Dictionary::answer_after(const Probe& probe) const {
  for (auto i = static_cast<size_t>(probe.line_ - &lines_[0]);;) {
    i = next(i);
    const uint32_t found = lines_[i].find(probe.parent(), probe.token());
    if (found != 0 || lines_[i].edges <= kEdgesPerLine) return found;
  }
}

void Dictionary::place(size_t line, const Slot& slot) noexcept {
  while (!lines_[line].add(slot)) line = next(line);
}

// Reads the old table and writes the new one from front to back, and gives the old one's memory
// back on the way: the two together never hold more than the larger of them and a little.
void Dictionary::move_to(size_t size) {
  constexpr size_t kLinesPerRelease = size_t{1} << 20;
  FlatArray<Line> lines;
  lines.resize(size);  // zeros
  std::swap(lines, lines_);
  capacity_ = edges_in(size);
  for (size_t i = 0; i < lines.size(); ++i) {
    const size_t edges = std::min<size_t>(lines[i].edges, kEdgesPerLine);
    for (size_t s = 0; s < edges; ++s) {
      const Slot slot = lines[i].at(s);
      place(home(key_of(slot.parent, slot.token)), slot);
    }
    if (i % kLinesPerRelease == 0) lines.release_front(i);
  }
}

// Sweeps the table once and places every edge that stays anew: where it was or before, as all lines
// before it are settled. It starts behind a line that no edge went past, and so meets every edge
// after those that it went past.
void Dictionary::remove_from(uint32_t size) noexcept {
  size_t start = 0;
  while (lines_[start].edges > kEdgesPerLine) ++start;
  size_t i = start;
  do {
    i = next(i);
    const Line line = std::exchange(lines_[i], Line{});
    const size_t edges = std::min<size_t>(line.edges, kEdgesPerLine);
    for (size_t s = 0; s < edges; ++s) {
      const Slot slot = line.at(s);
      if (slot.id < size) place(home(key_of(slot.parent, slot.token)), slot);
    }
  } while (i != start);
}

}  // namespace l3ext::lzw
