#include "async_device.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "core/error.hpp"
#include "runtime/host_device.hpp"

namespace examples {

using l3ext::concat;
using l3ext::Copy;
using l3ext::CopyQueue;
using l3ext::Error;
using l3ext::ErrorCode;
using l3ext::FencePtr;

namespace {

constexpr int kPoison = 0xff;
constexpr size_t kPage = 4096;

[[noreturn]] void fail(ErrorCode code, const std::string& message) { throw Error(code, message); }

size_t pages(size_t bytes) { return (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage; }
uintptr_t address_of(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// Memory that something may still be reading when it is given back: kept until nobody does.
struct Block {
  explicit Block(size_t size) : bytes(size), data(l3ext::HostDevice().allocate(size)) {}
  ~Block() { l3ext::HostDevice().deallocate(data, bytes); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const size_t bytes;
  void* const data;
};

struct Range {
  size_t bytes;
  std::shared_ptr<Block> block;  // null for pinned memory, which is not ours
};
using Ranges = std::multimap<uintptr_t, Range>;

// The range that holds [p, p + bytes), or null.
const Ranges::value_type* find(const Ranges& ranges, const void* p, size_t bytes) {
  const uintptr_t begin = address_of(p);
  for (auto entry = ranges.upper_bound(begin); entry != ranges.begin();) {
    --entry;
    if (begin - entry->first <= entry->second.bytes &&
        bytes <= entry->second.bytes - (begin - entry->first)) {
      return &*entry;
    }
  }
  return nullptr;
}

size_t total(const Ranges& ranges) {
  size_t bytes = 0;
  for (const auto& [begin, range] : ranges) bytes += range.bytes;
  return bytes;
}

// Where bytes lie, and what keeps them there.
struct Place {
  std::byte* data = nullptr;
  std::shared_ptr<Block> block;
};

}  // namespace

// --- what queues and streams share
class AsyncDevice::World {
 public:
  ~World() {
    for (const auto& [begin, bytes] : reserved_) ::munmap(begin, bytes);
  }

  void* allocate(size_t bytes) {
    auto block = std::make_shared<Block>(bytes);
    std::memset(block->data, kPoison, bytes);
    // Addresses alone, and never again the same: what is stale stays wrong.
    const size_t length = pages(bytes) + kPage;
    void* begin =
        ::mmap(nullptr, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED) fail(ErrorCode::kRuntime, "no addresses left");
    const std::lock_guard lock(mutex_);
    reserved_.emplace_back(begin, length);
    device_.emplace(address_of(begin), Range{bytes, std::move(block)});
    return begin;
  }
  void* allocate_staging(size_t bytes) {
    auto block = std::make_shared<Block>(bytes);
    void* data = block->data;
    const std::lock_guard lock(mutex_);
    staging_.emplace(address_of(data), Range{bytes, std::move(block)});
    return data;
  }
  void deallocate(void* memory, size_t bytes) { remove(device_, "deallocate", memory, bytes); }
  void deallocate_staging(void* memory, size_t bytes) {
    remove(staging_, "deallocate_staging", memory, bytes);
  }
  void pin(const void* memory, size_t bytes) {
    const std::lock_guard lock(mutex_);
    pinned_.emplace(address_of(memory), Range{bytes, nullptr});
  }
  void unpin(const void* memory, size_t bytes) { remove(pinned_, "pin", memory, bytes); }

  std::optional<Place> device_place(const void* address, size_t bytes) const {
    const std::lock_guard lock(mutex_);
    return place_in(device_, address, bytes);
  }
  std::optional<Place> source_place(const void* source, size_t bytes) const {
    const std::lock_guard lock(mutex_);
    if (auto place = place_in(device_, source, bytes)) return place;
    if (auto place = place_in(staging_, source, bytes)) return place;
    return place_in(pinned_, source, bytes);
  }
  bool on_device(const void* address) const {
    const std::lock_guard lock(mutex_);
    return find(device_, address, 0) != nullptr;
  }

  template <typename... Text>
  void fault(const Text&... text) {
    const std::lock_guard lock(mutex_);
    faults_.push_back(concat(text...));
  }
  std::vector<std::string> faults() const {
    const std::lock_guard lock(mutex_);
    return faults_;
  }
  size_t allocated() const {
    const std::lock_guard lock(mutex_);
    return total(device_);
  }
  size_t staging() const {
    const std::lock_guard lock(mutex_);
    return total(staging_);
  }
  size_t pinned() const {
    const std::lock_guard lock(mutex_);
    return total(pinned_);
  }

  void set_paused(bool paused) {
    const std::lock_guard lock(mutex_);
    paused_ = paused;
    resumed_.notify_all();
  }
  void wait_while_paused() {
    // Without the mutex where it can be, which would order lanes for ThreadSanitizer.
    if (!paused_.load(std::memory_order_relaxed)) return;
    std::unique_lock lock(mutex_);
    resumed_.wait(lock, [&] { return !paused_.load(); });
  }

  // Counts calls of copy(); whether this one is to fail, or to lose the device.
  void fail_call(int64_t n) { fail_call_ = n; }
  void lose_call(int64_t n) { lose_call_ = n; }
  bool fails() { return fail_call_.fetch_sub(1) == 1; }
  bool loses() { return lose_call_.fetch_sub(1) == 1; }

  std::atomic<bool> lost{false};
  std::atomic<int64_t> copied_bytes{0};
  std::atomic<uint64_t> next_lane{1};

 private:
  static std::optional<Place> place_in(const Ranges& ranges, const void* p, size_t bytes) {
    const auto* entry = find(ranges, p, bytes);
    if (entry == nullptr) return std::nullopt;
    const auto& [begin, range] = *entry;
    if (!range.block) return Place{static_cast<std::byte*>(const_cast<void*>(p)), nullptr};
    return Place{static_cast<std::byte*>(range.block->data) + (address_of(p) - begin), range.block};
  }
  void remove(Ranges& ranges, const char* name, const void* memory, size_t bytes) {
    std::shared_ptr<Block> block;
    {
      const std::lock_guard lock(mutex_);
      const auto [first, last] = ranges.equal_range(address_of(memory));
      const auto entry = std::find_if(
          first, last, [&](const auto& candidate) { return candidate.second.bytes == bytes; });
      if (entry == last) {
        faults_.push_back(concat(name, ": ", memory, " of ", bytes, " bytes was not given out"));
        return;
      }
      block = std::move(entry->second.block);
      ranges.erase(entry);
    }
    if (block) std::memset(block->data, kPoison, bytes);
  }

  mutable std::mutex mutex_;  // guards all below
  std::condition_variable resumed_;
  Ranges device_, staging_, pinned_;
  std::vector<std::pair<void*, size_t>> reserved_;
  std::vector<std::string> faults_;
  std::atomic<bool> paused_{false};
  std::atomic<int64_t> fail_call_{0}, lose_call_{0};
};

// --- a queue's or a stream's thread
class AsyncDevice::Lane {
 public:
  Lane(World& world, const AsyncOptions& options, bool is_queue)
      : world_(world),
        delay_(options.delay),
        is_queue_(is_queue),
        random_(options.seed * 1000 + world.next_lane++),
        thread_([this] { work(); }) {}
  ~Lane() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  void put(std::function<void()> task) {
    {
      const std::lock_guard lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    changed_.notify_all();
  }

 private:
  void work() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return stopping_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      if (is_queue_) world_.wait_while_paused();
      pass_time();
      try {
        task();
      } catch (const std::exception& error) {
        world_.fault(is_queue_ ? "queue: " : "stream: ", error.what());
      }
    }
  }
  void pass_time() {
    const uint64_t kind = random_() % 16;
    if (kind < 8 || delay_.count() == 0) return;
    const int64_t most = delay_.count() * (kind == 15 ? 8 : 1);
    std::this_thread::sleep_for(
        std::chrono::microseconds(static_cast<int64_t>(random_() % static_cast<uint64_t>(most))));
  }

  World& world_;
  const std::chrono::microseconds delay_;
  const bool is_queue_;
  std::mt19937_64 random_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses all above
};

// --- fences and stalls
class AsyncDevice::Fence final : public l3ext::Fence {
 public:
  Fence(const World& world, int late) : world_(world), late_(late) {}

  bool is_of(const World& world) const { return &world == &world_; }

  bool passed() override {
    const std::lock_guard lock(mutex_);
    return passed_ && late_-- <= 0;
  }
  void wait() override {
    if (!block()) fail(ErrorCode::kRuntime, "twin: the device was lost");
  }

  // False where the device was lost before all work was done.
  bool block() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return passed_; });
    return !lost_;
  }
  void pass() {
    {
      const std::lock_guard lock(mutex_);
      passed_ = true;
      lost_ = world_.lost;
    }
    changed_.notify_all();
  }

