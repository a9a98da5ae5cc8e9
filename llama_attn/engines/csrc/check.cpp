#include "check.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>

#include "product.h"
#include "weight_bins.h"

namespace llama_attn {

namespace {

// No extent and no position is as large; sums and small multiples of such numbers do not overflow.
constexpr int64_t kMost = int64_t{1} << 48;

template <class... Values>
[[noreturn]] void refuse(const char* format, Values... values) {
  char message[sizeof(Call::message)];
  if constexpr (sizeof...(values) == 0)
    std::snprintf(message, sizeof(message), "%s", format);
  else
    std::snprintf(message, sizeof(message), format, values...);
  throw std::invalid_argument(message);
}

void in_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    refuse("%s: expected a number from %lld to %lld, got %lld", name, static_cast<long long>(least),
           static_cast<long long>(most), static_cast<long long>(value));
}

enum class Layout { kAny, kContiguous };

void has(const char* name, const Tensor& tensor, std::array<int64_t, 4> size, std::initializer_list<Type> types,
         Layout layout) {
  bool known = false;
  const bool empty = size[0] == 0 || size[1] == 0 || size[2] == 0 || size[3] == 0;
  // Torch gives no address to a tensor without elements.
  bool fits = tensor.data != nullptr || empty;
  for (int axis = 0; axis < 4; ++axis) fits = fits && tensor.size[axis] == size[axis];
  if (!fits) {
    const auto of = [](const int64_t* four, int axis) { return static_cast<long long>(four[axis]); };
    const int64_t *want = size.data(), *got = tensor.size;
    refuse("%s: expected a tensor of %lld × %lld × %lld × %lld, got %s of %lld × %lld × %lld × %lld", name, of(want, 0),
           of(want, 1), of(want, 2), of(want, 3), tensor.data == nullptr ? "no memory for one" : "one", of(got, 0),
           of(got, 1), of(got, 2), of(got, 3));
  }
  for (const Type type : types) known = known || tensor.type == type;
  if (!known) refuse("%s: type %lld does not suit", name, static_cast<long long>(tensor.type));
  if (layout == Layout::kAny || empty) return;
  int64_t dense = 1;
  for (int axis = 3; axis >= 0; dense *= size[axis--])
    if (size[axis] > 1 && tensor.stride[axis] != dense) refuse("%s: expected a contiguous tensor", name);
}

// Refuses what would overflow the numbers of bytes and elements that memory is asked for by.
void countable(std::initializer_list<int64_t> factors) {
  int64_t product = 1024;
  for (const int64_t factor : factors)
    if (__builtin_mul_overflow(product, std::max<int64_t>(factor, 1), &product)) refuse("sizes: too large to count");
}

constexpr std::initializer_list<Type> kFloats = {Type::kFloat64, Type::kFloat32, Type::kBFloat16, Type::kFloat16};

}  // namespace

