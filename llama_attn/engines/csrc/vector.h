// Vectors of the compiler's own kind, as wide as the machine has them: no intrinsics, any architecture.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace llama_attn {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Floats __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Floats __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Ints __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::Floats;
template <class T>
using Ints = typename VectorOf<T>::Ints;

template <class T>
inline Vector<T> load(const T* from) {
  Vector<T> vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <class T>
inline void store(T* to, Vector<T> vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

template <class T>
inline Vector<T> splat(T value) {
  return Vector<T>{} + value;
}

// 0, 1, 2 …
template <class T>
inline Vector<T> iota() {
  Vector<T> vector{};
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) vector[lane] = static_cast<T>(lane);
  return vector;
}

template <class T>
inline Vector<T> absolute(Vector<T> x) {
  return x < 0 ? -x : x;
}

template <class T>
inline T sum(Vector<T> vector) {
  T total = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) total += vector[lane];
  return total;
}

template <class T>
inline T largest(Vector<T> vector) {
  T most = vector[0];
  for (int64_t lane = 1; lane < kLanes<T>; ++lane) most = vector[lane] > most ? vector[lane] : most;
  return most;
}

// Exchanges the corners of 2 · Step blocks: lanes of `upper` whose number has the bit Step with those of `lower` that lack
// it.
template <class T, int Step, int... Lane>
inline void exchange(Vector<T>& upper, Vector<T>& lower, std::integer_sequence<int, Lane...>) {
  constexpr int kCount = sizeof...(Lane);
  const Vector<T> first = upper, second = lower;
  upper = __builtin_shufflevector(first, second, ((Lane & Step) != 0 ? kCount + Lane - Step : Lane)...);
  lower = __builtin_shufflevector(first, second, ((Lane & Step) != 0 ? kCount + Lane : Lane + Step)...);
}

// Transposes a square of as many vectors as a vector has lanes.
template <class T, int Step = kLanes<T> / 2>
inline void transpose(Vector<T>* rows) {
#pragma GCC unroll 16
  for (int row = 0; row < kLanes<T>; ++row)
    if ((row & Step) == 0)
      exchange<T, Step>(rows[row], rows[row + Step], std::make_integer_sequence<int, kLanes<T>>{});
  if constexpr (Step > 1) transpose<T, Step / 2>(rows);
}

// The sum of each of as many vectors as a vector has lanes, in that vector's lane.
template <class T, int Step = kLanes<T> / 2>
inline Vector<T> sum_each(Vector<T>* rows) {
#pragma GCC unroll 8
  for (int row = 0; row < Step; ++row) {
    exchange<T, Step>(rows[row], rows[row + Step], std::make_integer_sequence<int, kLanes<T>>{});
    rows[row] += rows[row + Step];
  }
  if constexpr (Step > 1) return sum_each<T, Step / 2>(rows);
  return rows[0];
}

// Σ of the numbers from[0 … count).
template <class T>
inline T sum_of(const T* from, int64_t count) {
  Vector<T> totals{};
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) totals += load(from + i);
  T total = sum<T>(totals);
  for (; i < count; ++i) total += from[i];
  return total;
}

// Σ of the products of `width` numbers, a multiple of the lanes.
template <class T>
inline T dot(const T* left, const T* right, int64_t width) {
  constexpr int64_t kStep = 4 * kLanes<T>;
  Vector<T> totals[4] = {};
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep)
    for (int k = 0; k < 4; ++k) totals[k] += load(left + i + k * kLanes<T>) * load(right + i + k * kLanes<T>);
  for (; i < width; i += kLanes<T>) totals[0] += load(left + i) * load(right + i);
  return sum<T>((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

// e^x for x ≤ 0: 2^n e^r with n = round(x / ln 2), so |r| ≤ ln(2) / 2. Zero below the smallest normal number; NaN stays.
inline Vector<float> exp_negative(Vector<float> x) {
  constexpr float kLowest = -87.336544f, kLog2e = 1.44269504f, kMagic = 12582912.0f;  // 1.5 · 2^23 rounds to integers
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const auto tiny = x < kLowest;
  const Vector<float> clamped = tiny ? splat(kLowest) : x;
  const Vector<float> shifted = clamped * kLog2e + kMagic;
  const Vector<float> n = shifted - kMagic;
  const Vector<float> r = (clamped - n * kLn2High) - n * kLn2Low;
  // Cephes, expf.c (Moshier): within one unit in the last place.
  Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const Ints<float> exponent = (reinterpret_cast<Ints<float>>(shifted) + 127) << 23;
  const Vector<float> result = p * reinterpret_cast<Vector<float>>(exponent);
  return tiny ? Vector<float>{} : result;
}

inline Vector<double> exp_negative(Vector<double> x) {
  constexpr double kLowest = -708.39641853226408, kLog2e = 1.4426950408889634, kMagic = 6755399441055744.0;
  constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  const auto tiny = x < kLowest;
  const Vector<double> clamped = tiny ? splat(kLowest) : x;
  const Vector<double> shifted = clamped * kLog2e + kMagic;
  const Vector<double> n = shifted - kMagic;
  const Vector<double> r = (clamped - n * kLn2High) - n * kLn2Low;
  // Taylor: the first term left out is r^14 / 14! < 5e-18.
  Vector<double> p = splat(1.0 / 6227020800.0);
  constexpr double kFactorials[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0,
                                    720.0,       120.0,      24.0,      6.0,      2.0,     1.0};
  for (const double factorial : kFactorials) p = p * r + 1.0 / factorial;
  p = p * r + 1.0;
  const Ints<double> exponent = (reinterpret_cast<Ints<double>>(shifted) + 1023) << 52;
  const Vector<double> result = p * reinterpret_cast<Vector<double>>(exponent);
  return tiny ? Vector<double>{} : result;
}

// tanh x: an odd polynomial or quotient of polynomials near 0, where the other form cancels. NaN stays.
//
// Source: Cephes, tanhf.c and tanh.c (Moshier): within two units in the last place.
inline Vector<float> tanh_near_zero(Vector<float> x) {
  const Vector<float> z = x * x;
  Vector<float> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return p * z * x + x;
}

inline Vector<double> tanh_near_zero(Vector<double> x) {
  const Vector<double> z = x * x;
  const Vector<double> p = (z * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
  const Vector<double> q =
      ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
  return p / q * z * x + x;
}

template <class T>
inline Vector<T> hyperbolic_tangent(Vector<T> x) {
  const Vector<T> size = absolute<T>(x), e = exp_negative(size * T{-2}), far = (1 - e) / (1 + e);
  return size < T{0.625} ? tanh_near_zero(x) : x < 0 ? -far : far;
}

}  // namespace llama_attn
