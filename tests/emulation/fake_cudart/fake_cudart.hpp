// A CUDA runtime without a device, so that csrc/runtime/cuda/*.cpp run anywhere: two devices whose
// streams do their work later, in their own order and a random one between each other (a seed fixes
// it), a little of it in every call. Calls that CUDA would refuse are refused. Thread-safe.
//
// Not faked: a graph's capture and launch by CUDA's own names (begin_capture() and replay() do what
// these do), kernels, more than one process, time (a tick passes with every piece of work).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace fake_cudart {

struct Options {
  uint64_t seed = 0;
  int driver = 13000;
  bool read_only_pins = true;       // cudaDevAttrHostRegisterReadOnlySupported
  bool host_pointers = true;        // cudaDevAttrCanUseHostPointerForRegisteredMem
  size_t memory = size_t{1} << 30;  // of each device
  size_t lockable = size_t{1} << 30;
  int most_batches = std::numeric_limits<int>::max();  // further ones are refused
};

// Forgets everything; what is still there, and faults that nobody took, go to stderr.
void reset(const Options& options);

// What exists now, or happened since reset().
struct Counts {
  int streams = 0, events = 0, allocations = 0, registrations = 0;
  int events_made = 0, batches = 0, single_copies = 0, host_waits = 0;
};
Counts counts();

// Copies from memory that is not pinned, use of what is gone, calls that CUDA would refuse; since
// they were last asked for.
std::vector<std::string> take_faults();

// Work as a kernel would do it, in the order of the stream (null: the current device's default
// one).
void run(cudaStream_t stream, std::function<void()> kernel);
void finish_all();         // does all work
void hold(bool held);      // streams stand still until something has to wait for them
void set_capturing(bool);  // another thread captures a graph in global mode
void set_capturing(cudaStream_t stream);  // this stream does; null: none
// A graph takes what is put into the stream, and into streams that wait for it, until the end. It
// is a fault if one of them waits for work outside, or if the stream does not wait for their last.
// Null where it is.
struct Graph;
void begin_capture(cudaStream_t stream);
std::shared_ptr<Graph> end_capture(cudaStream_t stream);
// Puts the graph's work into the stream; all that it does not order itself goes in random order.
void replay(const std::shared_ptr<Graph>& graph, cudaStream_t stream);
void lose_devices();  // from now on all fails, as after an illegal address
unsigned last_register_flags();

}  // namespace fake_cudart
