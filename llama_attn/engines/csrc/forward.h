// Attention and its statistics, one tile of query rows after another.
//
// A tile meets its keys block by block. Each block of exponentials, taken with the largest score so far, is used for
// the output while it is in the cache; if a statistic needs final weights, it is kept until the row's largest score and
// sum are known (Milakov & Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).
#pragma once

#include <limits>

#include "tile.h"
#include "weight_bins.h"

namespace llama_attn {

// Running sums of one row, a vector each; relative to the largest score so far.
template <class T>
struct RowSums {
  Vector<T> total, centred, distance, squares;
  T most, sink, local, kept;
  T learned;  // what a learned sink takes

  // Makes the sums relative to a larger score, if it is one.
  T raise(T larger) {
    if (!(larger > most)) return 1;
    const T factor = std::exp(most - larger);
    centred = (centred + (most - larger) * total) * factor;
    total *= factor, distance *= factor, squares *= factor * factor;
    sink *= factor, local *= factor, kept *= factor;
    most = larger;
    return factor;
  }

  // Adds those of other keys, relative to the same score.
  void add(const RowSums& other) {
    total += other.total, centred += other.centred, distance += other.distance, squares += other.squares;
    sink += other.sink, local += other.local, kept += other.kept;
  }
};

template <class T>
inline T largest_of(const T* scores, int64_t width) {
  Vector<T> most = load(scores);
  for (int64_t j = kLanes<T>; j < width; j += kLanes<T>) {
    const Vector<T> next = load(scores + j);
    most = next > most ? next : most;
  }
  return largest<T>(most);
}

// Scores become exponentials; `distance` is how far the first key lies behind the query.
template <class T, bool kEntropy, bool kDistance, bool kSquares>
inline void exponentiate(T* scores, int64_t width, T distance, RowSums<T>& sums) {
  RowSums<T> s = sums;
  Vector<T> behind = distance - iota<T>();
  for (int64_t j = 0; j < width; j += kLanes<T>) {
    const Vector<T> centred = load(scores + j) - s.most;
    const Vector<T> e = exp_negative(centred);
    store(scores + j, e);
    s.total += e;
    if constexpr (kEntropy) s.centred += e * centred;
    if constexpr (kDistance) {
      s.distance += e * absolute<T>(behind);
      behind -= static_cast<T>(kLanes<T>);
    }
    if constexpr (kSquares) s.squares += e * e;
  }
  sums = s;
}

// Scores x become c · tanh(x / c).
template <class T>
inline void cap(T* scores, int64_t width, T softcap) {
  for (int64_t j = 0; j < width; j += kLanes<T>)
    store(scores + j, softcap * hyperbolic_tangent<T>(load(scores + j) / softcap));
}

// The keys of one query are divided so that there is work for so many threads.
constexpr int64_t kJobs = 16;

template <class T>
class Forward {
 public:
  explicit Forward(const Call& call);
  void run();

 private:
  struct Scratch {
    Buffer<T> memory;
    T *queries, *scores, *maxima, *output, *row, *factors;  // in `memory`
    std::vector<RowSums<T>> sums;
    std::vector<Span> blocks;
    WeightBins<T> bins;
  };

  Scratch make_scratch() const;
  void prepare(int64_t head, int64_t first, T* rows);
  void walk_parts(Scratch* scratches);
  void walk(const Tile& tile, Span keys, Scratch& scratch) const;
  void block(const Tile& tile, Span keys, T* scores, Scratch& scratch) const;
  void complete(const Tile& tile, int64_t stripe, Scratch* parts) const;
  void merge(int64_t rows, Scratch* parts) const;
  void raise(int64_t row, T larger, Scratch& scratch) const;
  void add_learned_sink(const Tile& tile, int64_t row, Scratch& scratch) const;
  void finish(const Tile& tile, Scratch& scratch) const;
  void receive(const Tile& tile, int64_t stripe, Scratch& scratch) const;
  static T factor_of(int64_t row, size_t slot, int64_t rows, const Scratch& scratch);
  void write_received(const Tile& tile, const Scratch* parts) const;
  void write_rows(const Tile& tile, const Scratch* parts) const;
  void write_weights(const Tile& tile, int64_t row, const Scratch* parts, T* to) const;
  void bin_weights(const Tile& tile, int64_t stripe, Scratch& scratch) const;
  void bin_distances(T factor, const T* weights, Span keys, int64_t position, T* bins) const;
  template <class From>
  void reduce(const Tensor& to, const Buffer<From>& slots, int64_t slot_size, int64_t size, int64_t head) const;

  // Keys that one tile alone needs, as that of a decoded token, are read where they lie: packing would take longer.
  bool packs() const { return stripes_.tiles > 1; }
  int64_t rows_per_tile() const { return stripes_.queries_per_tile * (call_.heads / call_.kv_heads); }
  bool bins_weights() const { return call_.weight_count.data != nullptr || call_.weight_mass.data != nullptr; }
  bool keeps_blocks() const {
    return call_.received.data != nullptr || call_.distance_histogram.data != nullptr || bins_weights() ||
           call_.row_weights.data != nullptr;
  }
  int64_t parts_of(int64_t heads) const {
    return std::max<int64_t>(1, std::min(kJobs / std::max<int64_t>(1, heads), blocks_of(call_.num_keys)));
  }
  int64_t blocks_of(int64_t keys) const { return (keys + call_.block_keys - 1) / call_.block_keys; }
  int64_t keys_per_part(Span keys) const {
    return round_up(std::max<int64_t>(0, keys.stop - keys.first + parts_ - 1) / parts_, kPanel<T>);
  }
  Span sinks_in(Span keys, int64_t batch) const;

  const Call& call_;
  Sight<T> sight_;
  Stripes stripes_;
  int64_t parts_;              // of the keys, which share one query
  std::vector<int64_t> done_;  // so many of these, of each (batch, kv_head)
  Panels<T> keys_;
  Rows<T> values_;
  Buffer<T> sinks_;           // 1 for sink tokens, (batch, key); none if they are the first keys of the row
  std::vector<Span> within_;  // where the sinks of each (batch, panel) lie
  Buffer<T> kept_;            // 1 for keys that are kept, (batch, kv_head, slot_keys_); none if nobody asks
  int64_t slot_keys_ = 0, depth_;  // channels, in whole vectors
  Buffer<T> received_, histogram_;  // (batch, head, stripe, …)
  Buffer<double> numbers_, masses_;  // the same, of weights by their bin
  void (*exponentiate_)(T*, int64_t, T, RowSums<T>&);
};

}  // namespace llama_attn
