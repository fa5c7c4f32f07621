// The asynchronous twin itself: that it keeps the order it owes, and no other, and reports what
// breaks the rules.
#include "async_device.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstring>
#include <latch>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "core/error.hpp"

namespace {

using examples::AsyncDevice;
using examples::AsyncOptions;
using l3ext::Copy;
using l3ext::CopyQueue;
using l3ext::DeviceBuffer;
using l3ext::Error;
using l3ext::FencePtr;
using std::chrono::microseconds;

constexpr size_t kBytes = 6000;

std::shared_ptr<AsyncDevice> make_device(uint64_t seed = 0, microseconds delay = microseconds(50)) {
  return std::make_shared<AsyncDevice>(AsyncOptions{seed, delay, 8});
}

bool all_are(const std::byte* data, size_t bytes, int value) {
  return std::all_of(data, data + bytes,
                     [&](std::byte b) { return std::to_integer<int>(b) == value; });
}
bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}
bool reported(const AsyncDevice& device, const char* part) {
  const auto faults = device.faults();
  return std::any_of(faults.begin(), faults.end(),
                     [&](const std::string& fault) { return contains(fault, part); });
}

// Pinned memory of one value.
struct Source {
  Source(AsyncDevice& device, int value, size_t size = kBytes)
      : bytes(size, static_cast<std::byte>(value)), pin(device.pin(bytes.data(), size)) {}
  std::vector<std::byte> bytes;
  std::shared_ptr<void> pin;
};

void copy(CopyQueue& queue, const DeviceBuffer& target, const Source& source) {
  const Copy copies[] = {{target.data(), source.bytes.data(), source.bytes.size()}};
  queue.copy(copies);
}

void rows_are_there_behind_a_fence() {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const auto device = make_device(seed);
    const DeviceBuffer rows(device, kBytes);
    const auto queue = device->make_queue();
    void* stream = device->make_stream();
    const Source source(*device, 7);
    copy(*queue, rows, source);
    const FencePtr fence = queue->record();
    const auto stall = device->wait(stream, {&fence, 1});
    bool seen = false;
    device->run(stream, [&] { seen = all_are(device->at(rows.data(), kBytes), kBytes, 7); });
    device->synchronize(stream);
    EXPECT(seen);
    EXPECT(stall != nullptr && stall->ns().value_or(-1) >= 0);
    EXPECT(device->copied_bytes() == kBytes);
    EXPECT(device->faults().empty());
  }
}

// What a forgotten fence leads to is seen: the copy cannot have begun.
void rows_are_not_there_before() {
  const auto device = make_device();
  const DeviceBuffer rows(device, kBytes);
  const auto queue = device->make_queue();
  void* stream = device->make_stream();
  const Source source(*device, 7);
  device->pause_queues();
  copy(*queue, rows, source);
  const FencePtr fence = queue->record();
  bool poisoned = false;
  device->run(stream, [&] { poisoned = all_are(device->at(rows.data(), kBytes), kBytes, 0xff); });
  device->synchronize(stream);
  EXPECT(poisoned);
  EXPECT(!fence->passed());
  const auto stall = device->wait(stream, {&fence, 1});
  EXPECT(!stall->ns());
  const FencePtr later = device->record(stream);
  EXPECT(!later->passed());
  device->resume_queues();
  later->wait();
  fence->wait();
  EXPECT(stall->ns().has_value());
  while (!fence->passed()) std::this_thread::yield();  // it may be seen late, not never
  EXPECT(all_are(device->at(rows.data(), kBytes), kBytes, 7));
}

// A queue begins nothing behind a fence that has not passed, and its own work is in order.
void queues_wait_and_keep_their_order() {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const auto device = make_device(seed);
    const DeviceBuffer rows(device, kBytes);
    const auto queue = device->make_queue();
    void* stream = device->make_stream();
    const Source first(*device, 1), second(*device, 2);
    copy(*queue, rows, first);
    const FencePtr there = queue->record();
    EXPECT(device->wait(stream, {&there, 1}) != nullptr);
    std::latch may_go_on(1);
    bool kept = false;
    device->run(stream, [&] {
      may_go_on.wait();
      kept = all_are(device->at(rows.data(), kBytes), kBytes, 1);
    });
    queue->wait(device->record(stream));
    copy(*queue, rows, second);
    queue->fill(rows.data() + 10, 3, 5);
    const FencePtr done = queue->record();
    std::this_thread::sleep_for(microseconds(200));
    EXPECT(!done->passed());
    may_go_on.count_down();
    done->wait();
    EXPECT(kept);
    EXPECT(all_are(device->at(rows.data(), 10), 10, 2));
    EXPECT(all_are(device->at(rows.data() + 10, 5), 5, 3));
    EXPECT(all_are(device->at(rows.data() + 15, kBytes - 15), kBytes - 15, 2));
    EXPECT(device->faults().empty());
  }
}