void check(const Call& call, bool backward) {
  const int64_t batch = call.batch, heads = call.heads, queries = call.num_queries, keys = call.num_keys;
  const Type compute = call.query.type == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32;
  in_range("batch", batch, 0, kMost);
  in_range("kv_heads", call.kv_heads, 1, kMost);
  in_range("heads", heads, 1, kMost);
  if (heads % call.kv_heads != 0)
    refuse("heads: %lld is no multiple of %lld KV heads", static_cast<long long>(heads),
           static_cast<long long>(call.kv_heads));
  in_range("num_queries", queries, 0, kMost);
  in_range("num_keys", keys, 0, kMost);
  in_range("channels", call.channels, 1, kMost);
  in_range("value_channels", call.value_channels, 0, kMost);
  in_range("first_query", call.first_query, 0, kMost);
  in_range("query_step", call.query_step, 1, kMost);
  // In this order no product overflows.
  if (queries > 0) in_range("query_step", call.query_step, 1, kMost / queries);
  in_range("threads", call.threads, 1, 1 << 16);
  in_range("tile_rows", call.tile_rows, 1, kMost);
  in_range("block_keys", call.block_keys, 1, kMost);
  if (call.block_keys % kPanel<float> != 0)
    refuse("block_keys: expected a multiple of %lld, got %lld", static_cast<long long>(kPanel<float>),
           static_cast<long long>(call.block_keys));
  in_range("sink_tokens", call.sink_tokens, 0, kMost);
  in_range("window", call.window, 0, kMost);
  const int64_t width = std::max(call.channels, call.value_channels) + kPanel<float>, padded = keys + kPanel<float>;
  countable({batch, heads, queries});
  countable({batch, heads, padded});
  countable({batch, call.kv_heads, padded, width});
  countable({heads, call.tile_rows, std::max(padded, width)});

  has("query", call.query, {batch, heads, queries, call.channels}, kFloats, Layout::kAny);
  has("key", call.key, {batch, call.kv_heads, keys, call.channels}, kFloats, Layout::kAny);
  const bool has_value = backward || call.value_channels > 0;
  if (has_value) {
    in_range("value_channels", call.value_channels, 1, kMost);
    has("value", call.value, {batch, call.kv_heads, keys, call.value_channels}, kFloats, Layout::kAny);
  }
  const std::array<int64_t, 4> pairs{batch, heads, queries, keys}, rows{batch, heads, queries, 1};
  if (call.mask.data != nullptr)
    has("mask", call.mask, pairs,
        {Type::kBool, Type::kFloat64, Type::kFloat32, Type::kBFloat16, Type::kFloat16}, Layout::kAny);
  if (call.position_bias.data != nullptr) has("position_bias", call.position_bias, pairs, kFloats, Layout::kAny);
  const auto optional = [](const char* name, const Tensor& tensor, std::array<int64_t, 4> size, Type type) {
    if (tensor.data != nullptr) has(name, tensor, size, {type}, Layout::kContiguous);
  };
  optional("real_keys", call.real_keys, {batch, keys, 1, 1}, Type::kBool);
  optional("real_queries", call.real_queries, {batch, queries, 1, 1}, Type::kBool);
  optional("sinks", call.sinks, {heads, 1, 1, 1}, compute);
  optional("rank", call.rank, {batch, keys, 1, 1}, Type::kInt64);
  optional("first_key", call.first_key, {batch, queries, 1, 1}, Type::kInt32);
  optional("stop_key", call.stop_key, {batch, queries, 1, 1}, Type::kInt32);
  if ((call.first_key.data == nullptr) != (call.stop_key.data == nullptr)) refuse("first_key: not without stop_key");
  if (call.first_key.data != nullptr) {
    const int32_t *first = data_of<int32_t>(call.first_key), *stop = data_of<int32_t>(call.stop_key);
    for (int64_t at = 0; at < batch * queries; ++at)
      if (first[at] < 0 || stop[at] > keys || first[at] > stop[at])
        refuse("first_key, stop_key: expected 0 ≤ first ≤ stop ≤ %lld, got %lld and %lld",
               static_cast<long long>(keys), static_cast<long long>(first[at]), static_cast<long long>(stop[at]));
  }
  if (backward || call.row_logsumexp.data != nullptr)
    has("row_logsumexp", call.row_logsumexp, rows, {compute}, Layout::kContiguous);
  if (backward) {
    has("grad_output", call.grad_output, {batch, queries, heads, call.value_channels}, kFloats, Layout::kAny);
    has("grad_query", call.grad_query, {batch, heads, queries, call.channels}, kFloats, Layout::kAny);
    has("grad_key", call.grad_key, {batch, call.kv_heads, keys, call.channels}, kFloats, Layout::kAny);
    has("grad_value", call.grad_value, {batch, call.kv_heads, keys, call.value_channels}, kFloats, Layout::kAny);
    has("shift", call.shift, rows, {compute}, Layout::kContiguous);
    optional("grad_position_bias", call.grad_position_bias, pairs, compute);
    return;
  }
  if (has_value)
    has("output", call.output, {batch, queries, heads, call.value_channels}, kFloats, Layout::kAny);
  int64_t statistics = 0;
  for (const int64_t which : {call.logsumexp, call.entropy, call.max_logit, call.max_weight, call.effective_keys,
                              call.sink_mass, call.local_mass, call.mean_distance, call.learned_sink_mass,
                              call.kept_mass}) {
    in_range("place of a statistic", which, 0, 10);
    statistics = which > statistics ? which : statistics;
  }
  if (statistics > 0)
    has("rows", call.rows, {statistics, batch, heads, queries}, {compute}, Layout::kContiguous);
  optional("received", call.received, {batch, heads, keys, 1}, compute);
  in_range("distance bins", call.distance_histogram.size[2], 0, 62);
  optional("distance_histogram", call.distance_histogram, {batch, heads, call.distance_histogram.size[2], 1}, compute);
  optional("weight_count", call.weight_count, {batch, heads, kWeightBins, 1}, compute);
  optional("weight_mass", call.weight_mass, {batch, heads, kWeightBins, 1}, compute);
  if (call.row_weights.data != nullptr) {
    const int64_t chosen = call.row_weights.size[2];
    in_range("queries of row_weights", chosen, 1, queries);
    has("row_weights", call.row_weights, {batch, heads, chosen, keys}, {compute}, Layout::kContiguous);
    has("row_places", call.row_places, {queries, 1, 1, 1}, {Type::kInt64}, Layout::kContiguous);
    for (int64_t query = 0; query < queries; ++query)
      in_range("place in row_weights of a query", data_of<int64_t>(call.row_places)[query], -1, chosen - 1);
  }
  if (call.kept_mass != 0)
    has("kept", call.kept, {batch, call.kv_heads, keys, 1}, {Type::kBool}, Layout::kContiguous);
}

}  // namespace llama_attn
