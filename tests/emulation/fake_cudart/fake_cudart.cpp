#include "fake_cudart.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <utility>

namespace fake_cudart {
namespace {

constexpr int kDevices = 2;

struct EventState {
  int device = 0;
  bool timed = false;
  int64_t recorded = 0;          // how often
  std::set<int64_t> pending;     // which of these are still to be done
  int64_t time = 0;              // ticks, of the last one done
  std::shared_ptr<Graph> graph;  // that captured the last record
  std::set<size_t> nodes;        // of the graph: what it is a point after

  bool done(int64_t record) const { return !pending.contains(record); }
  bool done() const { return done(recorded); }
};

struct Work {
  std::function<void()> run;
  std::shared_ptr<EventState> event;  // to wait for, as it was recorded then
  int64_t record = 0;
};

}  // namespace

struct Graph {
  struct Node {
    std::function<void()> run;
    std::set<size_t> after;
  };
  std::vector<Node> nodes;
  bool valid = true;
};

}  // namespace fake_cudart

struct FakeStream {
  int device = 0;
  bool destroyed = false;
  std::deque<fake_cudart::Work> work = {};
  std::shared_ptr<fake_cudart::Graph> graph = {};  // that captures it; null: none
  std::set<size_t> nodes = {};                     // of the graph: what its next work comes after
};
struct FakeEvent {
  std::shared_ptr<fake_cudart::EventState> state;
};

