#include "lzw/dictionary.hpp"

#include <algorithm>
#include <bit>
#include <new>
#include <utility>
#include <vector>

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

void Dictionary::reserve_slots(size_t size, Team* team) {
  const size_t lines = lines_for(size - vocab_size_);
  if (lines > lines_.size()) move_to(lines, team);
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

void Dictionary::place(size_t line, const Slot& slot) noexcept {
  while (!lines_[line].add(slot)) line = next(line);
}

// Each thread moves a range of the hashes. What is left then are edges of one range that belong to
// another: a few at the ranges' ends.
void Dictionary::move_to(size_t size, Team* team) {
  constexpr size_t kLinesForThreads = size_t{1} << 13;  // 512 KiB
  const bool shared = team != nullptr && std::min(size, lines_.size()) >= kLinesForThreads;
  const size_t parts = shared ? team->size() : 1;
  std::vector<Left> left(parts);
  FlatArray<Line> old;
  const Team::Job move = [&](size_t part) { left[part] = move_part(old, part, parts); };
  old.resize(size);  // zeros
  std::swap(old, lines_);
  capacity_ = edges_in(size);
  if (shared) {
    team->run(move);
  } else {
    move(0);
  }
  for (const auto& [line, edges] : left) {
    for (size_t e = 0; e < edges; ++e) {
      const Slot slot = old[line + e / kEdgesPerLine].at(e % kEdgesPerLine);
      place(home(slot.key), slot);
    }
  }
}

// Reads its part of the old table and writes its part of the new one from front to back, and gives
// the old one's memory back on the way: the two together never hold more than the larger of them
// and a little. Edges that find no place in its part of the new table it collects at the front of
// its part of the old one.
Dictionary::Left Dictionary::move_part(FlatArray<Line>& old, size_t part, size_t parts) noexcept {
  constexpr size_t kLinesPerRelease = size_t{1} << 17;  // 8 MiB
  const size_t first = part * old.size() / parts;
  const size_t last = (part + 1) * old.size() / parts;
  const size_t begin = part * lines_.size() / parts;
  const size_t end = (part + 1) * lines_.size() / parts;
  Left left{first, 0};
  size_t unreleased = first;
  for (size_t i = first; i < last; ++i) {
    const size_t edges = std::min<size_t>(old[i].edges, kEdgesPerLine);
    for (size_t s = 0; s < edges; ++s) {
      const Slot slot = old[i].at(s);
      size_t line = home(slot.key);
      if (line < begin) line = end;
      while (line < end && !lines_[line].add(slot)) ++line;
      if (line >= end) [[unlikely]] {
        old[first + left.edges / kEdgesPerLine].put(left.edges % kEdgesPerLine, slot);
        ++left.edges;
      }
    }
    if (i - unreleased == kLinesPerRelease) {
      old.release(std::max(unreleased, first + left.edges / kEdgesPerLine + 1), i);
      unreleased = i;
    }
  }
  return left;
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
      if (slot.id < size) place(home(slot.key), slot);
    }
  } while (i != start);
}

}  // namespace l3ext::lzw
