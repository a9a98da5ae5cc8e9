// How many weights there are of each size, and how much they sum to.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "vector.h"

namespace llama_attn {

// Bin b < 30 holds the weights in (2^−(b+1), 2^−b], the last one all that are smaller.
constexpr int64_t kWeightBins = 31;

// Numbers and sums of weights by their bin. What rows are NaN is counted in the first bin, as NaN.
template <class T>
class WeightBins {
 public:
  // Adds the weights factor · exponentials[0 … width); width is a multiple of the lanes.
  void add(const T* exponentials, int64_t width, T factor) {
    for (int64_t j = 0; j < width; ++j) {
      const T weight = factor * exponentials[j];
      if (weight == 0) continue;
      int exponent;
      // weight = fraction · 2^exponent with a fraction in [1/2, 1), of which the lower end belongs to the next bin.
      const T fraction = std::frexp(weight, &exponent);
      const int bin = fraction == T{0.5} ? 1 - exponent : -exponent;
      const auto at = std::clamp<int>(bin, 0, static_cast<int>(kWeightBins) - 1);
      // Of a weight that is NaN, the exponent is not specified.
      const bool is_number = weight == weight;
      counts_[is_number ? at : 0] += is_number ? 1 : std::numeric_limits<double>::quiet_NaN();
      masses_[is_number ? at : 0] += weight;
    }
  }

  // Adds the sums to these and begins anew.
  void flush(double* counts, double* masses) {
    for (int64_t bin = 0; bin < kWeightBins; ++bin) {
      counts[bin] += counts_[bin], masses[bin] += masses_[bin];
      counts_[bin] = masses_[bin] = 0;
    }
  }

 private:
  double counts_[kWeightBins] = {}, masses_[kWeightBins] = {};
};

// In float32 sums are integers, exact whatever the order: of every weight the 23 bits behind the leading one, and above
// them a one that counts. Adding to a table entry by entry would take three times as long: what was just written is slow
// to be read again.
template <>
class WeightBins<float> {
 public:
  // Adds the weights factor · exponentials[0 … width); width is a multiple of the lanes.
  void add(const float* exponentials, int64_t width, float factor) {
    if (factor != factor) {
      spoiled_ = true;
      return;
    }
    for (int64_t j = 0; j < width; j += kChunk * kLanes<float>)
      add_chunk(exponentials + j, std::min(kChunk, (width - j) / kLanes<float>), factor);
  }

  void flush(double* counts, double* masses) {
    for (int64_t bin = 0; bin < kWeightBins; ++bin) {
      double number = 0, rest = 0;
      for (int64_t lane = 0; lane < kLanes<float>; ++lane) number += static_cast<uint32_t>(numbers_[bin][lane]);
      for (int64_t lane = 0; lane < kLanes<float> / 2; ++lane) rest += static_cast<double>(fractions_[bin][lane]);
      // Numbers one unit below were summed.
      rest += number;
      counts[bin] += number;
      masses[bin] += bin < kWeightBins - 1 ? std::ldexp(number + std::ldexp(rest, -kFractionBits), -1 - static_cast<int>(bin))
                                           : std::ldexp(rest, -30 - kFractionBits);
      numbers_[bin] = Words{}, fractions_[bin] = Wide{};
    }
    if (spoiled_) counts[0] = masses[0] = std::numeric_limits<double>::quiet_NaN();
    spoiled_ = false;
  }

 private:
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
  static constexpr int kFractionBits = 23, kCountBit = 27;
  // As many fractions as fit below the count, and the count above, which may be all of them.
  static constexpr int64_t kChunk = 1 << (kCountBit - kFractionBits), kTogether = 4;

  // Bits of the number just below, so that a power of two is the last of its bin. Small weights are moved to the one
  // octave that is left for all of them, (2^−31, 2^−30], as fractions of it; zero becomes its lower end, in bin 31.
  static Words places_of(Vector<float> weights) {
    constexpr float kSmall = 0x1p-30f;
    const Vector<float> moved = weights * 0.5f + 0.5f * kSmall;
    return reinterpret_cast<Words>(weights > kSmall ? weights : moved) - 1;
  }

  void add_chunk(const float* exponentials, int64_t count, float factor) {
    constexpr uint32_t kBias = 126, kOne = uint32_t{1} << kCountBit, kFraction = (uint32_t{1} << kFractionBits) - 1;
    Words bins[kChunk], values[kChunk], found{};
    for (int64_t i = 0; i < count; ++i) {
      const Words places = places_of(load(exponentials + i * kLanes<float>) * factor);
      bins[i] = kBias - (places >> kFractionBits);
      values[i] = (places & kFraction) | kOne;
      found |= (Words{} + 1) << bins[i];
    }
    uint32_t present = 0;
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) present |= found[lane];
    for (uint32_t first = 0; first < kWeightBins; first += kTogether) {
      if ((present >> first & ((1 << kTogether) - 1)) == 0) continue;
      Words totals[kTogether] = {};
      for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 4
        for (uint32_t k = 0; k < kTogether; ++k)
          totals[k] += bins[i] == first + k ? values[i] : Words{};
#pragma GCC unroll 4
      for (uint32_t k = 0; k < kTogether; ++k) {
        numbers_[first + k] += totals[k] >> kCountBit;
        const Wide pairs = reinterpret_cast<Wide>(totals[k] & (kOne - 1));
        fractions_[first + k] += (pairs & 0xffffffff) + (pairs >> 32);
      }
    }
  }

  Words numbers_[kWeightBins + 1] = {};
  Wide fractions_[kWeightBins + 1] = {};
  bool spoiled_ = false;
};

}  // namespace llama_attn
