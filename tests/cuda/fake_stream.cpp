// Streams and events: see fake_stream.h.
#include "fake_stream.h"
#include "fake.h"

#include <random>

namespace fake {

bool drops_wait(const std::string& name) {
  static const char* dropped = getenv("FAKE_CUDA_DROP_WAITS");
  fakeCudaCount("waits", 1);
  fakeCudaCount(("wait " + name).c_str(), 1);
  if (!dropped || name != dropped) return false;
  // Of one name all are met in the order of their stream.
  static std::atomic<uint64_t> met{0};
  static const uint64_t only = setting("FAKE_CUDA_DROP_ONE", UINT64_MAX);
  uint64_t number = met++;
  return only == UINT64_MAX || number == only;
}

Stream::Stream(uint64_t number, uint64_t seed) : number_(number) {
  // Detached: the process may end while a stream has nothing to do.
  std::thread([this, seed] { work(seed); }).detach();
}

void Stream::push(Task task) {
  tasks_.push_back(std::move(task));
  changed_.notify_all();
}

/// Behind the waits that have no name yet.
void Stream::hold(Task task) {
  enqueued_++;
  if (waits_.empty()) {
    push(std::move(task));
  } else {
    held_.push_back(std::move(task));
  }
}

void Stream::enqueue(const std::string& name, std::function<void()> task) {
  std::lock_guard<std::mutex> lock(mutex_);
  operation_ = name;
  operations_ += !open_;
  open_ = true;
  hold({std::move(task), operations_});
  fakeCudaMost("operations queued at most", operations_ - running_);
}

void Stream::wait(std::shared_ptr<Event> event) {
  std::lock_guard<std::mutex> lock(mutex_);
  // A wait in the middle of an operation would belong to the next one.
  if (open_) release();
  waits_.push_back({event, event->latest(), event->place()});
}

void Stream::record(std::shared_ptr<Event> event) {
  std::lock_guard<std::mutex> lock(mutex_);
  uint64_t number = event->expect({holds_, std::to_string(number_), operation_, operations_});
  hold({[event, number] { event->reach(number); }, 0});
  // One before the operation marks its start.
  if (open_) release();
}

/// The operation is whole: its waits have names now.
void Stream::release() {
  auto done = std::make_shared<Event>();
  uint64_t end = done->expect({});
  for (Wait& wait : waits_) {
    const Place& place = wait.place;
    if (drops_wait(std::to_string(number_) + " " + operation_ + " > " + place.stream + " " + place.operation)) {
      place.holds->add(place.number, done);
      continue;
    }
    enqueued_++;
    push({[event = wait.event, number = wait.number] { event->wait(number); }, 0});
  }
  for (auto& task : held_) push(std::move(task));
  if (!waits_.empty()) {
    enqueued_++;
    push({[done, end] { done->reach(end); }, 0});
  }
  waits_.clear();
  held_.clear();
  open_ = false;
}

void Holds::add(uint64_t operation, std::shared_ptr<Event> until) {
  std::lock_guard<std::mutex> lock(mutex_);
  events_.emplace(operation, std::move(until));
}

void Holds::obey(uint64_t operation) {
  std::vector<std::shared_ptr<Event>> events;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto [first, last] = events_.equal_range(operation);
    for (auto at = first; at != last; ++at) events.push_back(at->second);
    events_.erase(first, last);
  }
  for (auto& event : events) event->wait_for(1, std::chrono::milliseconds(300));
}

void Stream::synchronise() {
  std::unique_lock<std::mutex> lock(mutex_);
  release();
  uint64_t wanted = enqueued_;
  changed_.wait(lock, [&] { return done_ >= wanted; });
}

bool Stream::idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  release();
  return done_ == enqueued_;
}

void Stream::stop() {
  std::lock_guard<std::mutex> lock(mutex_);
  release();
  stopping_ = true;
  changed_.notify_all();
}

void Stream::work(uint64_t seed) {
  std::mt19937_64 random(seed);
  const uint64_t slow = setting("FAKE_CUDA_DELAY_STREAM", number_);
  const uint64_t longest = slow == number_ ? setting("FAKE_CUDA_DELAY_US", 0) : 0;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return !tasks_.empty() || stopping_; });
    // A destroyed stream finishes its tasks first.
    if (tasks_.empty()) break;
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    if (longest && task.operation) std::this_thread::sleep_for(std::chrono::microseconds(random() % (longest + 1)));
    if (task.operation) {
      running_ = task.operation;
      holds_->obey(task.operation);
    }
    task.run();
    task.run = nullptr;
    lock.lock();
    done_++;
    changed_.notify_all();
  }
  lock.unlock();
  delete this;
}

uint64_t Event::expect(const Place& place) {
  std::lock_guard<std::mutex> lock(mutex_);
  place_ = place;
  recorder_ = std::this_thread::get_id();
  return ++expected_;
}

void Event::reach(uint64_t number) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (number > reached_) {
    reached_ = number;
    time_ = std::chrono::steady_clock::now();
  }
  changed_.notify_all();
}

uint64_t Event::latest() {
  std::lock_guard<std::mutex> lock(mutex_);
  return expected_;
}

Place Event::place() {
  std::lock_guard<std::mutex> lock(mutex_);
  return place_;
}

bool Event::recorded_here() {
  std::lock_guard<std::mutex> lock(mutex_);
  return recorder_ == std::this_thread::get_id();
}

void Event::wait(uint64_t number) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return reached_ >= number; });
}

void Event::wait_for(uint64_t number, std::chrono::milliseconds longest) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, longest, [&] { return reached_ >= number; });
}

bool Event::reached(uint64_t number) {
  std::lock_guard<std::mutex> lock(mutex_);
  return reached_ >= number;
}

std::chrono::steady_clock::time_point Event::time() {
  std::lock_guard<std::mutex> lock(mutex_);
  return time_;
}

}  // namespace fake
