// The CUDA device of the runtime on the fake CUDA runtime: what it orders, what it makes and lets
// go of, and what it says when CUDA refuses. Its copies and fences, not its speed.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/cuda/check.hpp"
#include "core/error.hpp"
#include "fake_cudart.hpp"
#include "runtime/cuda/calibrate.hpp"
#include "runtime/cuda/copy_engines.hpp"
#include "runtime/cuda/fetch_blocks.hpp"
#include "runtime/cuda_device.hpp"
#include "runtime_examples.hpp"

namespace l3ext::cuda {

std::atomic<int> kernel_copies = 0;   // by any worker
std::function<void()> before_kernel;  // called when its turn comes

// In the place of the kernel, which the fake runtime cannot run.
void fetch_blocks(std::span<const Copy> copies, int, void* stream) {
  for (const Copy& copy : copies) {
    ++kernel_copies;
    fake_cudart::run(static_cast<cudaStream_t>(stream), [copy] {
      if (before_kernel) before_kernel();
      std::memcpy(copy.target, copy.source, copy.bytes);
    });
  }
}

}  // namespace l3ext::cuda

namespace {

using namespace l3ext;

constexpr size_t kBytes = 5000;
const CopyChoice kBatched = {true, 0, 4, {}};

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}
bool all_are(const void* data, size_t bytes, int value) {
  const auto* begin = static_cast<const unsigned char*>(data);
  return std::all_of(begin, begin + bytes, [&](unsigned char b) { return b == value; });
}

// Whatever a test makes is gone at its end.
void without_faults(const fake_cudart::Options& options, void (*test)()) {
  fake_cudart::reset(options);
  test();
  fake_cudart::finish_all();
  const auto counts = fake_cudart::counts();
  EXPECT(counts.events == 0 && counts.allocations == 0 && counts.registrations == 0);
  EXPECT(counts.streams == 0);
  for (const std::string& fault : fake_cudart::take_faults()) {
    std::fprintf(stderr, "%s\n", fault.c_str());
    EXPECT(fault.empty());
  }
}
template <void (*Test)()>
void checked() {
  for (uint64_t seed = 0; seed < 20; ++seed) without_faults({.seed = seed}, Test);
}

struct Stream {
  Stream() { L3EXT_CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, 0)); }
  ~Stream() { cudaStreamDestroy(stream); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t stream = nullptr;
};

struct Source {
  Source(Device& device, int value) : bytes(kBytes, static_cast<unsigned char>(value)) {
    pin = device.pin(bytes.data(), kBytes);
  }
  std::vector<unsigned char> bytes;
  std::shared_ptr<void> pin;
};

// Parts of rows in one call, in no order.
void copy(CopyQueue& queue, const DeviceBuffer& rows, const Source& source) {
  std::vector<Copy> copies;
  for (const size_t at : {size_t{3000}, size_t{0}, size_t{1000}, size_t{1000}}) {
    const size_t end = at == 0 ? 1000 : at == 1000 ? 3000 : kBytes;
    copies.push_back({rows.data() + at, source.bytes.data() + at, end - at});
  }
  copies[3].bytes = 0;
  queue.copy(copies);
}

void streams_wait_and_the_host_does_not() {
  const auto device = make_cuda_device(0, kBatched);
  const Stream own;
  for (const cudaStream_t stream : {own.stream, cudaStream_t{nullptr}}) {
    const DeviceBuffer rows(device, kBytes);
    const Source first(*device, 1), second(*device, 2);
    const auto queue = device->make_queue(), other = device->make_queue();
    const int host_waits = fake_cudart::counts().host_waits;
    copy(*queue, rows, first);
    const FencePtr there[] = {queue->record(), nullptr, other->record()};
    const auto stall = device->wait(stream, there);
    bool seen = false, kept = false;
    fake_cudart::run(stream, [&] { seen = all_are(rows.data(), kBytes, 1); });
    fake_cudart::run(stream, [&] { kept = all_are(rows.data(), kBytes, 1); });
    other->wait(device->record(stream));
    copy(*other, rows, second);
    other->fill(rows.data(), 3, 10);
    const FencePtr done = other->record();
    EXPECT(fake_cudart::counts().host_waits == host_waits);
    done->wait();
    EXPECT(done->passed());
    EXPECT(seen && kept);
    EXPECT(all_are(rows.data(), 10, 3) && all_are(rows.data() + 10, kBytes - 10, 2));
    EXPECT(stall == nullptr || stall->ns().has_value());
    fake_cudart::finish_all();
  }
  EXPECT(fake_cudart::counts().single_copies == 0 && fake_cudart::counts().batches == 4);
}

