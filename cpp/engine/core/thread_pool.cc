#include "engine/core/thread_pool.h"

#ifndef LUTRA_ONE_THREAD

#include <utility>

#ifdef _WIN32
#include <process.h>
#define LUTRA_GETPID _getpid
#else
#include <unistd.h>
#define LUTRA_GETPID getpid
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace lutra {
namespace {

// How often a thread looks for work before it sleeps: some ten microseconds.
constexpr int kLooks = 2000;

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#endif
}

// Waits awake for a short time; whether the condition came true.
template <class Condition>
bool came_true(const Condition& condition) {
  for (int i = 0; i < kLooks; ++i) {
    if (condition()) return true;
    relax();
  }
  return condition();
}

}  // namespace

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

ThreadPool::Awake::Awake(ThreadPool& pool, bool on) : pool_(nullptr) {
  if (!on || pool.shared_->workers.empty() || pool.forked()) return;
  pool_ = &pool;
  ++pool.shared_->awake;
  ++pool.shared_->calls;
  pool.wake();
}

ThreadPool::Awake::~Awake() {
  if (pool_) --pool_->shared_->awake;
}

bool ThreadPool::forked() const { return static_cast<int>(LUTRA_GETPID()) != pid_; }

void ThreadPool::stop() {
  shared_->stop = true;
  wake();
  for (std::thread& t : shared_->workers) t.join();
}

// Whoever sleeps has counted itself under the mutex before it looked at what it waits for, so it
// either sees the change made before this call or is woken.
void ThreadPool::wake() {
  Shared& s = *shared_;
  if (s.asleep == 0) return;
  {
    std::lock_guard lock(s.mutex);
  }
  s.start.notify_all();
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

void ThreadPool::run_erased(size_t shared_count, size_t count, const Work& work) {
  Shared& s = *shared_;
  std::unique_lock<std::mutex> owner(s.busy, std::defer_lock);
  const bool alone = shared_count < 2 || s.workers.empty() || forked();
  if (alone || !owner.try_lock()) {
    for (size_t i = 0; i < count; ++i) work(i, 0);
    return;
  }
  s.work = work;
  s.count = count;
  s.next = 0;
  s.finished = 0;
  s.joined = 0;
  ++s.generation;
  wake();
  drain(work, count, 0);
  const int joined = s.joined.exchange(Shared::kClosed);
  auto finished = [&] { return s.finished == joined; };
  if (!came_true(finished)) {
    std::unique_lock lock(s.mutex);
    ++s.waiting;
    s.done.wait(lock, finished);
    --s.waiting;
  }
  std::exception_ptr error;
  {
    std::lock_guard lock(s.mutex);
    error = std::exchange(s.error, nullptr);
  }
  if (error) std::rethrow_exception(error);
}

void ThreadPool::serve(int worker) {
  Shared& s = *shared_;
  size_t seen = 0, calls = 0;
  for (;;) {
    auto work_came = [&] { return s.stop || s.generation != seen; };
    if (s.awake == 0 || !came_true(work_came)) {
      std::unique_lock lock(s.mutex);
      ++s.asleep;
      // An Awake that begins is a reason to get up as well: the first job is near.
      s.start.wait(lock, [&] { return work_came() || s.calls != calls; });
      --s.asleep;
    }
    calls = s.calls;
    if (s.stop) return;
    seen = s.generation;
    int joined = s.joined;
    while (joined != Shared::kClosed && !s.joined.compare_exchange_weak(joined, joined + 1)) {
    }
    if (joined == Shared::kClosed) continue;
    drain(s.work, s.count, worker);
    ++s.finished;
    if (s.waiting > 0) {
      {
        std::lock_guard lock(s.mutex);
      }
      s.done.notify_one();
    }
  }
}

}  // namespace lutra

#endif
