// Streams and events: see fake_stream.h.
#include "fake_stream.h"
#include "fake.h"

#include <random>
#include <thread>

namespace fake {

Stream::Stream(uint64_t number, uint64_t seed) : number_(number) {
  // Detached: the process may end while a stream has nothing to do.
  std::thread([this, seed] { work(seed); }).detach();
}

void Stream::enqueue(std::function<void()> task) {
  std::lock_guard<std::mutex> lock(mutex_);
  tasks_.push_back(std::move(task));
  enqueued_++;
  changed_.notify_all();
}

void Stream::synchronise() {
  std::unique_lock<std::mutex> lock(mutex_);
  uint64_t wanted = enqueued_;
  changed_.wait(lock, [&] { return done_ >= wanted; });
}

bool Stream::idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  return done_ == enqueued_;
}

void Stream::stop() {
  std::lock_guard<std::mutex> lock(mutex_);
  stopping_ = true;
  changed_.notify_all();
}

void Stream::work(uint64_t seed) {
  std::mt19937_64 random(seed);
  const uint64_t longest = setting("FAKE_CUDA_DELAY_US", 0);
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return !tasks_.empty() || stopping_; });
    // A destroyed stream finishes its tasks first.
    if (tasks_.empty()) break;
    std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    if (longest) std::this_thread::sleep_for(std::chrono::microseconds(random() % (longest + 1)));
    task();
    task = nullptr;
    lock.lock();
    done_++;
    changed_.notify_all();
  }
  lock.unlock();
  delete this;
}

uint64_t Event::expect(uint64_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  stream_ = stream;
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

uint64_t Event::stream() {
  std::lock_guard<std::mutex> lock(mutex_);
  return stream_;
}

void Event::wait(uint64_t number) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return reached_ >= number; });
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