 private:
  const World& world_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int late_;  // how often passed() is still to deny it
  bool passed_ = false;
  bool lost_ = false;
};

class AsyncDevice::Stall final : public l3ext::Stall {
 public:
  std::optional<int64_t> ns() override {
    const int64_t ns = ns_.load();
    return ns < 0 ? std::nullopt : std::optional(ns);
  }
  void end(int64_t ns) { ns_.store(ns); }

 private:
  std::atomic<int64_t> ns_{-1};
};

// --- queues
class AsyncDevice::Queue final : public CopyQueue {
 public:
  Queue(std::shared_ptr<World> world, std::shared_ptr<Lane> lane, const AsyncOptions& options)
      : world_(std::move(world)),
        lane_(std::move(lane)),
        batch_(options.batch),
        random_(options.seed + 17) {}

  size_t batch() const override { return batch_; }

  void wait(const FencePtr& fence) override {
    const Use use(*this);
    if (!fence) return;
    lane_->put([open = ours(*world_, fence)] { open->block(); });
  }

  void copy(std::span<const Copy> copies) override {
    const Use use(*this);
    if (world_->lost) fail(ErrorCode::kRuntime, "twin: the device was lost");
    if (world_->fails()) fail(ErrorCode::kRuntime, "twin: this call of copy() was to fail");
    check_apart(copies);
    std::vector<Task> tasks;
    for (const Copy& copy : copies) tasks.push_back(prepare(copy));
    std::shuffle(tasks.begin(), tasks.end(), random_);
    lane_->put([world = world_.get(), lost = world_->loses(), tasks = std::move(tasks)] {
      if (lost) world->lost = true;
      run(*world, tasks);
    });
  }

