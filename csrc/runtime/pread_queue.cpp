#include "runtime/pread_queue.hpp"

#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <csignal>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core/error.hpp"

namespace l3ext {
namespace {

RawResult pread_once(int fd, const RawRead& read) {
  const ssize_t got = ::pread(fd, read.to, read.bytes, read.offset);
  return {read.tag, got < 0 ? -errno : got};
}

// At a depth of 1 nobody but the caller waits: it may as well read.
class CallersQueue final : public ReadQueue {
 public:
  explicit CallersQueue(int fd) : fd_(fd) {}
  void push(const RawRead& read) override { read_ = read; }
  RawResult pop() override { return pread_once(fd_, read_); }

 private:
  const int fd_;
  RawRead read_;
};

}  // namespace

struct PreadThreads::Shared {
  struct Results {
    std::condition_variable arrived;
    std::vector<RawResult> complete;  // of a capacity that suffices: a thread must not fail
  };
  struct Job {
    RawRead read;
    Results* results;
  };

  void work(int fd) {
    std::unique_lock lock(mutex);
    while (true) {
      pushed.wait(lock, [&] { return stopping || !jobs.empty(); });
      if (stopping) return;
      const Job job = jobs.front();
      jobs.pop_front();
      lock.unlock();
      const RawResult result = pread_once(fd, job.read);
      lock.lock();
      job.results->complete.push_back(result);
      job.results->arrived.notify_one();
    }
  }

  std::mutex mutex;  // guards all below and every Results; the threads are their owner's
  std::condition_variable pushed;
  std::deque<Job> jobs;
  bool stopping = false;
  std::vector<std::thread> threads;
};

// One reader's share of the threads.
class PreadThreads::Queue final : public ReadQueue {
 public:
  Queue(Shared& shared, int depth) : shared_(shared), results_(std::make_unique<Results>()) {
    results_->complete.reserve(static_cast<size_t>(depth));
  }
  ~Queue() override {
    if (!home_.is_here()) {  // see ~PreadThreads
      [[maybe_unused]] auto* left = results_.release();
      return;
    }
    while (on_their_way_ > 0) pop();
  }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  void push(const RawRead& read) override {
    {
      const std::scoped_lock lock(shared_.mutex);
      shared_.jobs.push_back({read, results_.get()});
    }
    ++on_their_way_;
    shared_.pushed.notify_one();
  }
  RawResult pop() override {
    std::unique_lock lock(shared_.mutex);
    results_->arrived.wait(lock, [&] { return !results_->complete.empty(); });
    const RawResult result = results_->complete.back();
    results_->complete.pop_back();
    --on_their_way_;
    return result;
  }

 private:
  using Results = Shared::Results;

  Shared& shared_;
  std::unique_ptr<Results> results_;
  int on_their_way_ = 0;
  const HomeProcess home_;
};

PreadThreads::PreadThreads(int fd) : fd_(fd), shared_(std::make_unique<Shared>()) {}

PreadThreads::~PreadThreads() {
  if (!home_.is_here()) {
    // A child of fork() has neither the threads nor, perhaps, a mutex in a usable state.
    [[maybe_unused]] auto* left = shared_.release();
    return;
  }
  {
    const std::scoped_lock lock(shared_->mutex);
    shared_->stopping = true;
  }
  shared_->pushed.notify_all();
  for (std::thread& thread : shared_->threads) thread.join();
}

std::unique_ptr<ReadQueue> PreadThreads::make_queue(int depth) {
  if (depth == 1) return std::make_unique<CallersQueue>(fd_);
  home_.check("open file");
  const std::scoped_lock lock(growing_);
  // Signals are for the caller's threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    while (std::ssize(shared_->threads) < depth) {
      shared_->threads.emplace_back([shared = shared_.get(), fd = fd_] { shared->work(fd); });
    }
  } catch (const std::system_error& error) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw Error(ErrorCode::kRuntime,
                concat("cannot start the ", depth, " threads that read: ", error.what()));
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return std::make_unique<Queue>(*shared_, depth);
}

}  // namespace l3ext
