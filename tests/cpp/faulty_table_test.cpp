// The table that other tests use to be unkind to the runtime does what it promises.
#include "faulty_table.hpp"

#include <chrono>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "check.hpp"

using namespace l3ext;
using namespace examples;

namespace {

constexpr int64_t kBytes = 64 * 4096;
constexpr int64_t kSlot = 4096 + TableSource::kScratchMargin;

struct Slots {
  explicit Slots(int count)
      : memory(static_cast<std::byte*>(std::aligned_alloc(4096, count * kSlot)), std::free) {}
  std::byte* operator[](int64_t i) const { return memory.get() + i * kSlot; }
  std::unique_ptr<std::byte, void (*)(void*)> memory;
};

std::vector<std::byte> some_bytes() {
  std::vector<std::byte> bytes(kBytes);
  for (int64_t i = 0; i < kBytes; ++i) bytes[i] = static_cast<std::byte>(i * 7 % 251);
  return bytes;
}

void reads_come_back_whole_in_another_order_and_late() {
  const std::vector<std::byte> bytes = some_bytes();
  FaultyTable table(bytes.data(),
                    {.depth = 8, .seed = 3, .longest_delay = std::chrono::microseconds(500)});
  const auto reader = table.make_reader(32);
  EXPECT(reader->depth() == 8);
  const Slots slots(8);
  bool reordered = false;
  for (int round = 0; round < 4; ++round) {
    for (int64_t i = 0; i < 8; ++i) reader->submit({i * 5000 + round, 1000, slots[i], i});
    std::set<int64_t> tags;
    for (int64_t i = 0; i < 8; ++i) {
      const ReadResult result = reader->complete();
      EXPECT(!result.error);
      EXPECT(std::memcmp(result.data, bytes.data() + result.tag * 5000 + round, 1000) == 0);
      reordered |= result.tag != i;
      tags.insert(result.tag);
    }
    EXPECT(tags.size() == 8);
  }
  EXPECT(reordered);
  EXPECT(table.reads() == 32 && table.most_on_their_way() == 8 && table.times_misused() == 0);
}

void reads_of_bad_bytes_fail_and_others_do_not() {
  const std::vector<std::byte> bytes = some_bytes();
  FaultyTable table(bytes.data(), {.in_order = true, .failing = {5000, 9999}});
  const auto reader = table.make_reader(4);
  const Slots slots(4);
  const int64_t begins[] = {4001, 5001, 9000, 10000};  // the first and the third cover one
  for (int64_t i = 0; i < 4; ++i) reader->submit({begins[i], 1000, slots[i], i});
  for (int64_t i = 0; i < 4; ++i) {
    const ReadResult result = reader->complete();
    EXPECT(result.tag == i && (result.error != nullptr) == (i % 2 == 0));
  }
}

void a_stalled_read_returns_when_it_is_released() {
  const std::vector<std::byte> bytes = some_bytes();
  FaultyTable table(bytes.data(), {.stalling = {0}});
  std::thread worker([&] {
    const auto reader = table.make_reader(2);
    const Slots slots(2);
    reader->submit({0, 10, slots[0], 1});
    reader->submit({100, 10, slots[1], 2});
    EXPECT(reader->complete().tag == 2);
    const ReadResult result = reader->complete();
    EXPECT(result.tag == 1 && std::memcmp(result.data, bytes.data(), 10) == 0);
  });
  table.wait_until_stalled();
  EXPECT(table.readers_alive() == 1);
  table.release();
  worker.join();
  EXPECT(table.readers_alive() == 0);
}

void misuse_is_counted() {
  const std::vector<std::byte> bytes = some_bytes();
  FaultyTable table(bytes.data(), {.depth = 2});
  const Slots slots(3);
  {
    const auto reader = table.make_reader(2);
    reader->submit({0, 10, slots[0], 0});
    reader->submit({0, 10, slots[0], 0});  // the same scratch
    EXPECT(table.times_misused() == 1);
    reader->submit({0, 10, slots[1], 0});  // above its depth
    EXPECT(table.times_misused() == 2);
  }
  EXPECT(table.times_misused() == 3);  // destroyed with reads on their way
}

}  // namespace

int main() {
  RUN(reads_come_back_whole_in_another_order_and_late);
  RUN(reads_of_bad_bytes_fail_and_others_do_not);
  RUN(a_stalled_read_returns_when_it_is_released);
  RUN(misuse_is_counted);
  return check::failures == 0 ? 0 : 1;
}