  void fill(void* target, unsigned char value, size_t bytes) override {
    const Use use(*this);
    check_target(target, bytes);
    lane_->put([world = world_.get(), target, value, bytes] {
      if (world->lost) return;
      if (const auto place = world->device_place(target, bytes)) {
        std::memset(place->data, value, bytes);
      } else {
        world->fault("fill: ", bytes, " bytes at ", target, " were given back before");
      }
    });
  }

  FencePtr record() override {
    const Use use(*this);
    auto fence = std::make_shared<Fence>(*world_, static_cast<int>(random_() % 3));
    lane_->put([fence] { fence->pass(); });
    return fence;
  }

 private:
  // One copy, which may have read its source already.
  struct Task {
    Copy copy;
    std::shared_ptr<const std::vector<std::byte>> read;
  };

  // Marks the queue as in use, by this thread alone.
  class Use {
   public:
    explicit Use(Queue& queue) : queue_(queue) {
      if (queue_.in_use_.exchange(true)) {
        queue_.world_->fault("queue: two threads use it at the same time");
      }
    }
    ~Use() { queue_.in_use_ = false; }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Queue& queue_;
  };

  void check_target(void* target, size_t bytes) const {
    if (!world_->device_place(target, bytes)) {
      fail(ErrorCode::kRuntime,
           concat("twin: expected a target on the device, got ", bytes, " bytes at ", target));
    }
  }

  static void check_apart(std::span<const Copy> copies) {
    std::vector<std::pair<uintptr_t, size_t>> targets;
    for (const Copy& copy : copies) targets.emplace_back(address_of(copy.target), copy.bytes);
    std::sort(targets.begin(), targets.end());
    for (size_t i = 1; i < targets.size(); ++i) {
      if (targets[i - 1].first + targets[i - 1].second > targets[i].first) {
        fail(ErrorCode::kRuntime, "twin: two copies of one call write the same bytes");
      }
    }
  }

  Task prepare(const Copy& copy) {
    check_target(copy.target, copy.bytes);
    const auto source = world_->source_place(copy.source, copy.bytes);
    if (!source) {
      fail(ErrorCode::kRuntime, concat("twin: expected a source that is pinned, staging or on the "
                                       "device, got ",
                                       copy.bytes, " bytes at ", copy.source));
    }
    if (world_->on_device(copy.source) || random_() % 2 == 0) return {copy, nullptr};
    return {copy,
            std::make_shared<std::vector<std::byte>>(source->data, source->data + copy.bytes)};
  }

  static void run(World& world, const std::vector<Task>& tasks) {
    if (world.lost) return;
    std::vector<std::pair<const Task*, Place>> begun;
    for (const Task& task : tasks) {
      auto target = world.device_place(task.copy.target, task.copy.bytes);
      if (!target) {
        world.fault("copy: its target, ", task.copy.bytes, " bytes at ", task.copy.target,
                    ", was given back before it was done");
        continue;
      }
      std::memset(target->data, kPoison, task.copy.bytes);
      begun.emplace_back(&task, std::move(*target));
    }
    std::this_thread::yield();
    for (const auto& [task, target] : begun) {
      const auto source = world.source_place(task->copy.source, task->copy.bytes);
      if (!source) {
        world.fault("copy: its source, ", task->copy.bytes, " bytes at ", task->copy.source,
                    ", was let go before it was done");
        continue;
      }
      const void* from = task->read ? static_cast<const void*>(task->read->data()) : source->data;
      std::memcpy(target.data, from, task->copy.bytes);
      world.copied_bytes.fetch_add(static_cast<int64_t>(task->copy.bytes),
                                   std::memory_order_relaxed);
    }
  }

