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
#include "runtime/read_queue.hpp"

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

class ThreadsQueue final : public ReadQueue {
 public:
  ThreadsQueue(int fd, int depth) : fd_(fd), shared_(std::make_unique<Shared>()) {
    // Signals are for the caller's threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (int i = 0; i < depth; ++i) shared_->threads.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      stop();
      throw Error(ErrorCode::kRuntime,
                  concat("cannot start the ", depth, " threads of a reader: ", error.what()));
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
  ~ThreadsQueue() override {
    if (process_ == ::getpid()) {
      stop();
    } else {
      // A child of fork() has neither the threads nor, perhaps, a usable mutex.
      static_cast<void>(shared_.release());
    }
  }
  ThreadsQueue(const ThreadsQueue&) = delete;
  ThreadsQueue& operator=(const ThreadsQueue&) = delete;

  void push(const RawRead& read) override {
    {
      const std::scoped_lock lock(shared_->mutex);
      shared_->waiting.push_back(read);
    }
    shared_->pushed.notify_one();
  }
  RawResult pop() override {
    std::unique_lock lock(shared_->mutex);
    shared_->popped.wait(lock, [&] { return !shared_->complete.empty(); });
    const RawResult result = shared_->complete.front();
    shared_->complete.pop_front();
    return result;
  }

 private:
  struct Shared {
    std::mutex mutex;  // guards all below but the threads
    std::condition_variable pushed, popped;
    std::deque<RawRead> waiting;
    std::deque<RawResult> complete;
    bool stopping = false;
    std::vector<std::thread> threads;
  };

  void work() {
    Shared& shared = *shared_;
    std::unique_lock lock(shared.mutex);
    while (true) {
      shared.pushed.wait(lock, [&] { return shared.stopping || !shared.waiting.empty(); });
      if (shared.stopping) return;
      const RawRead read = shared.waiting.front();
      shared.waiting.pop_front();
      lock.unlock();
      const RawResult result = pread_once(fd_, read);
      lock.lock();
      shared.complete.push_back(result);
      shared.popped.notify_one();
    }
  }
  void stop() {
    {
      const std::scoped_lock lock(shared_->mutex);
      shared_->stopping = true;
    }
    shared_->pushed.notify_all();
    for (std::thread& thread : shared_->threads) thread.join();
  }

  const int fd_;
  const pid_t process_ = ::getpid();
  std::unique_ptr<Shared> shared_;
};

}  // namespace

std::unique_ptr<ReadQueue> make_pread_queue(int fd, int depth) {
  if (depth == 1) return std::make_unique<CallersQueue>(fd);
  return std::make_unique<ThreadsQueue>(fd, depth);
}

}  // namespace l3ext
