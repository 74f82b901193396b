// A small pool: the caller works too, so a pool of n threads starts n - 1, and a pool of one none.
#pragma once

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
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(shared_->workers.size()) + 1; }

  // Calls work(index, worker) once for each index < count, worker < threads(). A second caller who
  // finds the pool busy, or a forked child that has lost its threads, does all the work itself.
  // Throws what work throws, the first of it, once no thread is at work any more.
  //
  // `microseconds` is a rough guess of the whole job on one thread: waking a thread costs ten or
  // twenty, so a short job is done by the caller.
  template <class F>  // void(size_t index, int worker)
  void run(size_t count, double microseconds, const F& work) {
    run_erased(microseconds < kWorthwhile ? 1 : threads(), count,
               {&work, [](const void* f, size_t index,
                          int worker) { (*static_cast<const F*>(f))(index, worker); }});
  }

  static constexpr double kWorthwhile = 60.0;  // microseconds

 private:
  struct Work {  // a reference to the caller's function: no allocation
    const void* function = nullptr;
    void (*call)(const void*, size_t, int) = nullptr;
    void operator()(size_t index, int worker) const { call(function, index, worker); }
  };

  // On the heap, so that a forked child can leave it behind: destroying a condition variable waits
  // for the threads that wait on it, and the child has none of them.
  struct Shared {
    std::vector<std::thread> workers;
    std::mutex busy;  // held by the caller whose job is running
    std::mutex mutex;
    std::condition_variable start, done;
    Work work;
    size_t count = 0;
    std::atomic<size_t> next{0};
    size_t generation = 0;
    int active = 0;
    std::exception_ptr error;  // of this job
    bool stop = false;
  };

  void run_erased(int threads, size_t count, const Work& work);
  void serve(int worker);
  void drain(const Work& work, size_t count, int worker);
  void stop();
  bool forked() const;

  std::unique_ptr<Shared> shared_;
  int pid_;
};

}  // namespace lutra
