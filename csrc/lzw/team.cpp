#include "lzw/team.hpp"

#include <system_error>

namespace l3ext::lzw {

Team::Team(int num_threads) {
  if (num_threads <= 1) return;
  threads_.reserve(static_cast<size_t>(num_threads) - 1);
  try {
    for (int t = 1; t < num_threads; ++t) {
      threads_.emplace_back([this, t] { work(static_cast<size_t>(t)); });
    }
  } catch (const std::system_error&) {  // NOLINT(bugprone-empty-catch)
    // As many as there are.
  }
}

Team::~Team() {
  wait();
  {
    const std::lock_guard lock(mutex_);
    job_ = nullptr;
    ++jobs_;
  }
  begin_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Team::start(const Job& job) {
  {
    const std::lock_guard lock(mutex_);
    job_ = &job;
    ++jobs_;
    working_ = threads_.size();
  }
  begin_.notify_all();
}

void Team::wait() {
  std::unique_lock lock(mutex_);
  end_.wait(lock, [&] { return working_ == 0; });
}

void Team::work(size_t thread) {
  std::unique_lock lock(mutex_);
  for (uint64_t done = 0;;) {
    begin_.wait(lock, [&] { return jobs_ > done; });
    done = jobs_;
    if (job_ == nullptr) return;
    const Job& job = *job_;
    lock.unlock();
    job(thread);
    lock.lock();
    if (--working_ == 0) end_.notify_all();
  }
}

}  // namespace l3ext::lzw
