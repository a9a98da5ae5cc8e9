// Gradients of query, key and value; the weights of each block are computed again from the logsumexp.
//
// Source: Dao et al., arXiv 2205.14135, algorithm 4.
#pragma once

#include "tile.h"

namespace llama_attn {

template <class T>
class Backward {
 public:
  explicit Backward(const Call& call);
  void run();

 private:
  struct Scratch {
    Buffer<T> queries, grad_output, grad_query, weights, grad_scores, slopes, row;
  };

  Scratch make_scratch() const;
  void walk(const Tile& tile, int64_t stripe, Scratch& scratch) const;
  void block(const Tile& tile, Span keys, int64_t slot, Scratch& scratch) const;
  void reduce(const Tensor& to, const Buffer<T>& slots, int64_t width, int64_t channels, int64_t token, T* row) const;

  const Call& call_;
  Sight<T> sight_;
  Stripes stripes_;
  int64_t width_, value_width_;  // channels in whole vectors
  Panels<T> keys_by_token_, values_by_token_;
  Rows<T> keys_;
  Buffer<T> grad_key_, grad_value_;  // (batch, kv_head, stripe, key, channel)
};

}  // namespace llama_attn
