// The table file and its reader: what was written comes back, and damage is found.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "runtime_examples.hpp"

using namespace l3ext;
using namespace examples;

namespace {

void a_table_file_gives_back_what_was_written() {
  const std::string path = temporary_path("tables");
  const Example a = make_example(50, 40, 33, 20, 14);
  Example b = make_example(50, 3, 8, 8, 15);
  b.shape.tied = true;
  b.shape.d_in = b.shape.d_emb = 16;
  b.owners->frequency.clear();
  const TableData tables[] = {a.data(), b.data()};
  write_table_file(path, tables);
  for (const DirectIo direct_io : {DirectIo::kAuto, DirectIo::kOff}) {
    const TableFile file(path, direct_io);
    EXPECT(file.tables().size() == 2);
    EXPECT(file.tables()[0].shape == a.shape && file.tables()[1].shape == b.shape);
    EXPECT(file.tables()[0].owners->offsets == a.owners->offsets);
    EXPECT(file.tables()[0].owners->frequency == a.owners->frequency);
    EXPECT(file.tables()[1].owners->frequency.empty());
    const auto prefetcher = make_prefetcher(
        file.tables(), {.cache_bytes = 20000, .ring_bytes = 60000, .piece_bytes = 4096});
    std::mt19937 random(16);
    for (int i = 0; i < 100; ++i) {
      Prefetcher::Step step = Prefetcher::begin(prefetcher, random_ids(random, 50, 8));
      for (const int64_t layer : {0, 1}) {
        step.wait(layer);
        EXPECT(holds_the_rows(step, layer, layer == 0 ? a : b));
      }
    }
  }
  std::filesystem::remove(path);
}

void a_changed_or_shortened_file_is_an_error_not_a_crash() {
  const std::string path = temporary_path("damaged");
  const Example example = make_example(50, 40, 33, 20, 17);
  const TableData tables[] = {example.data()};
  for (const DirectIo direct_io : {DirectIo::kAuto, DirectIo::kOff}) {
    write_table_file(path, tables);
    const TableFile file(path, direct_io);
    const auto prefetcher = make_prefetcher(file.tables(), {.piece_bytes = 4096});
    const int32_t big = static_cast<int32_t>(std::distance(
        example.owners->offsets.begin(),
        std::upper_bound(example.owners->offsets.begin(), example.owners->offsets.end(), 100)));
    EXPECT(example.owners->rows(big) * example.shape.row_bytes() > 0);
    {  // flip a bit in every 100 bytes: a block in parts and whole ones are both found out
      std::fstream stream(path, std::ios::in | std::ios::out | std::ios::binary);
      const int64_t rows_begin = 4096;
      for (int64_t at = rows_begin; at < rows_begin + 4 * std::ssize(example.rows); at += 100) {
        stream.seekg(at);
        const char byte = static_cast<char>(stream.get() ^ 1);
        stream.seekp(at);
        stream.put(byte);
      }
    }
    for (const int32_t token : {0, big, 49}) {
      Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{token});
      const std::string message = EXPECT_THROWS(Error, step.wait(0));
      EXPECT(message.find(concat("the rows of token ", token, " ")) != std::string::npos);
    }
    std::filesystem::resize_file(path, 8192);
    Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{49});
    const std::string message = EXPECT_THROWS(Error, step.wait(0));
    EXPECT(message.find("the file is 8192 bytes long") != std::string::npos);
    EXPECT(EXPECT_THROWS(Error, TableFile(path, direct_io)).find("cut short") != std::string::npos);
  }
  std::filesystem::remove(path);
}

void no_change_of_a_header_gets_through_or_crashes() {
  const std::string path = temporary_path("fuzz");
  const Example example = make_example(6, 3, 5, 3, 18);
  const TableData tables[] = {example.data()};
  write_table_file(path, tables);
  std::string good;
  {
    std::ifstream stream(path, std::ios::binary);
    good.assign(std::istreambuf_iterator<char>(stream), {});
  }
  const size_t rows_end = 4096 + (example.rows.size() * 4 + 4095) / 4096 * 4096;
  const auto attempt = [&](const std::string& bytes) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
    try {
      const TableFile file(path, DirectIo::kOff);
      return file.tables().size() == 1 && file.tables()[0].shape == example.shape &&
             file.tables()[0].owners->offsets == example.owners->offsets;
    } catch (const Error& error) {
      return error.code() == ErrorCode::kIo && error.path() == path;
    }
  };
  std::vector<size_t> places(900);
  std::iota(places.begin(), places.end(), size_t{0});
  for (size_t i = rows_end; i < good.size(); ++i) places.push_back(i);
  std::mt19937 random(19);
  for (const size_t place : places) {
    std::string bad = good;
    bad[place] = static_cast<char>(bad[place] ^ (1 << random() % 8));
    EXPECT(attempt(bad));
    if (place % 7 == 0) EXPECT(attempt(good.substr(0, place)));
  }
  EXPECT(attempt(good));
  std::filesystem::remove(path);
}

}  // namespace

int main() {
  RUN(a_table_file_gives_back_what_was_written);
  RUN(a_changed_or_shortened_file_is_an_error_not_a_crash);
  RUN(no_change_of_a_header_gets_through_or_crashes);
  return check::failures == 0 ? 0 : 1;
}
