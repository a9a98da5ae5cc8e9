// What Python hands over: pointers, extents and strides, laid out as in engines/_library.py.
#pragma once

#include <cstdint>

namespace llama_attn {

// What fields mean, to be raised when that changes; engines/_library.py has the same number.
constexpr int64_t kAbi = 3;

enum class Type : int64_t { kFloat64, kFloat32, kBFloat16, kFloat16, kBool, kInt32, kInt64 };

// A tensor of up to four axes; `data` is null where there is none. Strides count elements.
struct Tensor {
  const void* data;
  Type type;
  int64_t size[4];
  int64_t stride[4];
};

struct Call {
  // Sizes.
  int64_t batch, heads, kv_heads, num_queries, num_keys, channels, value_channels;
  // Query row i stands at slot first_query + i · query_step of its row of tokens.
  int64_t first_query, query_step;
  int64_t causal;
  int64_t threads;
  // Query rows of all heads of a group that are worked on at once, and keys.
  int64_t tile_rows, block_keys;
  // Parameters of the statistics.
  int64_t sink_tokens, window;
  // Which part of `rows` each statistic of a query is, counted from 1; 0 where nobody asks.
  int64_t logsumexp, entropy, max_logit, max_weight, effective_keys, sink_mass, local_mass, mean_distance,
      learned_sink_mass, kept_mass;
  double scaling;
  double softcap;  // 0 for none
  double hidden_score;
  double unseen_bias;

  Tensor query, key;     // (batch, head or kv_head, token, channel)
  Tensor value;          // the same
  Tensor output;         // (batch, query, head, channel)
  Tensor mask;           // the user's own: (batch, head, query, key), bool or additive
  Tensor position_bias;  // the same, additive

  // Contiguous; none where everything is real, nothing but `causal` hides a key, or nobody asks.
  Tensor real_keys;            // (batch, key), bool
  Tensor real_queries;         // (batch, query), bool
  Tensor first_key, stop_key;  // (batch, query), int32: between them lie the keys that a query may see
  Tensor rank;                 // (batch, key), int64: real keys of the same sequence before each
  Tensor kept;                 // (batch, kv_head, key), bool

  // In the type of the computation from here on, contiguous but for the gradients.
  Tensor sinks;          // a learned score of every head that has no key, (head)
  // ln Σ_j exp s_ij of every row, also of one that sees nothing, (batch, head, query); a forward may go without.
  Tensor row_logsumexp;

  // What is measured.
  Tensor rows;                // (statistic, batch, head, query)
  Tensor received;            // (batch, head, key)
  Tensor distance_histogram;  // (batch, head, bin)
  // (batch, head, bin). Bin b < 30 is of the weights in (2^−(b+1), 2^−b], the last of all that are smaller; how many
  // these are is not counted, since keys that are not seen would be among them.
  Tensor weight_count, weight_mass;
  Tensor row_weights;  // (batch, head, chosen query, key)
  Tensor row_places;   // which of them each query is, −1 for none, (query), int64

  // For the backward.
  Tensor grad_output;                       // (batch, query, head, channel), in any type
  Tensor grad_query, grad_key, grad_value;  // as query, key and value
  Tensor grad_position_bias;                // (batch, head, query, key), contiguous zeros
  Tensor shift;                             // dO · O of every row, (batch, head, query)

  char message[256];  // what went wrong
};

// The numbers of a tensor that is contiguous and of this type; null where there is none.
template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(const_cast<void*>(tensor.data));
}

}  // namespace llama_attn