void stalls_are_timed() {
  const auto device = make_cuda_device(0, kBatched);
  const DeviceBuffer rows(device, kBytes);
  const Source source(*device, 1);
  const auto queue = device->make_queue();
  fake_cudart::hold(true);
  copy(*queue, rows, source);
  const FencePtr fence = queue->record();
  EXPECT(!fence->passed());
  const auto stall = device->wait(nullptr, {&fence, 1});
  EXPECT(stall != nullptr && !stall->ns());
  fake_cudart::hold(false);
  fake_cudart::finish_all();
  EXPECT(fence->passed() && stall->ns().value_or(0) > 0);
  EXPECT(device->wait(nullptr, {&fence, 1}) == nullptr);  // nothing to wait for any more
  EXPECT(device->wait(nullptr, {}) == nullptr);
}

// Events are made before, not in a step, and come back.
void events_are_pooled() {
  const auto device = make_cuda_device(0, kBatched);
  const DeviceBuffer rows(device, kBytes);
  const Source source(*device, 1);
  const auto queue = device->make_queue();
  const int made = fake_cudart::counts().events_made;
  for (int step = 0; step < 100; ++step) {
    for (int i = 0; i < 4; ++i) queue->wait(device->record(nullptr));
    copy(*queue, rows, source);
    std::vector<FencePtr> fences(3);
    for (FencePtr& fence : fences) fence = queue->record();
    const auto stall = device->wait(nullptr, fences);
  }
  EXPECT(fake_cudart::counts().events_made == made);
  std::vector<FencePtr> many(1000);  // more than prepared: slower, no error
  for (FencePtr& fence : many) fence = queue->record();
  EXPECT(fake_cudart::counts().events_made > made);
}

// Fences, memory and pins outlive the device and its queue.
void ends_in_any_order() {
  auto device = make_cuda_device(0, kBatched);
  auto rows = std::make_unique<DeviceBuffer>(device, kBytes);
  const Source source(*device, 1);
  auto queue = device->make_queue();
  copy(*queue, *rows, source);
  const FencePtr fence = queue->record();
  const auto stall = device->wait(nullptr, {&fence, 1});
  queue.reset();
  device.reset();
  fence->wait();
  EXPECT(all_are(rows->data(), kBytes, 1));
}

void copies_go_where_the_choice_says() {
  CopyChoice choice;
  choice.kernel_below = 1500;
  const auto device = make_cuda_device(0, choice);
  const DeviceBuffer rows(device, kBytes);
  const Source source(*device, 1);
  const auto queue = device->make_queue();
  EXPECT(queue->batch() > 1);
  cuda::kernel_copies = 0;
  copy(*queue, rows, source);  // 2000, 1000, 2000 and 0 bytes
  EXPECT(fake_cudart::counts().single_copies == 2 && fake_cudart::counts().batches == 0);
  EXPECT(cuda::kernel_copies == 2);
  queue->record()->wait();
  EXPECT(all_are(rows.data(), kBytes, 1));
  EXPECT(copy_choice(*device)->kernel_below == 1500);
  EXPECT(copy_choice(HostDevice()) == nullptr);
}

