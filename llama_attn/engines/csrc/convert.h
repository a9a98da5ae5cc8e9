// Reading and writing the types that models are kept in.
#pragma once

#include <cstdint>
#include <cstring>

#include "call.h"

namespace llama_attn {

// GCC 12 has no other name for it on such machines.
#if defined(__aarch64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
using Half = __fp16;
#else
using Half = _Float16;
#endif

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Rounds to the nearest, ties to even.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const auto rounded = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  return value != value ? uint16_t{0x7fc0} : rounded;
}

template <class T, class From, class Convert>
inline void read_as(const void* data, int64_t offset, int64_t stride, int64_t count, T* to, Convert convert) {
  const From* from = static_cast<const From*>(data) + offset;
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(convert(from[i]));
  else
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(convert(from[i * stride]));
}

// `count` numbers of a tensor, from element `offset` on, each `stride` after the one before.
template <class T>
void read(const Tensor& tensor, int64_t offset, int64_t stride, int64_t count, T* to) {
  const auto same = [](auto value) { return value; };
  switch (tensor.type) {
    case Type::kFloat64: return read_as<T, double>(tensor.data, offset, stride, count, to, same);
    case Type::kFloat32: return read_as<T, float>(tensor.data, offset, stride, count, to, same);
    case Type::kBFloat16: return read_as<T, uint16_t>(tensor.data, offset, stride, count, to, from_bfloat16);
    case Type::kFloat16: return read_as<T, Half>(tensor.data, offset, stride, count, to, same);
    case Type::kBool: return read_as<T, uint8_t>(tensor.data, offset, stride, count, to, same);
    case Type::kInt32:
    case Type::kInt64: return;
  }
}

template <class To, class T, class Convert>
inline void write_as(void* data, int64_t offset, int64_t stride, int64_t count, const T* from, T factor,
                     Convert convert) {
  To* to = static_cast<To*>(data) + offset;
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = convert(from[i] * factor);
  else
    for (int64_t i = 0; i < count; ++i) to[i * stride] = convert(from[i] * factor);
}

// Writes `count` numbers, times `factor`, to where `read` would find them.
template <class T>
void write(const Tensor& tensor, int64_t offset, int64_t stride, int64_t count, const T* from, T factor) {
  void* data = const_cast<void*>(tensor.data);
  const auto rounded = [](T value) { return to_bfloat16(static_cast<float>(value)); };
  switch (tensor.type) {
    case Type::kFloat64:
      return write_as<double>(data, offset, stride, count, from, factor, [](T x) { return static_cast<double>(x); });
    case Type::kFloat32:
      return write_as<float>(data, offset, stride, count, from, factor, [](T x) { return static_cast<float>(x); });
    case Type::kBFloat16: return write_as<uint16_t>(data, offset, stride, count, from, factor, rounded);
    case Type::kFloat16:
      return write_as<Half>(data, offset, stride, count, from, factor, [](T x) { return static_cast<Half>(x); });
    case Type::kBool:
    case Type::kInt32:
    case Type::kInt64: return;
  }
}

}  // namespace llama_attn
