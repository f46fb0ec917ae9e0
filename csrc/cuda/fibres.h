// Fibres: threads that one host thread runs in turn, each up to where it must wait. A switch costs a
// fraction of a microsecond; host threads that wait for each other take several.
//
// ThreadSanitizer takes them for threads that nothing but a Barrier orders. Their turns are the same
// in every run, so a race that it finds once it finds always. Where all wait, the process ends.
#pragma once

#include <ucontext.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define PNFS_TSAN(call) call
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define PNFS_TSAN(call) call
#endif
#endif
#if defined(PNFS_TSAN)
#include <sanitizer/tsan_interface.h>
#else
#define PNFS_TSAN(call)
#endif

namespace pnfs::emulation {

// What fibres share is atomic, so that ThreadSanitizer sees no race there, and relaxed, so that it
// sees no order there either.
template <class T>
class Relaxed {
 public:
  constexpr Relaxed(T value) : value_(value) {}
  operator T() const { return value_.load(std::memory_order_relaxed); }
  void operator=(T value) { value_.store(value, std::memory_order_relaxed); }
  void operator=(const Relaxed& other) { *this = T(other); }

 private:
  std::atomic<T> value_;
};

class Fibres {
  struct Fibre;

 public:
  // Fibres that wait.
  class Queue {
    friend class Fibres;
    Relaxed<Fibre*> last_ = nullptr;
  };

  // Calls `work` once on each of `count` fibres; returns when all calls have.
  static void run(int count, std::function<void()> work) {
    Fibres all(count, std::move(work));
    PNFS_TSAN(__tsan_release(&all));
    switch_to(all.main_, all.fibres_[0]);
    PNFS_TSAN(__tsan_acquire(&all));
  }

  // Of the running fibre.
  static int index() {
    const Fibre* self = running_;
    return self->index;
  }

  // Lets others run until one of them wakes `queue`.
  static void wait(Queue& queue) {
    Fibre& self = *running_;
    self.before = queue.last_;
    queue.last_ = &self;
    self.waits = true;
    switch_to(self, self.all->next_of(self));
  }

  static void wake(Queue& queue) {
    for (Fibre* fibre = queue.last_; fibre != nullptr; fibre = fibre->before) fibre->waits = false;
    queue.last_ = nullptr;
  }

 private:
  static constexpr std::size_t kStackBytes = 256 * 1024;  // taken where they are touched

  struct Fibre {
    Fibres* all = nullptr;
    int index = 0;
    Relaxed<bool> waits = false;
    Relaxed<Fibre*> before = nullptr;  // in its queue
    void* tsan = nullptr;
    std::unique_ptr<std::byte[]> stack;
    ucontext_t context{};
  };

  Fibres(int count, std::function<void()> work)
      : count_(count), left_(count), work_(std::move(work)), fibres_(new Fibre[count]) {
    PNFS_TSAN(main_.tsan = __tsan_get_current_fiber());
    for (int i = 0; i < count; ++i) {
      Fibre& fibre = fibres_[i];
      fibre.all = this;
      fibre.index = i;
      PNFS_TSAN(fibre.tsan = __tsan_create_fiber(0));
      fibre.stack = std::make_unique_for_overwrite<std::byte[]>(kStackBytes);
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.get();
      fibre.context.uc_stack.ss_size = kStackBytes;
      makecontext(&fibre.context, begin, 0);
    }
  }

  ~Fibres() {
    for (int i = 0; i < count_; ++i) PNFS_TSAN(__tsan_destroy_fiber(fibres_[i].tsan));
  }

  Fibres(const Fibres&) = delete;
  Fibres& operator=(const Fibres&) = delete;

  // What a fibre does.
  static void begin() {
    Fibre& self = *running_;
    Fibres& all = *self.all;
    PNFS_TSAN(__tsan_acquire(&all));
    all.work_();
    self.waits = true;  // for nothing
    all.left_ = all.left_ - 1;
    switch_to(self, all.left_ == 0 ? all.main_ : all.next_of(self), true);
  }

  // The next one in the circle that need not wait.
  Fibre& next_of(const Fibre& self) {
    for (int i = 1; i < count_; ++i) {
      Fibre& other = fibres_[(self.index + i) % count_];
      if (!other.waits) return other;
    }
    std::fputs("emulation: threads wait for each other at different barriers\n", stderr);
    std::abort();
  }

  static void switch_to(Fibre& from, Fibre& to, [[maybe_unused]] bool for_ever = false) {
    running_ = &to;
    PNFS_TSAN(void* next = to.tsan);
    PNFS_TSAN(if (for_ever) __tsan_release(from.all));
    PNFS_TSAN(__tsan_switch_to_fiber(next, __tsan_switch_to_fiber_no_sync));
    swapcontext(&from.context, &to.context);
  }

  static inline constinit thread_local Relaxed<Fibre*> running_ = nullptr;

  int count_;
  Relaxed<int> left_;  // calls that have not returned
  std::function<void()> work_;
  std::unique_ptr<Fibre[]> fibres_;
  Fibre main_;
};

// As std::barrier, but what a fibre does after a phase is never ordered before what a late one does
// after it: then ThreadSanitizer would not see their race. So the phases take turns with two places
// that keep what was done before: no fibre can be at the phase after next before the late one went.
class Barrier {
 public:
  explicit Barrier(int fibres, std::function<void()> completion = [] {})
      : fibres_(fibres), waited_for_(fibres), completion_(std::move(completion)) {}

  void arrive_and_wait() {
    const std::uint64_t phase = phase_;
    arrive();
    if (phase_ == phase) Fibres::wait(waiting_);
    PNFS_TSAN(__tsan_acquire(&turns_[phase % 2]));
  }

  // Never to come again.
  void arrive_and_drop() {
    fibres_ = fibres_ - 1;
    arrive();
  }

 private:
  void arrive() {
    PNFS_TSAN(char* turn = &turns_[phase_ % 2]);
    PNFS_TSAN(__tsan_release(turn));
    waited_for_ = waited_for_ - 1;
    if (waited_for_ > 0) return;
    PNFS_TSAN(__tsan_acquire(turn));
    completion_();
    PNFS_TSAN(__tsan_release(turn));
    waited_for_ = fibres_;
    phase_ = phase_ + 1;
    Fibres::wake(waiting_);
  }

  Fibres::Queue waiting_;
  Relaxed<std::uint64_t> phase_ = 0;
  Relaxed<int> fibres_, waited_for_;
  std::function<void()> completion_;
  std::array<char, 2> turns_{};
};

}  // namespace pnfs::emulation