// Small copies beside the large ones of a call: before them or after, as it comes. What is put in
// later comes later.
void small_copies_do_not_wait_for_large_ones() {
  CopyChoice choice;
  choice.kernel_below = 1500;
  int small_first = 0, large_first = 0;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    fake_cudart::reset({.seed = seed});
    {
      const auto device = make_cuda_device(0, choice);
      const DeviceBuffer rows(device, kBytes);
      const Source first(*device, 1), second(*device, 2);
      const auto queue = device->make_queue();
      fake_cudart::hold(true);  // all is put in before any of it is done
      for (const Source* source : {&first, &second}) {
        // A large one, a small one, and others in their places by the call that follows.
        const Copy copies[] = {{rows.data(), source->bytes.data(), 2000},
                               {rows.data() + 2000, source->bytes.data() + 2000, 1000}};
        queue->copy(copies);
      }
      const FencePtr there = queue->record();
      cuda::before_kernel = [&] {
        if (all_are(rows.data() + 2000, 1000, 1)) return;  // the second call
        ++(all_are(rows.data(), 2000, 1) ? large_first : small_first);
      };
      fake_cudart::hold(false);
      there->wait();
      EXPECT(all_are(rows.data(), 3000, 2));
      cuda::before_kernel = nullptr;
      queue->copy(std::vector<Copy>{{rows.data(), first.bytes.data(), 2000},
                                    {rows.data() + 2000, first.bytes.data() + 2000, 1000}});
      queue->fill(rows.data() + 1000, 3, 1500);  // over both
      queue->record()->wait();
      EXPECT(all_are(rows.data(), 1000, 1) && all_are(rows.data() + 1000, 1500, 3));
      EXPECT(all_are(rows.data() + 2500, 500, 1));
    }
    fake_cudart::finish_all();
    EXPECT(fake_cudart::take_faults().empty());
  }
  EXPECT(small_first > 5 && large_first > 5);
}

void without_host_addresses_no_kernel_copies() {
  CopyChoice choice;
  choice.kernel_below = 1500;
  EXPECT(copy_choice(*make_cuda_device(0, choice))->kernel_below == 0);
}

void an_old_driver_has_no_batches() { EXPECT(!cuda::has_batches()); }

void a_device_measures_its_copies() {
  const auto device = make_cuda_device(1);
  const CopyChoice& choice = *copy_choice(*device);
  EXPECT(contains(choice.text, "loop") && contains(choice.text, "GB/s"));
  EXPECT(device->name() == "cuda:1" && device->index() == 1 && !device->is_host());
}

// The first batch of all, and one after some that went well.
template <int MostBatches>
void refused_batches_are_copied_one_by_one() {
  const auto device = make_cuda_device(1);
  if (fake_cudart::counts().batches < MostBatches) return;  // the time for it was over before
  EXPECT(cudaGetLastError() == cudaSuccess);  // what would be taken for the next call's error
  const CopyChoice& choice = *copy_choice(*device);
  EXPECT(!choice.batched && contains(choice.text, "batch none"));
  const DeviceBuffer rows(device, kBytes);
  const Source source(*device, 1);
  const auto queue = device->make_queue();
  copy(*queue, rows, source);
  queue->record()->wait();
  EXPECT(all_are(rows.data(), kBytes, 1));
}

void memory_is_pinned_once() {
  const auto device = make_cuda_device(0, kBatched), second = make_cuda_device(1, kBatched);
  std::vector<unsigned char> table(kBytes);
  auto pin = device->pin(table.data(), kBytes);
  auto again = second->pin(table.data(), kBytes), part = device->pin(table.data() + 10, 20);
  EXPECT(fake_cudart::counts().registrations == 1);
  EXPECT((fake_cudart::last_register_flags() & cudaHostRegisterReadOnly) != 0);
  pin.reset();
  again.reset();
  EXPECT(fake_cudart::counts().registrations == 1);
  part.reset();
  EXPECT(fake_cudart::counts().registrations == 0);
  EXPECT(device->pin(table.data(), 0) == nullptr);

  L3EXT_CUDA_CHECK(cudaHostRegister(table.data(), kBytes, 0));  // the caller's own
  pin = device->pin(table.data(), kBytes);
  pin.reset();
  EXPECT(fake_cudart::counts().registrations == 1);
  L3EXT_CUDA_CHECK(cudaHostUnregister(table.data()));

  pin = device->pin(table.data() + 100, 100);  // a neighbour in the same pages
  EXPECT(contains(EXPECT_THROWS(Error, device->pin(table.data(), kBytes)),
                  "CUDA error 712, a fake error. Expected memory of which no part is pinned"));
}