// Two queues: under some seed the one that was asked second is through first.
void queues_overtake_each_other() {
  bool in_order = false, overtaken = false;
  for (uint64_t seed = 0; seed < 200 && !(in_order && overtaken); ++seed) {
    const auto device = make_device(seed, microseconds(500));
    const DeviceBuffer rows(device, 2);
    const Source source(*device, 1, 1);
    std::atomic<int> finished = 0;
    std::array<int, 2> place = {};
    std::array<std::unique_ptr<CopyQueue>, 2> queues;
    for (int i = 0; i < 2; ++i) {
      queues[i] = device->make_queue();
      const Copy copies[] = {{rows.data() + i, source.bytes.data(), 1}};
      queues[i]->copy(copies);
      const FencePtr fence = queues[i]->record();
      void* stream = device->make_stream();
      EXPECT(device->wait(stream, {&fence, 1}) != nullptr);
      device->run(stream, [&place, &finished, i] { place[i] = finished++; });
      queues[i]->wait(device->record(stream));
    }
    for (const auto& queue : queues) queue->record()->wait();
    (place[0] < place[1] ? in_order : overtaken) = true;
  }
  EXPECT(in_order);
  EXPECT(overtaken);
}

void default_stream_and_null_fences() {
  const auto device = make_device();
  const FencePtr none[] = {nullptr, nullptr};
  EXPECT(device->wait(nullptr, none) == nullptr);
  EXPECT(device->wait(nullptr, {}) == nullptr);
  const auto queue = device->make_queue();
  queue->wait(nullptr);
  bool ran = false;
  device->run(nullptr, [&] { ran = true; });
  device->synchronize(nullptr);
  EXPECT(ran);
  int somewhere = 0;
  EXPECT(contains(EXPECT_THROWS(Error, device->record(&somewhere)), "expected one of this device"));
  const auto other = make_device();
  const FencePtr foreign = other->record(nullptr);
  EXPECT(contains(EXPECT_THROWS(Error, queue->wait(foreign)), "expected one of this device"));
}

void copies_need_pinned_sources() {
  const auto device = make_device();
  const DeviceBuffer rows(device, kBytes), other(device, kBytes);
  const auto queue = device->make_queue();
  std::vector<std::byte> plain(kBytes, std::byte{5});
  const Copy copies[] = {{rows.data(), plain.data(), kBytes}};
  EXPECT(contains(EXPECT_THROWS(Error, queue->copy(copies)), "pinned"));
  {
    const auto pin = device->pin(plain.data(), kBytes - 1);  // not all of it
    EXPECT(device->pinned_bytes() == kBytes - 1);
    EXPECT(contains(EXPECT_THROWS(Error, queue->copy(copies)), "pinned"));
    const Copy fits[] = {{rows.data(), plain.data(), kBytes - 1}};
    queue->copy(fits);
    queue->record()->wait();
  }
  EXPECT(device->pinned_bytes() == 0);

  void* staging = device->allocate_staging(kBytes);
  EXPECT(reinterpret_cast<uintptr_t>(staging) % 4096 == 0);
  std::memset(staging, 6, kBytes);
  const Copy staged[] = {{rows.data(), staging, kBytes}};
  queue->copy(staged);
  const Copy between[] = {{other.data(), rows.data(), kBytes}};
  queue->copy(between);
  queue->record()->wait();
  EXPECT(all_are(device->at(other.data(), kBytes), kBytes, 6));
  device->deallocate_staging(staging, kBytes);
  EXPECT(device->staging_bytes() == 0);
  EXPECT(contains(EXPECT_THROWS(Error, queue->copy(staged)), "pinned"));
  EXPECT(device->faults().empty());
}

