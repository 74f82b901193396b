// A small pool: the caller works too, so a pool of n threads starts n - 1, and a pool of one none.
#pragma once

#if defined(__EMSCRIPTEN__) && !defined(__EMSCRIPTEN_PTHREADS__)
#define LUTRA_ONE_THREAD
#endif

#ifdef LUTRA_ONE_THREAD
#include <cstddef>

namespace lutra {

// Where there are no threads, the caller does all the work.
class ThreadPool {
 public:
  explicit ThreadPool(int) {}
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return 1; }

  template <class F>  // void(size_t index, int worker)
  void run(size_t count, double, const F& work) {
    for (size_t i = 0; i < count; ++i) work(i, 0);
  }

  class Awake {
   public:
    Awake(ThreadPool&, bool) {}
  };
};

}  // namespace lutra

#else

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace lutra {

class ThreadPool {
 public:
  // Throws std::system_error if the threads cannot be started.
  explicit ThreadPool(int threads);
  virtual ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(shared_->workers.size()) + 1; }

  // Calls work(index, worker) once for each index < count, worker < threads(). A second caller who
  // finds the pool busy, or a forked child that has lost its threads, does all the work itself.
  // Throws what work throws, the first of it, once no thread is at work any more.
  //
  // `microseconds` is a rough guess of the whole job on one thread. Waking a thread costs ten or
  // twenty, so a short job is done by the caller, unless the threads are awake.
  template <class F>  // void(size_t index, int worker)
  void run(size_t count, double microseconds, const F& work) {
    const bool worthwhile = microseconds >= (shared_->awake > 0 ? kWorthwhileAwake : kWorthwhile);
    run_erased(worthwhile ? count : 0, count, {&work, [](const void* f, size_t index, int worker) {
                                                 (*static_cast<const F*>(f))(index, worker);
                                               }});
  }

  // While one exists, the threads wait for the next job awake, for a short time: the steps of a
  // run follow each other within microseconds. It wakes them; nobody spins once it is gone.
  class Awake {
   public:
    Awake(ThreadPool& pool, bool on);
    ~Awake();
    Awake(const Awake&) = delete;
    Awake& operator=(const Awake&) = delete;

   private:
    ThreadPool* pool_;
  };

  static constexpr double kWorthwhile = 60.0;  // microseconds
  static constexpr double kWorthwhileAwake = 3.0;

 private:
  struct Work {  // a reference to the caller's function: no allocation
    const void* function = nullptr;
    void (*call)(const void*, size_t, int) = nullptr;
    void operator()(size_t index, int worker) const { call(function, index, worker); }
  };

  // On the heap, so that a forked child can leave it behind: destroying a condition variable waits
  // for the threads that wait on it, and the child has none of them.
  //
  // A job is open while joined >= 0. A worker joins by adding one; the caller closes the job by
  // exchanging kClosed for the number of those who joined and waits until as many have finished.
  // So nobody waits for a thread that is slow to wake.
  struct Shared {
    static constexpr int kClosed = -1;
    std::vector<std::thread> workers;
    std::mutex busy;  // held by the caller whose job is running
    std::mutex mutex;
    std::condition_variable start, done;
    std::atomic<int> awake{0};     // Awake objects there are
    std::atomic<size_t> calls{0};  // and have been
    std::atomic<int> asleep{0}, waiting{0};
    std::atomic<size_t> generation{0};
    std::atomic<int> joined{kClosed}, finished{0};
    std::atomic<size_t> next{0};
    Work work;
    size_t count = 0;
    std::exception_ptr error;  // of this job, under mutex
    std::atomic<bool> stop{false};
  };

  // Virtual, so that plugins reach it without linking the engine.
  virtual void run_erased(size_t shared_count, size_t count, const Work& work);
  void wake();
  void serve(int worker);
  void drain(const Work& work, size_t count, int worker);
  void stop();
  bool forked() const;

  std::unique_ptr<Shared> shared_;
  int pid_;
};

}  // namespace lutra

#endif