void what_cannot_be_pinned_is_said() {
  const auto device = make_cuda_device(0, kBatched);
  std::vector<unsigned char> table(3 * kBytes);
  const std::string message = EXPECT_THROWS(Error, device->pin(table.data(), 3 * kBytes));
  EXPECT(contains(message, "cannot pin 15000 bytes") && contains(message, "ulimit -l, now"));
  EXPECT(contains(EXPECT_THROWS(Error, device->allocate_staging(3 * kBytes)), "cannot pin"));
  EXPECT(device->pin(table.data(), kBytes) != nullptr);  // nothing is left of it
  EXPECT((fake_cudart::last_register_flags() & cudaHostRegisterReadOnly) == 0);
}

void memory_of_the_device() {
  const auto device = make_cuda_device(1, kBatched);
  const std::string message = EXPECT_THROWS(Error, device->allocate(size_t{2} << 30));
  EXPECT(contains(message, "on cuda:1") && contains(message, "are free"));
  const DeviceBuffer nothing(device, 0);
  void* staging = device->allocate_staging(kBytes);
  EXPECT(reinterpret_cast<uintptr_t>(staging) % 4096 == 0 && all_are(staging, kBytes, 0));
  device->deallocate_staging(staging, kBytes);
  device->deallocate_staging(device->allocate_staging(0), 0);
}

// The thread's device is as before, and the events are those of the device, whichever that is.
void the_current_device_stays() {
  const auto device = make_cuda_device(1, kBatched);
  const DeviceBuffer rows(device, kBytes);
  const Source source(*device, 1);
  const auto queue = device->make_queue();
  copy(*queue, rows, source);
  const FencePtr fences[] = {queue->record(), device->record(nullptr)};
  queue->wait(fences[1]);
  device->wait(nullptr, fences);
  for (const FencePtr& fence : fences) fence->wait();
  int current = -1;
  EXPECT(cudaGetDevice(&current) == cudaSuccess && current == 0);
}

// While another thread captures a graph, workers go on; a stream that captures is refused.
void captures_are_left_alone() {
  const auto device = make_cuda_device(0, kBatched);
  const Source source(*device, 1);
  const Stream stream;
  const auto queue = device->make_queue();
  fake_cudart::set_capturing(true);
  {
    const DeviceBuffer rows(device, kBytes);
    copy(*queue, rows, source);
    const FencePtr fence = queue->record();
    fence->passed();
    fence->wait();
    device->deallocate_staging(device->allocate_staging(kBytes), kBytes);
    const std::vector<std::byte> rows_of_a_table(kBytes);
    EXPECT(device->pin(rows_of_a_table.data(), kBytes) != nullptr);  // and let go
  }
  EXPECT(cudaMalloc(nullptr, 1) == cudaErrorStreamCaptureUnsupported);  // the thread's mode is back
  const auto faults = fake_cudart::take_faults();
  EXPECT(faults.size() == 1 && contains(faults[0], "breaks another thread's capture"));
  fake_cudart::set_capturing(false);
  fake_cudart::set_capturing(stream.stream);
  const FencePtr none;
  EXPECT(contains(EXPECT_THROWS(Error, device->record(stream.stream)), "captures no graph"));
  EXPECT(contains(EXPECT_THROWS(Error, device->wait(stream.stream, {&none, 1})), "captures"));
  fake_cudart::set_capturing(nullptr);
  EXPECT(device->record(stream.stream) != nullptr);
}

void a_lost_device_is_an_error_and_no_hang() {
  fake_cudart::reset({});
  {
    const auto device = make_cuda_device(0, kBatched);
    const DeviceBuffer rows(device, kBytes);
    const Source source(*device, 1);
    const auto queue = device->make_queue();
    copy(*queue, rows, source);
    const FencePtr fence = queue->record();
    fake_cudart::lose_devices();
    EXPECT(fence->passed());  // nobody asks for ever
    EXPECT(contains(EXPECT_THROWS(Error, fence->wait()), "CUDA error 700"));
    EXPECT(contains(EXPECT_THROWS(Error, copy(*queue, rows, source)), "CUDA error 700"));
    EXPECT_THROWS(Error, queue->record());
    EXPECT_THROWS(Error, device->record(nullptr));
  }
  fake_cudart::reset({});  // what a lost device could not free
}