  const std::shared_ptr<World> world_;
  const std::shared_ptr<Lane> lane_;  // before the world it is gone
  const size_t batch_;
  std::mt19937_64 random_;
  std::atomic<bool> in_use_{false};
};

// --- the device
AsyncDevice::AsyncDevice(AsyncOptions options)
    : options_(options), world_(std::make_shared<World>()) {
  make_lane(false);  // the default stream
}

AsyncDevice::~AsyncDevice() { resume_queues(); }

std::shared_ptr<AsyncDevice::Lane> AsyncDevice::make_lane(bool is_queue) {
  const std::lock_guard lock(mutex_);
  lanes_.push_back(std::make_shared<Lane>(*world_, options_, is_queue));
  return lanes_.back();
}

AsyncDevice::Lane& AsyncDevice::lane_of(void* stream) const {
  const std::lock_guard lock(mutex_);
  const auto lane = std::find_if(lanes_.begin(), lanes_.end(),
                                 [&](const auto& known) { return known.get() == stream; });
  if (stream != nullptr && lane == lanes_.end()) {
    fail(ErrorCode::kValue, concat("stream: expected one of this device, got ", stream));
  }
  return stream == nullptr ? *lanes_.front() : **lane;
}

std::shared_ptr<AsyncDevice::Fence> AsyncDevice::ours(const World& world, const FencePtr& fence) {
  auto ours = std::dynamic_pointer_cast<Fence>(fence);
  if (!ours || !ours->is_of(world)) {
    fail(ErrorCode::kValue, "fence: expected one of this device");
  }
  return ours;
}

void* AsyncDevice::make_stream() { return make_lane(false).get(); }

void AsyncDevice::run(void* stream, std::function<void()> kernel) {
  lane_of(stream).put(std::move(kernel));
}

void AsyncDevice::synchronize(void* stream) { record(stream)->wait(); }

std::byte* AsyncDevice::at(const void* address, size_t bytes) const {
  const auto place = world_->device_place(address, bytes);
  if (!place) {
    fail(ErrorCode::kRuntime,
         concat("expected memory of the device, got ", bytes, " bytes at ", address));
  }
  return place->data;
}

void* AsyncDevice::allocate(size_t bytes) { return world_->allocate(bytes); }
void AsyncDevice::deallocate(void* memory, size_t bytes) noexcept {
  world_->deallocate(memory, bytes);
}
void* AsyncDevice::allocate_staging(size_t bytes) { return world_->allocate_staging(bytes); }
void AsyncDevice::deallocate_staging(void* memory, size_t bytes) noexcept {
  world_->deallocate_staging(memory, bytes);
}

std::shared_ptr<void> AsyncDevice::pin(const void* memory, size_t bytes) {
  world_->pin(memory, bytes);
  return {const_cast<void*>(memory),
          [world = world_, bytes](void* pinned) { world->unpin(pinned, bytes); }};
}

std::unique_ptr<CopyQueue> AsyncDevice::make_queue() {
  return std::make_unique<Queue>(world_, make_lane(true), options_);
}

FencePtr AsyncDevice::record(void* stream) {
  auto fence = std::make_shared<Fence>(*world_, 1);
  lane_of(stream).put([fence] { fence->pass(); });
  return fence;
}

std::shared_ptr<l3ext::Stall> AsyncDevice::wait(void* stream, std::span<const FencePtr> fences) {
  std::vector<std::shared_ptr<Fence>> open;
  for (const FencePtr& fence : fences) {
    if (fence) open.push_back(ours(*world_, fence));
  }
  Lane& lane = lane_of(stream);
  if (open.empty()) return nullptr;
  auto stall = std::make_shared<Stall>();
  lane.put([open = std::move(open), stall] {
    const auto began = std::chrono::steady_clock::now();
    for (const auto& fence : open) fence->block();
    stall->end(std::chrono::nanoseconds(std::chrono::steady_clock::now() - began).count());
  });
  return stall;
}

void AsyncDevice::pause_queues() { world_->set_paused(true); }
void AsyncDevice::resume_queues() { world_->set_paused(false); }
void AsyncDevice::fail_copy_call(int64_t n) { world_->fail_call(n); }
void AsyncDevice::lose_at_copy_call(int64_t n) { world_->lose_call(n); }

std::vector<std::string> AsyncDevice::faults() const { return world_->faults(); }
size_t AsyncDevice::allocated_bytes() const { return world_->allocated(); }
size_t AsyncDevice::staging_bytes() const { return world_->staging(); }
size_t AsyncDevice::pinned_bytes() const { return world_->pinned(); }
int64_t AsyncDevice::copied_bytes() const { return world_->copied_bytes; }

}  // namespace examples
