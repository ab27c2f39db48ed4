// Runs unmodified kernel bodies on the CPU, one fiber per thread of a block. For tests only.
//
// A fiber runs until it meets a barrier or a shuffle and then yields. This proves indexing, tails, reductions,
// arithmetic, and that all threads reach each barrier (it aborts otherwise); not memory order, hardware conversions or
// speed. A device is an operating-system thread, and so is each of the blocks that wait for one another. To show more
// than one lucky order: fibers run forwards, backwards or shuffled; shared memory is filled with NaN before every
// block; an asynchronous copy happens as late as the kernel allows, when it is waited for; waves run from barrier to
// barrier one after the other.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1;
};
enum class Order { kForward, kReverse, kShuffled };
enum class Wait { kNone, kBarrier, kShuffle, kOthers };

// A stack that can be left and entered again. swapcontext makes two system calls each time, which was most of the time.
#if defined(__x86_64__)
class Context {
 public:
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(reinterpret_cast<size_t>(stack + bytes) / 16 * 16);
    *--top = nullptr;  // where entry would return to; the stack is then aligned as behind a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_ = top;
  }
  static void swap(Context& from, Context& to) { swap_stacks(&from.stack_, to.stack_); }

 private:
  // rdi: where to keep the stack that is left; rsi: the one to enter. The six registers that a callee keeps.
  [[gnu::naked, gnu::noinline]] static void swap_stacks(void**, void*) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
  }
  void* stack_ = nullptr;
};
#else
class Context {
 public:
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};
#endif

struct Copy {
  unsigned char* to;
  const char* from;
  int bytes;
};
struct Fiber {
  static constexpr size_t kStack = 1 << 17;
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  Wait wait = Wait::kNone;
  std::vector<Copy> open;                 // copies not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

inline thread_local std::vector<std::unique_ptr<Fiber>> fibers;
inline thread_local int wave = 32, current = 0, pausing = 0;
inline thread_local Dim3 block_index;
inline thread_local Context scheduler;
inline thread_local std::function<void()> body;
inline thread_local std::vector<float> exchange;
inline thread_local std::vector<int> distance;
inline thread_local std::vector<unsigned char> shared_bytes;
inline thread_local unsigned char* shared_start = nullptr;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "simt: %s (block %u, %u, thread %d)\n", what, block_index.x, block_index.y, current);
  abort();
}

inline int thread() { return current; }
inline Dim3 block() { return block_index; }
inline unsigned char* shared() { return shared_start; }
inline void yield(Wait why) {
  Fiber& f = *fibers[current];
  f.wait = why;
  Context::swap(f.context, scheduler);
}
inline void barrier() { yield(Wait::kBarrier); }
inline float shuffle_xor(float v, int mask) {
  const int t = current;
  exchange[t] = v;
  distance[t] = mask;
  yield(Wait::kShuffle);  // every lane has written
  const float r = exchange[t / wave * wave + (t % wave ^ mask)];
  if (distance[t / wave * wave + (t % wave ^ mask)] != mask) fail("lanes of a wave shuffle over different distances");
  yield(Wait::kShuffle);  // every lane has read
  return r;
}
inline float shuffle_from(float v, int lanes, int from) {
  const int t = current;
  exchange[t] = v;
  yield(Wait::kShuffle);
  const float r = exchange[t / lanes * lanes + from];
  yield(Wait::kShuffle);
  return r;
}
inline bool any(bool b) {
  const int t = current;
  exchange[t] = b ? 1.f : 0.f;
  yield(Wait::kShuffle);
  const auto first = exchange.begin() + t / wave * wave;
  const bool r = std::any_of(first, first + wave, [](float v) { return v != 0.f; });
  yield(Wait::kShuffle);
  return r;
}

// Blocks of a cluster are operating-system threads.
struct Cluster {
  explicit Cluster(unsigned blocks) : shared(blocks) {}
  // Returns in all of them when all have come.
  void meet() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned now = round;
    if (++come == shared.size())
      come = 0, ++round, all.notify_all();
    else
      all.wait(lock, [&] { return round != now; });
  }
  std::vector<unsigned char*> shared;  // memory of each
  std::mutex mutex;
  std::condition_variable all;
  size_t come = 0;
  unsigned round = 0;
};
inline thread_local Cluster* cluster = nullptr;
inline thread_local bool met = false;

inline void cluster_barrier() {
  barrier();
  if (!met) cluster->meet();  // the first thread for its block
  met = true;
  barrier();
  met = false;
}
inline unsigned char* in_block(void* p, unsigned rank) {
  return cluster->shared[rank] + (static_cast<unsigned char*>(p) - shared_start);
}

// For kernels that wait for other devices or other blocks, which are other threads of the process with fibers of their
// own. The fiber goes on when the others of its block had a turn.
inline void pause() {
  ++pausing;
  yield(Wait::kOthers);
  --pausing;
}
inline unsigned long long nanoseconds() {
  return static_cast<unsigned long long>(std::chrono::steady_clock::now().time_since_epoch().count());
}

