// Blocks that come back, and those that do not.
#include "core/caching_allocator.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "core/error.hpp"

using namespace l3ext;

namespace {

constexpr size_t kMiB = size_t{1} << 20;

void a_freed_block_comes_back_for_a_little_more_or_less() {
  CachingAllocator allocator;
  std::byte* first = nullptr;
  {
    const auto block = allocator.allocate(64 * kMiB);
    first = block.get();
    EXPECT(reinterpret_cast<uintptr_t>(first) % (2 * kMiB) == 0);
    EXPECT(block.get_deleter().nbytes >= 64 * kMiB);
    std::memset(first, 1, 64 * kMiB);
    EXPECT(allocator.kept_bytes() == 0);
  }
  EXPECT(allocator.kept_bytes() >= 64 * kMiB);
  EXPECT(allocator.allocate(64 * kMiB).get() == first);
  EXPECT(allocator.allocate(40 * kMiB).get() == first);
  EXPECT(allocator.allocate(70 * kMiB).get() == first);
  allocator.release();
  EXPECT(allocator.kept_bytes() == 0);
}

void a_block_has_one_owner() {
  CachingAllocator allocator;
  auto a = allocator.allocate(8 * kMiB), b = allocator.allocate(8 * kMiB);
  EXPECT(a.get() != b.get());
  std::byte* const first = a.get();
  a = std::move(b);  // frees the first
  EXPECT(a.get() != first);
  b = allocator.allocate(8 * kMiB);
  EXPECT(b.get() == first);
  EXPECT(allocator.kept_bytes() == 0);
}

void the_smallest_that_is_large_enough_is_taken() {
  CachingAllocator allocator;
  std::byte *small = nullptr, *large = nullptr;
  {
    const auto a = allocator.allocate(100 * kMiB), b = allocator.allocate(70 * kMiB);
    large = a.get(), small = b.get();
  }
  const auto one = allocator.allocate(60 * kMiB);
  EXPECT(one.get() == small);
  const auto two = allocator.allocate(60 * kMiB);
  EXPECT(two.get() == large);
}

void little_does_not_take_much_nor_much_little() {
  CachingAllocator allocator;
  {
    const auto block = allocator.allocate(100 * kMiB);
  }
  const size_t kept = allocator.kept_bytes();
  const auto small = allocator.allocate(10 * kMiB);
  EXPECT(allocator.kept_bytes() == kept);
  EXPECT(small.get_deleter().nbytes < 20 * kMiB);
  const auto large = allocator.allocate(200 * kMiB);
  EXPECT(allocator.kept_bytes() == kept);
  EXPECT(large.get_deleter().nbytes >= 200 * kMiB);
  std::memset(large.get(), 1, 200 * kMiB);
}

void what_nobody_wants_goes_back_to_the_system() {
  CachingAllocator allocator;
  {
    const auto block = allocator.allocate(100 * kMiB);
  }
  for (uint64_t i = 1; i < CachingAllocator::kKeptFor; ++i) allocator.allocate(4 * kMiB);
  EXPECT(allocator.kept_bytes() > 100 * kMiB);
  allocator.allocate(4 * kMiB);
  allocator.allocate(4 * kMiB);
  EXPECT(allocator.kept_bytes() < 100 * kMiB);
  EXPECT(allocator.kept_bytes() >= 4 * kMiB);
}

void more_than_there_is_throws_and_all_goes_on() {
  CachingAllocator allocator;
  {
    const auto block = allocator.allocate(4 * kMiB);
  }
  for (const size_t much : {std::numeric_limits<size_t>::max(), size_t{1} << 62, size_t{1} << 50}) {
    const std::string message = EXPECT_THROWS(Error, allocator.allocate(much));
    EXPECT(message.find(std::to_string(much)) != std::string::npos);
  }
  const auto block = allocator.allocate(4 * kMiB);
  std::memset(block.get(), 1, 4 * kMiB);
}

// Each thread fills its blocks with its own number, and finds it there.
void threads_do_not_meet_in_a_block() {
  CachingAllocator allocator;
  std::atomic<int> strangers = 0;
  std::vector<std::thread> threads;
  for (int t = 1; t <= 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        const size_t nbytes = (1 + (i * t) % 3) * kMiB;
        const auto block = allocator.allocate(nbytes);
        std::memset(block.get(), t, nbytes);
        std::this_thread::yield();
        if (std::any_of(block.get(), block.get() + nbytes,
                        [&](std::byte b) { return b != std::byte{static_cast<uint8_t>(t)}; })) {
          ++strangers;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(strangers == 0);
}

// Whatever another thread was doing when the process was copied.
void children_of_fork_allocate() {
  CachingAllocator& allocator = CachingAllocator::of_process();
  std::atomic<bool> done = false;
  std::thread busy([&] {
    while (!done) allocator.allocate(kMiB);
  });
  auto mine = allocator.allocate(kMiB);
  std::memset(mine.get(), 1, kMiB);
  for (int i = 0; i < 50; ++i) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::alarm(60);  // a child that hangs ends by this signal
      auto block = allocator.allocate(kMiB);
      std::memset(block.get(), 2, kMiB);
      block.reset();
      allocator.release();
      mine.reset();
      block = allocator.allocate(2 * kMiB);
      std::memset(block.get(), 3, 2 * kMiB);
      ::_exit(0);
    }
    int status = -1;
    ::waitpid(child, &status, 0);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  done = true;
  busy.join();
  EXPECT(mine.get()[kMiB - 1] == std::byte{1});
}

}  // namespace

int main() {
  RUN(a_freed_block_comes_back_for_a_little_more_or_less);
  RUN(a_block_has_one_owner);
  RUN(the_smallest_that_is_large_enough_is_taken);
  RUN(little_does_not_take_much_nor_much_little);
  RUN(what_nobody_wants_goes_back_to_the_system);
  RUN(more_than_there_is_throws_and_all_goes_on);
  RUN(threads_do_not_meet_in_a_block);
  RUN(children_of_fork_allocate);
  return check::failures == 0 ? 0 : 1;
}