void misuse_is_reported() {
  const auto device = make_device();
  const auto queue = device->make_queue();
  const Source source(*device, 1);
  {  // memory given back while a copy into it is on its way
    const DeviceBuffer rows(device, kBytes);
    device->pause_queues();
    copy(*queue, rows, source);
    queue->fill(rows.data(), 0, kBytes);
  }
  device->resume_queues();
  queue->record()->wait();
  EXPECT(reported(*device, "copy: its target"));
  EXPECT(reported(*device, "fill: "));

  const DeviceBuffer rows(device, kBytes);
  {  // a source let go before it was read
    const Source gone(*device, 2);
    device->pause_queues();
    copy(*queue, rows, gone);
  }
  device->resume_queues();
  queue->record()->wait();
  EXPECT(reported(*device, "copy: its source"));

  const Copy twice[] = {{rows.data(), source.bytes.data(), 100},
                        {rows.data() + 99, source.bytes.data(), 100}};
  EXPECT(contains(EXPECT_THROWS(Error, queue->copy(twice)), "the same bytes"));
  const Copy beyond[] = {{rows.data() + 1, source.bytes.data(), kBytes}};
  EXPECT(contains(EXPECT_THROWS(Error, queue->copy(beyond)), "target on the device"));
  std::array<std::byte, 8> host;
  const Copy to_host[] = {{host.data(), source.bytes.data(), 8}};
  EXPECT(contains(EXPECT_THROWS(Error, queue->copy(to_host)), "target on the device"));
  EXPECT_THROWS(Error, queue->fill(rows.data() + kBytes, 0, 1));
  EXPECT_THROWS(Error, device->at(rows.data() + kBytes, 1));
  device->deallocate(rows.data() + 1, kBytes);
  EXPECT(reported(*device, "was not given out"));
  device->run(nullptr, [] { throw std::runtime_error("a kernel failed"); });
  device->synchronize(nullptr);
  EXPECT(reported(*device, "a kernel failed"));
}

// A host that touches rows on the device crashes there; here too.
void the_host_cannot_touch_device_memory() {
  const auto device = make_device();
  const DeviceBuffer rows(device, kBytes);
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGSEGV, SIG_DFL);
    *static_cast<volatile std::byte*>(static_cast<void*>(rows.data())) = std::byte{1};
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT(WIFSIGNALED(status) || WEXITSTATUS(status) != 0);  // a sanitizer exits
}

void memory_is_counted_and_poisoned() {
  const auto device = make_device();
  void* stale = nullptr;
  {
    const DeviceBuffer rows(device, kBytes);
    stale = rows.data();
    EXPECT(reinterpret_cast<uintptr_t>(stale) % 4096 == 0);
    EXPECT(device->allocated_bytes() == kBytes);
    EXPECT(all_are(device->at(rows.data(), kBytes), kBytes, 0xff));
  }
  EXPECT(device->allocated_bytes() == 0);
  const DeviceBuffer again(device, kBytes);
  EXPECT(again.data() != stale);
  EXPECT_THROWS(Error, device->at(stale, 1));
  const DeviceBuffer nothing(device, 0);
}

void failures_are_injected() {
  const auto device = make_device();
  const DeviceBuffer rows(device, kBytes);
  const auto queue = device->make_queue(), other = device->make_queue();
  const Source source(*device, 4);
  device->fail_copy_call(2);
  copy(*queue, rows, source);
  EXPECT(contains(EXPECT_THROWS(Error, copy(*queue, rows, source)), "was to fail"));
  copy(*queue, rows, source);
  queue->record()->wait();
  EXPECT(device->copied_bytes() == 2 * kBytes);

  device->lose_at_copy_call(1);
  const FencePtr before = queue->record();
  before->wait();
  device->pause_queues();
  copy(*queue, rows, source);
  const FencePtr fence = queue->record(), beside = other->record();
  const auto stall = device->wait(nullptr, {&fence, 1});
  device->resume_queues();
  EXPECT(contains(EXPECT_THROWS(Error, fence->wait()), "lost"));
  device->record(nullptr);
  before->wait();  // it passed in time
  EXPECT(contains(EXPECT_THROWS(Error, copy(*other, rows, source)), "lost"));
  EXPECT(contains(EXPECT_THROWS(Error, device->synchronize(nullptr)), "lost"));
  EXPECT(stall->ns().has_value());  // nobody waits for ever
  EXPECT(device->copied_bytes() == 2 * kBytes);
}

// All goes away in any order, with work on its way.
void ends_in_any_order() {
  auto device = make_device(1, microseconds(300));
  auto queue = device->make_queue();
  auto source = std::make_unique<Source>(*device, 1);
  auto rows = std::make_unique<DeviceBuffer>(device, kBytes);
  copy(*queue, *rows, *source);
  FencePtr fence = queue->record();
  auto stall = device->wait(nullptr, {&fence, 1});
  device->pause_queues();
  auto unused = device->make_queue();
  queue.reset();  // its work goes on
  device->resume_queues();
  fence->wait();
  rows.reset();
  device.reset();
  unused->record()->wait();
}

}  // namespace

int main() {
  RUN(rows_are_there_behind_a_fence);
  RUN(rows_are_not_there_before);
  RUN(queues_wait_and_keep_their_order);
  RUN(queues_overtake_each_other);
  RUN(default_stream_and_null_fences);
  RUN(copies_need_pinned_sources);
  RUN(misuse_is_reported);
  RUN(the_host_cannot_touch_device_memory);
  RUN(memory_is_counted_and_poisoned);
  RUN(failures_are_injected);
  RUN(ends_in_any_order);
  return check::failures == 0 ? 0 : 1;
}