inline void async_copy(unsigned char* to, const char* from, int bytes) {
  fibers[current]->open.push_back({to, from, bytes});
}
inline void async_commit() {
  Fiber& f = *fibers[current];
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
inline void async_wait(int pending) {
  Fiber& f = *fibers[current];
  while (int(f.groups.size()) > pending) {
    for (const Copy& c : f.groups.front()) memcpy(c.to, c.from, size_t(c.bytes));
    f.groups.erase(f.groups.begin());
  }
}

inline void entry() {
  body();
  fibers[current]->done = true;
  Context::swap(fibers[current]->context, scheduler);
}
inline void resume(int t) {
  current = t;
  fibers[t]->wait = Wait::kNone;
  Context::swap(scheduler, fibers[t]->context);
}
inline bool all(int from, int count, Wait wait) {
  for (int t = from; t < from + count; ++t)
    if (fibers[t]->done || fibers[t]->wait != wait) return false;
  return true;
}

inline bool any_waits(int from, int count, Wait wait) {
  for (int t = from; t < from + count; ++t)
    if (fibers[t]->wait == wait) return true;
  return false;
}

inline void run_block(int threads, const std::vector<int>& order) {
  for (int t = 0; t < threads; ++t) {
    Fiber& f = *fibers[t];
    f.done = false;
    f.open.clear();
    f.groups.clear();
    f.context.prepare(f.stack.get(), Fiber::kStack, entry);
  }
  // A wave runs to the barrier before the next one takes a step, so what it writes there too early is seen.
  std::vector<int> waves;
  for (int t : order)
    if (std::find(waves.begin(), waves.end(), t / wave) == waves.end()) waves.push_back(t / wave);
  pausing = 0;
  for (;;) {
    const bool whole = pausing == 0;
    for (int w : waves) {
      if (!whole && !any_waits(w * wave, wave, Wait::kOthers)) continue;  // at a barrier, or done
      do {
        const bool lanes = pausing > 0 && any_waits(w * wave, wave, Wait::kOthers);
        for (int t : order)
          if (t / wave == w && (!lanes || fibers[t]->wait == Wait::kOthers)) resume(t);
      } while (all(w * wave, wave, Wait::kShuffle));
    }
    if (pausing > 0) {
      std::this_thread::yield();
      continue;
    }
    if (std::all_of(fibers.begin(), fibers.begin() + threads, [](auto& f) { return f->done; })) return;
    if (!all(0, threads, Wait::kBarrier)) fail("a barrier or shuffle that not all threads reach");
  }
}

// kernel() is called once per thread of a block. Shared memory is `bytes` long: an access beyond is one beyond the heap
// block.
struct Runner {
  int threads;
  size_t bytes;
  Order how;
  std::vector<int> order;
  std::mt19937 generator{1};
  static constexpr size_t kGuard = 256;

  Runner(int t, size_t b, Order h, const std::function<void()>& kernel)
      : threads(t), bytes(b), how(h), order(size_t(t)) {
    if (threads % wave) fail("a block of partial waves");
    while (int(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
    exchange.assign(size_t(threads), 0.f);
    distance.assign(size_t(threads), 0);
    body = kernel;
    std::iota(order.begin(), order.end(), 0);
    if (how == Order::kReverse) std::reverse(order.begin(), order.end());
  }
  void begin(Dim3 block) {
    if (how == Order::kShuffled) std::shuffle(order.begin(), order.end(), generator);
    block_index = block;
    shared_bytes.assign(bytes + kGuard + 16, 0xff);  // 0xffffffff is a NaN
    shared_start = shared_bytes.data() + (16 - reinterpret_cast<size_t>(shared_bytes.data()) % 16) % 16;
  }
  void check() const {
    for (size_t i = 0; i < kGuard - 16; ++i)
      if (shared_start[bytes + i] != 0xff) fail("shared memory written beyond its end");
  }
};

inline void launch(Dim3 grid, int threads, size_t bytes, Order how, const std::function<void()>& kernel) {
  Runner runner(threads, bytes, how, kernel);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      runner.begin(Dim3{x, y});
      run_block(threads, runner.order);
      runner.check();
    }
}

// Clusters of `blocks` blocks one after the other, a block to an operating-system thread.
inline void launch_clusters(Dim3 grid, int threads, size_t bytes, Order how, unsigned blocks,
                            const std::function<void()>& kernel) {
  if (grid.x % blocks) fail("a grid of partial clusters");
  Cluster together(blocks);
  const int lanes = wave;
  std::vector<std::thread> units;
  for (unsigned rank = 0; rank < blocks; ++rank)
    units.emplace_back([&, rank, lanes] {
      wave = lanes;
      cluster = &together;
      Runner runner(threads, bytes, how, kernel);
      for (unsigned b = rank; b < grid.x * grid.y; b += blocks) {
        runner.begin(Dim3{b % grid.x, b / grid.x});
        together.shared[rank] = shared_start;
        together.meet();
        run_block(threads, runner.order);
        together.meet();
        runner.check();
      }
    });
  for (std::thread& unit : units) unit.join();
}

// All blocks at the same time, each on an operating-system thread, begun backwards in Order::kReverse.
inline void launch_together(Dim3 grid, int threads, size_t bytes, Order how, const std::function<void()>& kernel) {
  const int lanes = wave;
  const unsigned blocks = grid.x * grid.y;
  std::vector<std::thread> units;
  for (unsigned i = 0; i < blocks; ++i)
    units.emplace_back([&, i, lanes] {
      wave = lanes;
      Runner runner(threads, bytes, how, kernel);
      const unsigned b = how == Order::kReverse ? blocks - 1 - i : i;
      runner.begin(Dim3{b % grid.x, b / grid.x});
      run_block(threads, runner.order);
      runner.check();
    });
  for (std::thread& unit : units) unit.join();
}

}  // namespace simt
