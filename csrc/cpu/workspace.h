// Memory that a thread keeps from call to call: fresh pages from the system at every call would
// cost more than many ops themselves.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace pnfs {

// Use: `static thread_local Workspace memory; float* f = memory.floats(count);`
class Workspace {
 public:
  // At least `count` floats, aligned to a cache line, with undefined values. Valid until the next
  // call of this function.
  float* floats(std::size_t count) {
    if (count > capacity_) {
      constexpr std::size_t kLine = 64;
      const std::size_t bytes = (count * sizeof(float) + kLine - 1) / kLine * kLine;
      memory_.reset();
      memory_.reset(static_cast<float*>(std::aligned_alloc(kLine, bytes)));
      capacity_ = memory_ == nullptr ? 0 : count;
      if (memory_ == nullptr) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  std::size_t capacity_ = 0;
};

}  // namespace pnfs
