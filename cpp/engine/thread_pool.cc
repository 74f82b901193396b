#include "thread_pool.h"

#include <utility>

#ifdef _WIN32
#include <process.h>
#define LUTRA_GETPID _getpid
#else
#include <unistd.h>
#define LUTRA_GETPID getpid
#endif

namespace lutra {

ThreadPool::ThreadPool(int threads)
    : shared_(std::make_unique<Shared>()), pid_(static_cast<int>(LUTRA_GETPID())) {
  try {
    for (int i = 1; i < threads; ++i) shared_->workers.emplace_back([this, i] { serve(i); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (forked()) {
    static_cast<void>(shared_.release());
  } else {
    stop();
  }
}

bool ThreadPool::forked() const { return static_cast<int>(LUTRA_GETPID()) != pid_; }

void ThreadPool::stop() {
  {
    std::lock_guard lock(shared_->mutex);
    shared_->stop = true;
  }
  shared_->start.notify_all();
  for (std::thread& t : shared_->workers) t.join();
}

void ThreadPool::drain(const Work& work, size_t count, int worker) {
  Shared& s = *shared_;
  try {
    for (size_t i = s.next.fetch_add(1); i < count; i = s.next.fetch_add(1)) work(i, worker);
  } catch (...) {
    s.next = count;  // the others need not go on
    std::lock_guard lock(s.mutex);
    if (!s.error) s.error = std::current_exception();
  }
}

void ThreadPool::run_erased(int threads, size_t count, const Work& work) {
  Shared& s = *shared_;
  std::unique_lock<std::mutex> owner(s.busy, std::defer_lock);
  const bool alone = threads < 2 || s.workers.empty() || count < 2 || forked();
  if (alone || !owner.try_lock()) {
    for (size_t i = 0; i < count; ++i) work(i, 0);
    return;
  }
  {
    std::lock_guard lock(s.mutex);
    s.work = work;
    s.count = count;
    s.next = 0;
    s.active = static_cast<int>(s.workers.size());
    ++s.generation;
  }
  s.start.notify_all();
  drain(work, count, 0);
  std::unique_lock lock(s.mutex);
  s.done.wait(lock, [&s] { return s.active == 0; });
  if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
}

void ThreadPool::serve(int worker) {
  Shared& s = *shared_;
  size_t seen = 0;
  for (;;) {
    Work work;
    size_t count;
    {
      std::unique_lock lock(s.mutex);
      s.start.wait(lock, [&] { return s.stop || s.generation != seen; });
      if (s.stop) return;
      seen = s.generation;
      work = s.work;
      count = s.count;
    }
    drain(work, count, worker);
    std::lock_guard lock(s.mutex);
    if (--s.active == 0) s.done.notify_one();
  }
}

}  // namespace lutra