namespace fake_cudart {
namespace {

struct World {
  std::recursive_mutex mutex;
  Options options;
  std::mt19937_64 random;
  std::vector<std::unique_ptr<FakeStream>> streams;  // the first: the devices' default streams
  std::set<FakeEvent*> events;
  std::map<char*, size_t> device_memory[kDevices];
  std::map<char*, size_t> registered;
  Counts counts;
  std::vector<std::string> faults;
  int64_t ticks = 0;
  bool held = false, lost = false, capturing = false;
  cudaStream_t captured = nullptr;
  unsigned register_flags = 0;
  cudaError_t last_error = cudaSuccess;  // of a refused batch; other calls leave none here
};
World world;
thread_local int current_device = 0;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
using Lock = std::lock_guard<std::recursive_mutex>;

void fault(const std::string& text) { world.faults.push_back(text); }

bool ready(const FakeStream& stream) {
  if (stream.work.empty()) return false;
  const Work& next = stream.work.front();
  return !next.event || next.event->done(next.record);
}

// Does one piece of work of some stream; false where none can be done.
bool advance() {
  std::vector<FakeStream*> candidates;
  for (const auto& stream : world.streams) {
    if (ready(*stream)) candidates.push_back(stream.get());
  }
  if (candidates.empty()) return false;
  FakeStream& stream = *candidates[world.random() % candidates.size()];
  const Work work = std::move(stream.work.front());
  stream.work.pop_front();
  ++world.ticks;
  if (work.run) work.run();
  return true;
}

bool breaks_a_capture() {
  if (!world.capturing || capture_mode != cudaStreamCaptureModeGlobal) return false;
  fault("a call that breaks another thread's capture");
  return true;
}

// What every call does first: some time passes.
cudaError_t enter(bool unsafe_in_capture = false) {
  if (world.lost) return cudaErrorIllegalAddress;
  if (unsafe_in_capture && breaks_a_capture()) return cudaErrorStreamCaptureUnsupported;
  if (!world.held) {
    for (uint64_t i = world.random() % 3; i > 0 && advance(); --i) {
    }
  }
  return cudaSuccess;
}

FakeStream* find(cudaStream_t stream) {
  if (stream == nullptr) return world.streams[static_cast<size_t>(current_device)].get();
  for (const auto& known : world.streams) {
    if (known.get() == stream && !known->destroyed) return known.get();
  }
  fault("use of a stream that does not exist");
  return nullptr;
}
bool known(cudaEvent_t event) {
  if (world.events.contains(event)) return true;
  fault("use of an event that does not exist");
  return false;
}

void put(FakeStream& stream, std::function<void()> run) {
  if (!stream.graph) return stream.work.push_back({std::move(run), nullptr, 0});
  auto& nodes = stream.graph->nodes;
  nodes.push_back({std::move(run), stream.nodes});
  stream.nodes = {nodes.size() - 1};
}

bool within(const std::map<char*, size_t>& ranges, const void* p, size_t bytes) {
  auto* begin = static_cast<char*>(const_cast<void*>(p));
  auto entry = ranges.upper_bound(begin);
  if (entry == ranges.begin()) return false;
  --entry;
  return begin + bytes <= entry->first + entry->second;
}
bool on_device(const void* p, size_t bytes) {
  return std::ranges::any_of(world.device_memory,
                             [&](const auto& ranges) { return within(ranges, p, bytes); });
}

std::function<void()> copy_work(void* target, const void* source, size_t bytes) {
  return [=] {
    if (!on_device(target, bytes)) return fault("a copy to what is no device memory");
    if (!on_device(source, bytes) && !within(world.registered, source, bytes)) {
      return fault("a copy from memory that is not pinned");
    }
    std::memcpy(target, source, bytes);
  };
}

void count_what_is_left() {
  const auto leak = [](const char* what, size_t count) {
    if (count > 0) fault(std::to_string(count) + " " + what + " left");
  };
  leak("events", world.events.size());
  leak("registrations", world.registered.size());
  leak("allocations", world.device_memory[0].size() + world.device_memory[1].size());
  leak("streams", static_cast<size_t>(world.counts.streams));
}

}  // namespace

void reset(const Options& options) {
  const Lock lock(world.mutex);
  count_what_is_left();
  for (const std::string& text : world.faults)
    std::fprintf(stderr, "fake_cudart: %s\n", text.c_str());
  world.options = options;
  world.random.seed(options.seed);
  world.streams.clear();
  for (int i = 0; i < kDevices; ++i) {
    world.streams.push_back(std::make_unique<FakeStream>(FakeStream{i}));
    for (const auto& [begin, bytes] : world.device_memory[i]) std::free(begin);
    world.device_memory[i].clear();
  }
  world.events.clear();
  world.registered.clear();
  world.counts = {};
  world.faults.clear();
  world.held = world.lost = world.capturing = false;
  world.captured = nullptr;
  world.last_error = cudaSuccess;
}

Counts counts() {
  const Lock lock(world.mutex);
  Counts counts = world.counts;
  counts.events = static_cast<int>(world.events.size());
  counts.allocations =
      static_cast<int>(world.device_memory[0].size() + world.device_memory[1].size());
  counts.registrations = static_cast<int>(world.registered.size());
  return counts;
}
std::vector<std::string> take_faults() {
  const Lock lock(world.mutex);
  return std::exchange(world.faults, {});
}
void run(cudaStream_t stream, std::function<void()> kernel) {
  const Lock lock(world.mutex);
  if (FakeStream* found = find(stream)) put(*found, std::move(kernel));
}
void begin_capture(cudaStream_t stream) {
  const Lock lock(world.mutex);
  find(stream)->graph = std::make_shared<Graph>();
}
std::shared_ptr<Graph> end_capture(cudaStream_t stream) {
  const Lock lock(world.mutex);
  FakeStream& origin = *find(stream);
  const std::shared_ptr<Graph> graph = origin.graph;
  std::vector<size_t> open(origin.nodes.begin(), origin.nodes.end());
  std::set<size_t> before = origin.nodes;  // all that the stream has waited for
  while (!open.empty()) {
    const size_t node = open.back();
    open.pop_back();
    for (const size_t other : graph->nodes[node].after) {
      if (before.insert(other).second) open.push_back(other);
    }
  }
  for (const auto& other : world.streams) {
    if (other->graph != graph) continue;
    if (!std::ranges::includes(before, other->nodes)) {
      fault("a capture that ends without a stream that it forked");
      graph->valid = false;
    }
    other->graph = nullptr;
    other->nodes.clear();
  }
  return graph->valid ? graph : nullptr;
}
void replay(const std::shared_ptr<Graph>& graph, cudaStream_t stream) {
  run(stream, [graph] {
    std::set<size_t> done;
    while (done.size() < graph->nodes.size()) {
      std::vector<size_t> candidates;
      for (size_t i = 0; i < graph->nodes.size(); ++i) {
        if (!done.contains(i) && std::ranges::includes(done, graph->nodes[i].after)) {
          candidates.push_back(i);
        }
      }
      const size_t next = candidates[world.random() % candidates.size()];
      graph->nodes[next].run();
      done.insert(next);
    }
  });
}
void finish_all() {
  const Lock lock(world.mutex);
  while (advance()) {
  }
}
void hold(bool held) {
  const Lock lock(world.mutex);
  world.held = held;
}
void set_capturing(bool capturing) {
  const Lock lock(world.mutex);
  world.capturing = capturing;
}
void set_capturing(cudaStream_t stream) {
  const Lock lock(world.mutex);
  world.captured = stream;
}
void lose_devices() {
  const Lock lock(world.mutex);
  world.lost = true;
}
unsigned last_register_flags() {
  const Lock lock(world.mutex);
  return world.register_flags;
}

}  // namespace fake_cudart

