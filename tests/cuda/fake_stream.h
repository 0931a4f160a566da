// Streams and events of the stand-in driver.
#ifndef LOADMASTER_FAKE_STREAM_H
#define LOADMASTER_FAKE_STREAM_H

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace fake {

class Event;

/// Counts a wait of this name; true where FAKE_CUDA_DROP_WAITS names it.
bool drops_wait(const std::string& name);

/// Where an event was recorded: after which operation of which stream.
struct Place {
  std::shared_ptr<class Holds> holds;
  std::string stream, operation;
  uint64_t number = 0;
};

/// Operations of one stream that are held back until events of other streams come: so that who should have waited
/// for them, and does not, is sure to be first. Not for ever: it may need them after all.
class Holds {
 public:
  void add(uint64_t operation, std::shared_ptr<Event> until);
  void obey(uint64_t operation);

 private:
  std::mutex mutex_;
  std::multimap<uint64_t, std::shared_ptr<Event>> events_;
};

/// Tasks in order on a thread of its own. A caller's operation is what it queues between two records of events, and
/// is called by its last kernel or copy. A wait is named when the operation behind it is known, so it and what
/// follows are held back until that operation's record.
class Stream {
 public:
  Stream(uint64_t number, uint64_t seed);
  /// A kernel, a copy or a fill.
  void enqueue(const std::string& name, std::function<void()> task);
  /// What follows comes after the event's latest record.
  void wait(std::shared_ptr<Event> event);
  void record(std::shared_ptr<Event> event);
  /// Until everything enqueued so far is done.
  void synchronise();
  bool idle();
  void stop();

 private:
  struct Wait {
    std::shared_ptr<Event> event;
    uint64_t number;
    Place place;
  };
  void work(uint64_t seed);
  struct Task {
    std::function<void()> run;
    /// Of work, its operation's number; waits and records have none, and start at once.
    uint64_t operation;
  };
  void push(Task task);
  void hold(Task task);
  void release();
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  /// Waits whose operation is not known yet, and what was queued since.
  std::vector<Wait> waits_;
  std::vector<Task> held_;
  /// The last operation, and whether its record is still to come.
  std::string operation_;
  uint64_t operations_ = 0;
  /// The latest one that has begun.
  std::atomic<uint64_t> running_{0};
  bool open_ = false;
  std::shared_ptr<Holds> holds_ = std::make_shared<Holds>();
  uint64_t enqueued_ = 0, done_ = 0;
  bool stopping_ = false;
  const uint64_t number_;
};

/// The latest of its records counts, as for CUDA's events.
class Event {
 public:
  /// Called on the host when a record is enqueued: its number.
  uint64_t expect(const Place& place);
  void reach(uint64_t number);
  uint64_t latest();
  /// Of the latest record.
  Place place();
  /// By this thread, the latest one.
  bool recorded_here();
  void wait(uint64_t number);
  void wait_for(uint64_t number, std::chrono::milliseconds longest);
  bool reached(uint64_t number);
  std::chrono::steady_clock::time_point time();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t expected_ = 0, reached_ = 0;
  Place place_;
  std::thread::id recorder_;
  std::chrono::steady_clock::time_point time_;
};

}  // namespace fake

#endif
