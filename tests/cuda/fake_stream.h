// Streams and events of the stand-in driver.
#ifndef LOADMASTER_FAKE_STREAM_H
#define LOADMASTER_FAKE_STREAM_H

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>

namespace fake {

/// Tasks in order on a thread of its own.
class Stream {
 public:
  Stream(uint64_t number, uint64_t seed);
  void enqueue(std::function<void()> task);
  /// Until everything enqueued so far is done.
  void synchronise();
  bool idle();
  void stop();
  /// The how many-th stream it is, from 0.
  uint64_t number() const { return number_; }

 private:
  void work(uint64_t seed);
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  uint64_t enqueued_ = 0, done_ = 0;
  bool stopping_ = false;
  const uint64_t number_;
};

/// The latest of its records counts, as for CUDA's events.
class Event {
 public:
  /// Called on the host when a record is enqueued on a stream: its number.
  uint64_t expect(uint64_t stream);
  void reach(uint64_t number);
  uint64_t latest();
  /// The stream of the latest record.
  uint64_t stream();
  void wait(uint64_t number);
  bool reached(uint64_t number);
  std::chrono::steady_clock::time_point time();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t expected_ = 0, reached_ = 0, stream_ = 0;
  std::chrono::steady_clock::time_point time_;
};

}  // namespace fake

#endif