void wrong_arguments() {
  EXPECT(contains(EXPECT_THROWS(Error, make_cuda_device(2)), "index from 0 to 1, got 2"));
  EXPECT_THROWS(Error, make_cuda_device(-1));
  struct Foreign : Fence {
    bool passed() override { return false; }
    void wait() override {}
  };
  const auto device = make_cuda_device(0, kBatched);
  EXPECT(contains(EXPECT_THROWS(Error, device->make_queue()->wait(std::make_shared<Foreign>())),
                  "expected one of a CUDA device"));
}

// The whole runtime on it: rows are right where a stream reads them, while later steps overwrite.
// Blocks of fewer bytes than `KernelBelow` go by the kernel: none of them, or about half.
template <size_t KernelBelow>
void a_prefetcher_serves_a_stream() {
  using namespace examples;
  const Example example = make_example(60, 5, 8, 8, 1);
  const auto device = make_cuda_device(0, {true, KernelBelow, 4, {}});
  PrefetchOptions options;
  options.ring_bytes = 60 * example.shape.row_bytes();
  const auto prefetcher =
      Prefetcher::create({ram_table(example), ram_table(example)}, device, options);
  const Stream stream;
  std::mt19937 random(3);
  int wrong = 0, read = 0, expected = 0;
  for (int i = 0; i < 30; ++i) {
    auto step = Prefetcher::begin(prefetcher, random_ids(random, 60, 12));
    for (int64_t layer = 0; layer < 2; ++layer) {
      step.wait(layer, stream.stream);
      std::vector<int64_t> rows(2 * step.tokens().size());
      step.segment_rows(layer, rows.data());
      const std::vector<int32_t> tokens(step.tokens().begin(), step.tokens().end());
      const auto buffer = step.rows(layer);
      expected += static_cast<int>(tokens.size());
      fake_cudart::run(stream.stream, [&, rows, tokens, buffer] {
        const int64_t row_bytes = example.shape.row_bytes();
        for (size_t s = 0; s < tokens.size(); ++s) {
          ++read;
          wrong += std::memcmp(
                       buffer->data() + rows[2 * s] * row_bytes,
                       example.rows.data() + example.owners->offsets[tokens[s]] * example.width(),
                       (rows[2 * s + 1] - rows[2 * s]) * row_bytes) != 0;
        }
      });
    }
    step.end(stream.stream);
  }
  fake_cudart::finish_all();
  EXPECT(read == expected && read > 0 && wrong == 0);
}

}  // namespace

int main() {
  RUN(checked<streams_wait_and_the_host_does_not>);
  RUN(checked<stalls_are_timed>);
  RUN(checked<events_are_pooled>);
  RUN(checked<ends_in_any_order>);
  RUN(checked<copies_go_where_the_choice_says>);
  RUN(small_copies_do_not_wait_for_large_ones);
  RUN(([] { without_faults({.host_pointers = false}, without_host_addresses_no_kernel_copies); }));
  RUN(([] { without_faults({.driver = 12060}, an_old_driver_has_no_batches); }));
  RUN(([] { without_faults({}, a_device_measures_its_copies); }));
  RUN(([] { without_faults({.most_batches = 0}, refused_batches_are_copied_one_by_one<0>); }));
  RUN(([] { without_faults({.most_batches = 5}, refused_batches_are_copied_one_by_one<5>); }));
  RUN(checked<memory_is_pinned_once>);
  RUN(([] {
    without_faults({.read_only_pins = false, .lockable = 2 * kBytes},
                   what_cannot_be_pinned_is_said);
  }));
  RUN(checked<memory_of_the_device>);
  RUN(checked<the_current_device_stays>);
  RUN(([] { without_faults({}, wrong_arguments); }));
  RUN(checked<a_prefetcher_serves_a_stream<0>>);
  RUN(checked<a_prefetcher_serves_a_stream<300>>);
  RUN(checked<captures_are_left_alone>);
  RUN(a_lost_device_is_an_error_and_no_hang);
  return check::failures == 0 ? 0 : 1;
}
