// Scouts in threads of their own, which guess the stretches of a corpus ahead of its parse. The
// parse comes for them in order; one that nobody has begun it guesses itself, and for one that is
// on its way it does not wait while there is a later one to guess: so all are busy, whoever is
// faster.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>

#include "lzw/scout.hpp"
#include "lzw/team.hpp"

namespace l3ext::lzw {

class Scouts {
 public:
  // Guesses a stretch; called by several threads, each with a scout that nobody else uses then.
  // Throws std::bad_alloc: the stretch then has no guesses.
  using Guessing = std::function<std::span<Guess>(Scout& scout, int64_t stretch)>;

  Scouts(Team& team, const Dictionary& dictionary, int64_t num_stretches, Guessing guessing);
  ~Scouts() { pause(); }
  Scouts(const Scouts&) = delete;
  Scouts& operator=(const Scouts&) = delete;

  // The stretch's guesses, until the next call. Each call goes on to a later stretch.
  std::span<const Guess> take(int64_t stretch);
  // Until the next take(), nobody else reads the dictionary.
  void pause();

 private:
  // Far enough ahead that the parse finds a stretch when it comes, and near enough that most
  // guesses hold.
  static constexpr int64_t kAhead = 4;
  struct alignas(64) Stretch {
    Scout scout;
    std::span<Guess> guesses;
    int64_t number = -1;  // of the stretch whose guesses these are
  };

  Stretch& place_of(int64_t stretch) { return stretches_[static_cast<size_t>(stretch % kAhead)]; }
  bool claimable() const;
  void guess_next(std::unique_lock<std::mutex>& lock);
  void scout();
  void look_up_again();

  Team& team_;
  const Dictionary& dictionary_;
  const int64_t num_stretches_;
  const Guessing guessing_;
  const Team::Job job_ = [this](size_t) { scout(); };

  std::mutex mutex_;
  std::condition_variable may_guess_;  // for the scouts
  std::condition_variable guessed_;    // for the parse
  std::array<Stretch, kAhead> stretches_;
  int64_t parsing_ = 0;  // the stretch that was taken last
  int64_t claimed_ = 0;  // stretches before it are guessed, or on their way
  bool paused_ = true;
};

}  // namespace l3ext::lzw
