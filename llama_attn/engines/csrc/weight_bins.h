// How many weights there are of each size, and how much they sum to.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "memory.h"
#include "vector.h"

namespace llama_attn {

// Bin b < 30 holds the weights in (2^−(b+1), 2^−b], the last one all that are smaller.
constexpr int64_t kWeightBins = 31;

// Numbers and sums of weights by their bin. What rows are NaN is counted in the first bin, as NaN.
template <class T>
class WeightBins {
 public:
  void prepare() {}

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
// them a one that counts.
//
// A pair of weights is added in one step, to a table that has a row for each bin of the first and a column for each of
// the second, and to two such tables in turn: what was just written is slow to be read again.
template <>
class WeightBins<float> {
 public:
  void prepare() {
    table_ = allocate<uint64_t>(kTables * kSide * kRow);
    std::fill_n(table_.get(), kTables * kSide * kRow, 0);
  }

  void add(const float* exponentials, int64_t width, float factor) {
    if (factor != factor) {
      spoiled_ = true;
      return;
    }
    for (int64_t j = 0; j < width; j += kChunk) add_chunk(exponentials + j, std::min(kChunk, width - j), factor);
  }

  void flush(double* counts, double* masses) {
    settle();
    for (int64_t bin = 0; bin < kWeightBins; ++bin) {
      const double number = static_cast<double>(numbers_[bin]);
      // Numbers one unit below were summed.
      const double rest = std::ldexp(static_cast<double>(fractions_[bin]) + number, -kFractionBits);
      counts[bin] += number;
      masses[bin] += bin < kWeightBins - 1 ? std::ldexp(number + rest, -1 - static_cast<int>(bin))
                                           : std::ldexp(rest, -static_cast<int>(bin));
      numbers_[bin] = fractions_[bin] = 0;
    }
    if (spoiled_) counts[0] = masses[0] = std::numeric_limits<double>::quiet_NaN();
    spoiled_ = false;
  }

 private:
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Pair __attribute__((vector_size(16)));
  static constexpr int64_t kTables = 2, kSide = kWeightBins + 1, kRow = 2 * kSide, kChunk = 512;
  static constexpr int kFractionBits = 23, kCountBit = 43;
  static constexpr uint64_t kOne = uint64_t{1} << kCountBit, kFraction = (uint64_t{1} << kFractionBits) - 1;
  // As many fractions as fit below the count.
  static constexpr int64_t kMost = int64_t{1} << (kCountBit - kFractionBits);

  // Bits of the number just below, so that a power of two is the last of its bin. Small weights are moved to the one
  // octave that is left for all of them, (2^−31, 2^−30], as fractions of it; zero becomes its lower end, in bin 31.
  static Words places_of(Vector<float> exponentials, float factor) {
    const Vector<float> weights = exponentials * factor, moved = exponentials * (0.5f * factor) + 0x1p-31f;
    return reinterpret_cast<Words>(weights > moved ? weights : moved) - 1;
  }

  // The numbers of both in even, or in odd lanes, side by side.
  template <int kOdd, int... Lane>
  static Wide beside(Wide first, Wide second, std::integer_sequence<int, Lane...>) {
    constexpr int kCount = sizeof...(Lane);
    return __builtin_shufflevector(first, second, ((Lane & ~1) + kOdd + (Lane & 1) * kCount)...);
  }

  void add_chunk(const float* exponentials, int64_t width, float factor) {
    constexpr int64_t kLanesHere = kLanes<float>, kStep = 2 * kLanesHere;
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<float> / 2>{};
    alignas(64) uint64_t values[2 * kChunk + 4 * kLanesHere];
    alignas(64) uint32_t places[kChunk];
    if ((held_ += kChunk) > kMost) settle(), held_ = kChunk;
    int64_t pairs = 0;
    for (int64_t j = 0; j < width; j += kStep, pairs += kLanesHere) {
      const bool both = j + kLanesHere < width;
      const Words first = places_of(load(exponentials + j), factor);
      const Words second = places_of(both ? load(exponentials + j + kLanesHere) : Vector<float>{}, factor);
      // The last five bits of the exponent, with the larger ones for the larger weights, times the size of an entry.
      const Words where = (first >> (kFractionBits - 6) & 31 << 6) | (second >> (kFractionBits - 1) & 31 << 1);
      std::memcpy(places + pairs, &where, sizeof(where));
      const Wide a = reinterpret_cast<Wide>(first), b = reinterpret_cast<Wide>(second);
      const Wide even_a = (a & kFraction) | kOne, even_b = (b & kFraction) | kOne;
      const Wide odd_a = (a >> 32 & kFraction) | kOne, odd_b = (b >> 32 & kFraction) | kOne;
      // Of every four lanes, the first, second, third and last.
      const Wide parts[4] = {beside<0>(even_a, even_b, lanes), beside<0>(odd_a, odd_b, lanes),
                             beside<1>(even_a, even_b, lanes), beside<1>(odd_a, odd_b, lanes)};
      std::memcpy(values + 2 * pairs, parts, sizeof(parts));
    }
    uint64_t* const table = table_.get();
    for (int64_t first = 0; first < pairs; first += kLanesHere)
#pragma GCC unroll 4
      for (int64_t quad = 0; quad < kLanesHere / 4; ++quad)
#pragma GCC unroll 4
        for (int64_t part = 0; part < 4; ++part) {
          uint64_t* const entry = table + part % kTables * kSide * kRow + places[first + 4 * quad + part];
          Pair sums, value;
          std::memcpy(&sums, entry, sizeof(sums));
          std::memcpy(&value, values + 2 * (first + part * (kLanesHere / 4) + quad), sizeof(value));
          sums += value;
          std::memcpy(entry, &sums, sizeof(sums));
        }
  }

  // Adds up rows and columns of the tables, and empties them.
  void settle() {
    uint64_t columns[kRow] = {};
    uint64_t sums[kSide] = {};
    for (int64_t row = 0; row < kTables * kSide; ++row) {
      uint64_t* const entries = table_.get() + row * kRow;
      uint64_t firsts = 0;
      for (int64_t i = 0; i < kRow; i += 2) firsts += entries[i];
      for (int64_t i = 0; i < kRow; ++i) columns[i] += entries[i];
      std::fill_n(entries, kRow, 0);
      sums[row % kSide] += firsts;
    }
    for (int64_t exponent = 0; exponent < kSide; ++exponent) {
      // 126, the exponent of the first bin, ends in 30.
      const int64_t bin = (30 - exponent) & 31;
      const uint64_t sum = sums[exponent] + columns[2 * exponent + 1];
      numbers_[bin] += sum >> kCountBit;
      fractions_[bin] += sum & (kOne - 1);
    }
    held_ = 0;
  }

  Buffer<uint64_t> table_;
  uint64_t numbers_[kSide] = {}, fractions_[kSide] = {};
  int64_t held_ = 0;
  bool spoiled_ = false;
};

}  // namespace llama_attn
