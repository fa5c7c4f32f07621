#include "lzw/scouts.hpp"

#include <algorithm>
#include <new>
#include <utility>

namespace l3ext::lzw {

Scouts::Scouts(Team& team, const Dictionary& dictionary, int64_t num_stretches, Guessing guessing)
    : team_(team),
      dictionary_(dictionary),
      num_stretches_(num_stretches),
      guessing_(std::move(guessing)) {}

bool Scouts::claimable() const { return claimed_ < std::min(num_stretches_, parsing_ + kAhead); }

// Unlocked while it works.
void Scouts::guess_next(std::unique_lock<std::mutex>& lock) {
  const int64_t stretch = claimed_++;
  Stretch& place = place_of(stretch);
  lock.unlock();
  std::span<Guess> guesses;
  try {
    guesses = guessing_(place.scout, stretch);
  } catch (const std::bad_alloc&) {  // NOLINT(bugprone-empty-catch)
    // The parse needs no guesses; if it lacks memory too, it says so.
  }
  lock.lock();
  place.guesses = guesses;
  place.number = stretch;
}

void Scouts::scout() {
  std::unique_lock lock(mutex_);
  for (;;) {
    may_guess_.wait(lock, [&] { return paused_ || claimable(); });
    if (paused_) return;
    guess_next(lock);
    guessed_.notify_one();
  }
}

std::span<const Guess> Scouts::take(int64_t stretch) {
  std::unique_lock lock(mutex_);
  // A phrase may be longer than a stretch: its place is free only once it is guessed.
  for (; parsing_ < stretch; ++parsing_) {
    guessed_.wait(lock,
                  [&] { return parsing_ >= claimed_ || place_of(parsing_).number == parsing_; });
  }
  claimed_ = std::max(claimed_, stretch);
  if (std::exchange(paused_, false)) {
    look_up_again();
    team_.start(job_);
  } else if (claimed_ - stretch <= kAhead / 2) {
    may_guess_.notify_all();  // seldom: to wake a thread takes as long as many phrases
  }
  const Stretch& place = place_of(stretch);
  while (place.number != stretch) {
    if (claimable()) {
      guess_next(lock);
    } else {
      guessed_.wait(lock);
    }
  }
  return place.guesses;
}

void Scouts::pause() {
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(paused_, true)) return;
  }
  may_guess_.notify_all();
  team_.wait();
}

// The dictionary may have grown: the answers to what was guessed lie in other lines.
void Scouts::look_up_again() {
  for (Stretch& stretch : stretches_) {
    if (stretch.number < parsing_) continue;
    for (Guess& guess : stretch.guesses) guess.probe = dictionary_.again(guess.probe);
  }
}

}  // namespace l3ext::lzw