using namespace fake_cudart;

cudaError_t cudaGetLastError() {
  const Lock lock(world.mutex);
  return std::exchange(world.last_error, cudaSuccess);
}
const char* cudaGetErrorString(cudaError_t) { return "a fake error"; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = world.options.driver;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = {"fake", 9, 0, world.options.memory};
  return device < kDevices ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrHostRegisterReadOnlySupported ? world.options.read_only_pins
           : attribute == cudaDevAttrCanUseHostPointerForRegisteredMem ? world.options.host_pointers
                                                                       : 132;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int device) {
  std::snprintf(id, static_cast<size_t>(bytes), "FFFF:%02X:00.0", device);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  const Lock lock(world.mutex);
  if (const auto error = enter(); error != cudaSuccess) return error;
  if (flags != cudaStreamNonBlocking) fault("a stream that blocks on the default one");
  world.streams.push_back(std::make_unique<FakeStream>(FakeStream{current_device}));
  *stream = world.streams.back().get();
  ++world.counts.streams;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(world.mutex);
  FakeStream* found = find(stream);
  if (found == nullptr) return cudaErrorInvalidResourceHandle;
  found->destroyed = true;  // its work goes on
  --world.counts.streams;
  return enter();
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Lock lock(world.mutex);
  const auto error = enter(true);
  FakeStream* found = find(stream);
  while (error == cudaSuccess && !found->work.empty() && advance()) {
  }
  return error;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const Lock lock(world.mutex);
  if (const auto error = enter(); error != cudaSuccess) return error;
  FakeStream* found = find(stream);
  if (found == nullptr || !known(event)) return cudaErrorInvalidResourceHandle;
  const EventState& state = *event->state;
  if (state.graph) {
    if (found->graph && found->graph != state.graph) fault("a capture that waits for another");
    found->graph = state.graph;  // from now on it is captured too
    found->nodes.insert(state.nodes.begin(), state.nodes.end());
    return cudaSuccess;
  }
  if (found->graph) {
    fault("a capture that waits for work outside");
    found->graph->valid = false;
    return cudaErrorInvalidValue;
  }
  found->work.push_back({nullptr, event->state, state.recorded});
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Lock lock(world.mutex);
  const bool captured = stream != nullptr && (stream == world.captured || stream->graph);
  *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  const Lock lock(world.mutex);
  if (const auto error = enter(); error != cudaSuccess) return error;
  auto state = std::make_shared<EventState>();
  state->device = current_device;
  state->timed = (flags & cudaEventDisableTiming) == 0;
  *event = new FakeEvent{std::move(state)};
  world.events.insert(*event);
  ++world.counts.events_made;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Lock lock(world.mutex);
  if (!known(event)) return cudaErrorInvalidResourceHandle;
  world.events.erase(event);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Lock lock(world.mutex);
  if (const auto error = enter(); error != cudaSuccess) return error;
  FakeStream* found = find(stream);
  if (found == nullptr || !known(event)) return cudaErrorInvalidResourceHandle;
  if (event->state->device != found->device) {
    fault("an event recorded on another device's stream");
    return cudaErrorInvalidResourceHandle;
  }
  event->state->graph = found->graph;
  event->state->nodes = found->nodes;
  if (found->graph) return cudaSuccess;  // a point of the graph, which no host can ask for
  const int64_t record = ++event->state->recorded;
  event->state->pending.insert(record);
  found->work.push_back({[state = event->state, record] {
                           state->pending.erase(record);
                           state->time = world.ticks;
                         },
                         nullptr, 0});
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Lock lock(world.mutex);
  if (const auto error = enter(true); error != cudaSuccess) return error;
  if (!known(event)) return cudaErrorInvalidResourceHandle;
  if (event->state->graph) fault("a question about a captured event");
  return event->state->done() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Lock lock(world.mutex);
  if (const auto error = enter(true); error != cudaSuccess) return error;
  if (!known(event)) return cudaErrorInvalidResourceHandle;
  if (!event->state->done()) ++world.counts.host_waits;
  while (!event->state->done()) {
    if (advance()) continue;
    fault("a wait that never ends");
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  const Lock lock(world.mutex);
  if (!known(begin) || !known(end)) return cudaErrorInvalidResourceHandle;
  const EventState &first = *begin->state, &last = *end->state;
  if (!first.timed || !last.timed || first.recorded == 0 || last.recorded == 0) {
    fault("elapsed time of events that have none");
    return cudaErrorInvalidResourceHandle;
  }
  if (!first.done() || !last.done()) return cudaErrorNotReady;
  *milliseconds = static_cast<float>(last.time - first.time);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  const Lock lock(world.mutex);
  if (const auto error = enter(true); error != cudaSuccess) return error;
  auto& ranges = world.device_memory[current_device];
  size_t used = 0;
  for (const auto& [begin, size] : ranges) used += size;
  if (bytes > world.options.memory - used) return cudaErrorMemoryAllocation;
  auto* begin = static_cast<char*>(std::malloc(bytes));
  std::memset(begin, 0xff, bytes);
  ranges[begin] = bytes;
  *memory = begin;
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  const Lock lock(world.mutex);
  if (const auto error = enter(true); error != cudaSuccess) return error;
  while (advance()) {  // as CUDA does
  }
  for (auto& ranges : world.device_memory) {
    if (ranges.erase(static_cast<char*>(memory)) > 0) {
      std::free(memory);
      return cudaSuccess;
    }
  }
  if (memory != nullptr) fault("cudaFree of what was not allocated");
  return cudaErrorInvalidValue;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = world.options.memory;
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned flags) {
  const Lock lock(world.mutex);
  if (const auto error = enter(true); error != cudaSuccess) return error;
  auto* begin = static_cast<char*>(memory);
  size_t locked = 0;
  for (const auto& [other, size] : world.registered) {
    if (begin < other + size && other < begin + bytes) return cudaErrorHostMemoryAlreadyRegistered;
    locked += size;
  }
  if (locked + bytes > world.options.lockable) return cudaErrorMemoryAllocation;
  world.registered[begin] = bytes;
  world.register_flags = flags;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* memory) {
  const Lock lock(world.mutex);
  if (breaks_a_capture()) return cudaErrorStreamCaptureUnsupported;
  if (world.registered.erase(static_cast<char*>(memory)) > 0) return cudaSuccess;
  fault("cudaHostUnregister of what was not registered");
  return cudaErrorHostMemoryNotRegistered;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  const Lock lock(world.mutex);
  attributes->type = on_device(p, 1)                  ? cudaMemoryTypeDevice
                     : within(world.registered, p, 1) ? cudaMemoryTypeHost
                                                      : cudaMemoryTypeUnregistered;
  attributes->devicePointer =
      attributes->type == cudaMemoryTypeUnregistered ? nullptr : const_cast<void*>(p);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  const Lock lock(world.mutex);
  if (const auto error = enter(); error != cudaSuccess) return error;
  ++world.counts.single_copies;
  run(stream, copy_work(target, source, bytes));
  return cudaSuccess;
}
cudaError_t cudaMemcpyBatchAsync(void* const* targets, const void* const* sources,
                                 const size_t* sizes, size_t count,
                                 cudaMemcpyAttributes* attributes, size_t* first_indices,
                                 size_t num_attributes, cudaStream_t stream) {
  const Lock lock(world.mutex);
  if (const auto error = enter(); error != cudaSuccess) return error;
  const bool valid = stream != nullptr && count > 0 && num_attributes == 1 &&
                     first_indices[0] == 0 &&
                     attributes[0].srcAccessOrder == cudaMemcpySrcAccessOrderStream &&
                     std::all_of(sizes, sizes + count, [](size_t size) { return size > 0; });
  if (!valid) {
    fault("a batch that CUDA refuses");
    return cudaErrorInvalidValue;
  }
  if (world.counts.batches >= world.options.most_batches) {
    return world.last_error = cudaErrorInvalidValue;
  }
  ++world.counts.batches;
  std::vector<std::function<void()>> copies;
  for (size_t i = 0; i < count; ++i) copies.push_back(copy_work(targets[i], sources[i], sizes[i]));
  std::shuffle(copies.begin(), copies.end(), world.random);
  for (auto& copy : copies) run(stream, std::move(copy));
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream) {
  const Lock lock(world.mutex);
  if (const auto error = enter(); error != cudaSuccess) return error;
  run(stream, [=] {
    if (bytes > 0 && !on_device(target, bytes)) return fault("a fill of what is no device memory");
    std::memset(target, value, bytes);
  });
  return cudaSuccess;
}
