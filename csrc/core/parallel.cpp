#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace xpatch {
namespace {

constexpr int kMaxWorkers = 255;

class Pool {
 public:
  // False when another caller is using the pool.
  bool run(int64_t tasks, int threads, const std::function<void(int64_t)>& task) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    start_workers(std::min(threads - 1, kMaxWorkers));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      seats_ = std::min(threads - 1, workers_);
      ++job_;
    }
    wake_.notify_all();
    drain(task, tasks);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      seats_ = 0;  // nobody joins a job that has no tasks left
      done_.wait(lock, [this] { return active_ == 0; });
      task_ = nullptr;
    }
    const std::exception_ptr thrown = std::exchange(thrown_, nullptr);
    busy_.store(false, std::memory_order_release);
    if (thrown != nullptr) std::rethrow_exception(thrown);
    return true;
  }

 private:
  void start_workers(int wanted) {
    while (workers_ < wanted) {
      try {
        std::thread([this] { work(); }).detach();
      } catch (const std::exception&) {
        return;
      }
      ++workers_;
    }
  }

  void drain(const std::function<void(int64_t)>& task, int64_t tasks) {
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i);
    } catch (...) {
      next_.store(tasks, std::memory_order_relaxed);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (thrown_ == nullptr) thrown_ = std::current_exception();
    }
  }

  void work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return job_ != seen; });
      seen = job_;
      if (seats_ == 0) continue;
      --seats_;
      ++active_;
      const auto& task = *task_;
      const int64_t tasks = tasks_;
      lock.unlock();
      drain(task, tasks);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::atomic<bool> busy_{false};
  int workers_ = 0;  // touched only by the caller that holds busy_

  std::mutex mutex_;  // guards everything below
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t tasks_ = 0;
  uint64_t job_ = 0;
  int seats_ = 0;
  int active_ = 0;
  std::exception_ptr thrown_;
  std::atomic<int64_t> next_{0};
};

// The pool is never destroyed: its threads may outlive static destruction, and a forked child must not touch it.
std::atomic<Pool*> current_pool{nullptr};

Pool& pool() {
#if !defined(_WIN32)
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr, std::memory_order_relaxed); });
  static_cast<void>(registered);
#endif
  Pool* found = current_pool.load(std::memory_order_acquire);
  if (found == nullptr) {
    Pool* fresh = new Pool;
    if (current_pool.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task) {
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (threads > 1 && pool().run(tasks, threads, task)) return;
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

}  // namespace xpatch
