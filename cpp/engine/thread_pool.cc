#include "thread_pool.h"

#ifdef _WIN32
#include <process.h>
#define LUTRA_GETPID _getpid
#else
#include <unistd.h>
#define LUTRA_GETPID getpid
#endif

namespace lutra {

ThreadPool::ThreadPool(int threads) : pid_(static_cast<int>(LUTRA_GETPID())) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
}

ThreadPool::~ThreadPool() {
  if (static_cast<int>(LUTRA_GETPID()) != pid_) {
    for (std::thread& t : workers_) t.detach();  // a forked child: these threads are not here
    return;
  }
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (std::thread& t : workers_) t.join();
}

void ThreadPool::drain(const Work& work, size_t count, int worker) {
  for (size_t i = next_.fetch_add(1); i < count; i = next_.fetch_add(1)) work(i, worker);
}

void ThreadPool::run_erased(size_t count, const Work& work) {
  std::unique_lock<std::mutex> owner(busy_, std::defer_lock);
  const bool alone = workers_.empty() || count < 2 || static_cast<int>(LUTRA_GETPID()) != pid_;
  if (alone || !owner.try_lock()) {
    for (size_t i = 0; i < count; ++i) work(i, 0);
    return;
  }
  {
    std::lock_guard lock(mutex_);
    work_ = work;
    count_ = count;
    next_ = 0;
    active_ = static_cast<int>(workers_.size());
    ++generation_;
  }
  start_.notify_all();
  drain(work, count, 0);
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return active_ == 0; });
}

void ThreadPool::serve(int worker) {
  size_t seen = 0;
  for (;;) {
    Work work;
    size_t count;
    {
      std::unique_lock lock(mutex_);
      start_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_) return;
      seen = generation_;
      work = work_;
      count = count_;
    }
    drain(work, count, worker);
    std::lock_guard lock(mutex_);
    if (--active_ == 0) done_.notify_one();
  }
}

}  // namespace lutra
