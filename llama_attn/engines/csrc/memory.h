// Memory for one call.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

namespace llama_attn {

// From this size on memory comes from the system and goes back to it. The C library would keep it among its own free
// blocks, where the next layer's tensors no longer fit: at T 32,768 that took as much again as the statistics.
constexpr size_t kMapped = 4 << 20;

inline int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

struct Free {
  size_t size = 0;

  void operator()(void* memory) const {
    if (size >= kMapped)
      munmap(memory, size);
    else
      std::free(memory);
  }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Memory on the boundary of a cache line, uninitialised.
template <class T>
Buffer<T> allocate(int64_t count) {
  if (count > std::numeric_limits<int64_t>::max() / 16) throw std::bad_alloc();
  const size_t size = static_cast<size_t>(round_up(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)), 64));
  void* memory = size >= kMapped
                     ? mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                     : std::aligned_alloc(64, size);
  if (memory == nullptr || memory == MAP_FAILED) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory), Free{size});
}

template <class T>
Buffer<T> zeros(int64_t count) {
  Buffer<T> buffer = allocate<T>(count);
  std::fill_n(buffer.get(), count, T{0});
  return buffer;
}

}  // namespace llama_attn
