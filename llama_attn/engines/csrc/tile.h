// Rows of queries against keys: packing, who sees whom, and the scores of one tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "convert.h"
#include "memory.h"
#include "product.h"

namespace llama_attn {

// Keys or values of every (batch, kv_head) with tokens along the vectors: panels of (channel, kPanel tokens), in which
// a product with rows of queries finds its right side in order.
template <class T>
struct Panels {
  Buffer<T> data;
  int64_t channels = 0, per_head = 0;

  void allocate_for(const Call& call, int64_t num_channels) {
    channels = num_channels;
    per_head = round_up(call.num_keys, kPanel<T>) * num_channels;
    data = allocate<T>(call.batch * call.kv_heads * per_head);
  }
  // The panel that begins with token `first`, a multiple of kPanel.
  T* at(int64_t head, int64_t first) const { return data.get() + head * per_head + first * channels; }

  // Numbers that `pack` needs in `rows`.
  static int64_t scratch_size(int64_t channels) { return kLanes<T> * round_up(channels, kLanes<T>); }

  // Fills the panel that begins with token `first`; tokens that are not there are zeros.
  void pack(const Call& call, const Tensor& tensor, int64_t head, int64_t first, T* panel, T* rows) const {
    const int64_t begin = head / call.kv_heads * tensor.stride[0] + head % call.kv_heads * tensor.stride[1];
    const int64_t stride = round_up(channels, kLanes<T>);
    for (int64_t token = 0; token < kPanel<T>; token += kLanes<T>) {
      for (int64_t i = 0; i < kLanes<T>; ++i) {
        const int64_t from = first + token + i;
        if (from < call.num_keys)
          read(tensor, begin + from * tensor.stride[2], tensor.stride[3], channels, rows + i * stride);
        else
          std::fill_n(rows + i * stride, stride, T{0});
      }
      for (int64_t channel = 0; channel < channels; channel += kLanes<T>) {
        Vector<T> square[kLanes<T>];
        for (int i = 0; i < kLanes<T>; ++i) square[i] = load(rows + i * stride + channel);
        transpose<T>(square);
        const int64_t there = std::min<int64_t>(kLanes<T>, channels - channel);
        for (int64_t i = 0; i < there; ++i) store(panel + (channel + i) * kPanel<T> + token, square[i]);
      }
    }
  }
};

// Keys or values of every (batch, kv_head) with channels along the vectors: the tensor itself where it has that form,
// else a copy whose rows end in zeros.
template <class T>
struct Rows {
  Buffer<T> copy;
  const T* own = nullptr;
  int64_t stride = 0, heads = 0, batch_stride = 0, head_stride = 0, channels = 0;

  void prepare(const Call& call, const Tensor& tensor, int64_t num_channels) {
    heads = call.kv_heads;
    channels = num_channels;
    const bool same = tensor.type == (sizeof(T) == 8 ? Type::kFloat64 : Type::kFloat32);
    // Rows that are far apart would lie in more pages of memory than a block can use at once.
    const bool dense = tensor.stride[3] == 1 && tensor.stride[2] == num_channels && num_channels % kLanes<T> == 0;
    if (same && dense) {
      own = static_cast<const T*>(tensor.data);
      batch_stride = tensor.stride[0], head_stride = tensor.stride[1], stride = tensor.stride[2];
    } else {
      stride = round_up(num_channels, kLanes<T>);
      head_stride = call.num_keys * stride, batch_stride = heads * head_stride;
      copy = allocate<T>(call.batch * batch_stride);
    }
  }
  void fill(const Call& call, const Tensor& tensor, int64_t head, int64_t first) {
    if (own != nullptr) return;
    const int64_t begin = head / heads * tensor.stride[0] + head % heads * tensor.stride[1];
    for (int64_t token = first; token < std::min(first + kPanel<T>, call.num_keys); ++token) {
      T* row = copy.get() + head * head_stride + token * stride;
      read(tensor, begin + token * tensor.stride[2], tensor.stride[3], channels, row);
      std::fill(row + channels, row + stride, T{0});
    }
  }
  const T* at(int64_t head, int64_t token) const {
    const T* base = own != nullptr ? own : copy.get();
    return base + head / heads * batch_stride + head % heads * head_stride + token * stride;
  }
};

// Some of the keys: those from `first` to before `stop`.
struct Span {
  int64_t first, stop;
};

// A run of query rows of one group of heads. Row (head of the group, query) is row head · queries + query.
struct Tile {
  int64_t batch, kv_head, group;
  int64_t first_row, queries;

  int64_t rows() const { return group * queries; }
  int64_t head(int64_t row) const { return kv_head * group + row / queries; }
  int64_t query(int64_t row) const { return first_row + row % queries; }
  // Of the row in a (batch, head, query) tensor.
  int64_t index(const Call& call, int64_t row) const {
    return (batch * call.heads + head(row)) * call.num_queries + query(row);
  }
};

// Who sees whom.
template <class T>
class Sight {
 public:
  explicit Sight(const Call& call)
      : call_(call),
        first_key_(data_of<int32_t>(call.first_key)),
        stop_key_(data_of<int32_t>(call.stop_key)),
        real_keys_(data_of<uint8_t>(call.real_keys)),
        real_queries_(data_of<uint8_t>(call.real_queries)) {}

  int64_t position(int64_t query) const { return call_.first_query + query * call_.query_step; }

  // The keys that a query could see if all of them were real.
  Span span(int64_t batch, int64_t query) const {
    const int64_t at = batch * call_.num_queries + query;
    if (first_key_ != nullptr) return {first_key_[at], stop_key_[at]};
    return {0, call_.causal ? std::min(position(query) + 1, call_.num_keys) : call_.num_keys};
  }

  // The keys that some row of the tile could see, from the beginning of a panel on.
  Span span(const Tile& tile) const {
    if (first_key_ == nullptr) return span(tile.batch, tile.first_row + tile.queries - 1);
    Span all{call_.num_keys, 0};
    for (int64_t query = tile.first_row; query < tile.first_row + tile.queries; ++query) {
      const Span one = span(tile.batch, query);
      if (one.first < one.stop) all = {std::min(all.first, one.first), std::max(all.stop, one.stop)};
    }
    return {all.first / kPanel<T> * kPanel<T>, all.stop};
  }

  // Whether a key among these is real.
  bool any_real(const Tile& tile, Span keys) const {
    if (real_keys_ == nullptr) return true;
    const uint8_t *real = real_keys_ + tile.batch * call_.num_keys, *stop = real + keys.stop;
    return std::find(real + keys.first, stop, uint8_t{1}) != stop;
  }

  bool real_row(const Tile& tile, int64_t row) const {
    return real_queries_ == nullptr || real_queries_[tile.batch * call_.num_queries + tile.query(row)];
  }

  // Scores of one row for the keys [first, first + width): adds biases and hides what the row may not see.
  void apply(const Tile& tile, int64_t row, int64_t first, int64_t width, T* scores, T* scratch) const {
    const T hidden = static_cast<T>(call_.hidden_score);
    const int64_t there = std::min(width, call_.num_keys - first);
    if (call_.position_bias.data != nullptr) {
      read_pairs(call_.position_bias, tile, row, first, there, scratch);
      // Its −∞ hides; added, it would make NaN of a weight of zero times a score.
      constexpr T kNever = -std::numeric_limits<T>::infinity();
      for (int64_t j = 0; j < there; ++j) scores[j] = scratch[j] == kNever ? hidden : scores[j] + scratch[j];
    }
    if (call_.mask.data != nullptr) {
      read_pairs(call_.mask, tile, row, first, there, scratch);
      if (call_.mask.type == Type::kBool) {
        for (int64_t j = 0; j < there; ++j) scores[j] = scratch[j] != 0 ? scores[j] : hidden;
      } else {
        const T unseen = static_cast<T>(call_.unseen_bias);
        for (int64_t j = 0; j < there; ++j) scores[j] = scratch[j] <= unseen ? hidden : scores[j] + scratch[j];
      }
    }
    if (real_keys_ != nullptr) {
      const uint8_t* real = real_keys_ + tile.batch * call_.num_keys + first;
      for (int64_t j = 0; j < there; ++j) scores[j] = real[j] ? scores[j] : hidden;
    }
    const Span seen = span(tile.batch, tile.query(row));
    if (seen.first > first) std::fill_n(scores, std::min(width, seen.first - first), hidden);
    const int64_t beyond = std::max<int64_t>(0, seen.stop - first);
    if (beyond < width) std::fill(scores + beyond, scores + width, hidden);
  }

 private:
  // What a (batch, head, query, key) tensor holds for one row.
  void read_pairs(const Tensor& tensor, const Tile& tile, int64_t row, int64_t first, int64_t count, T* to) const {
    const int64_t begin = tile.batch * tensor.stride[0] + tile.head(row) * tensor.stride[1] +
                          tile.query(row) * tensor.stride[2] + first * tensor.stride[3];
    read(tensor, begin, tensor.stride[3], count, to);
  }

  const Call& call_;
  const int32_t *first_key_, *stop_key_;
  const uint8_t *real_keys_, *real_queries_;
};

// Rows of a (batch, head, token, channel) tensor for a tile, times `factor`; rows end in zeros.
template <class T>
void gather(const Tensor& tensor, int64_t head_stride, int64_t query_stride, const Tile& tile, int64_t channels,
            T factor, T* to, int64_t to_stride) {
  for (int64_t row = 0; row < tile.rows(); ++row, to += to_stride) {
    const int64_t begin =
        tile.batch * tensor.stride[0] + tile.head(row) * head_stride + tile.query(row) * query_stride;
    read(tensor, begin, tensor.stride[3], channels, to);
    for (int64_t channel = 0; channel < channels; ++channel) to[channel] *= factor;
    std::fill(to + channels, to + to_stride, T{0});
  }
}

// Left (rows × channels) · consecutive panels of `width` tokens in all, a multiple of the lanes.
template <class T>
void multiply_panels(const T* panels, int64_t channels, int64_t width, int64_t rows, const T* left,
                     int64_t left_stride, T* result, int64_t result_stride) {
  for (int64_t column = 0; column < width; column += kPanel<T>)
    multiply<T>(rows, std::min(kPanel<T>, width - column), channels, {left, left_stride, 1},
                panels + column * channels, kPanel<T>, result + column, result_stride, false);
}

// Left (rows × depth) · the keys [first, first + width) of a (batch, kv_head), read where they lie. Depth is the channels
// in whole vectors, of which the last ends in zeros; keys that are not there are zeros.
template <class T>
void multiply_keys(const Call& call, int64_t head, int64_t first, int64_t width, int64_t rows, const T* left,
                   int64_t depth, T* result, int64_t result_stride, T* copies) {
  const Tensor& key = call.key;
  const int64_t begin = head / call.kv_heads * key.stride[0] + head % call.kv_heads * key.stride[1];
  const bool same = key.type == (sizeof(T) == 8 ? Type::kFloat64 : Type::kFloat32);
  const bool readable = same && key.stride[3] == 1 && call.channels == depth;
  for (int64_t column = 0; column < width; column += kLanes<T>, first += kLanes<T>) {
    const T* keys = copies;
    int64_t stride = depth;
    if (readable && first + kLanes<T> <= call.num_keys) {
      stride = key.stride[2];
      keys = static_cast<const T*>(key.data) + begin + first * stride;
    } else {
      const int64_t there = std::clamp<int64_t>(call.num_keys - first, 0, kLanes<T>);
      std::fill_n(copies, kLanes<T> * depth, T{0});
      for (int64_t i = 0; i < there; ++i)
        read(key, begin + (first + i) * key.stride[2], key.stride[3], call.channels, copies + i * depth);
    }
    for (int64_t row = 0; row < rows; ++row) {
      Vector<T> products[kLanes<T>] = {};
      for (int64_t channel = 0; channel < depth; channel += kLanes<T>) {
        const Vector<T> query = load(left + row * depth + channel);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<T>; ++i) products[i] += load(keys + i * stride + channel) * query;
      }
      store(result + row * result_stride + column, sum_each<T>(products));
    }
  }
}

// Contiguous tiles of one (batch, kv_head): the unit of work, and the owner of one slot of partial sums. There are as
// many for one thread as for many, so that no result depends on how the work was shared.
struct Stripes {
  int64_t queries_per_tile, tiles, count;

  Stripes(const Call& call, int64_t most) {
    const int64_t most_queries = std::min(call.num_queries, call.tile_rows / (call.heads / call.kv_heads));
    queries_per_tile = std::max<int64_t>(1, most_queries);
    tiles = (call.num_queries + queries_per_tile - 1) / queries_per_tile;
    count = std::min(most, tiles);
  }
  int64_t jobs(const Call& call) const { return call.batch * call.kv_heads * count; }
  int64_t first_tile(int64_t stripe) const { return stripe * tiles / count; }
};

// One job after another, the most expensive first: under a causal mask those are the last rows.
template <class Work>
void for_each_job(const Call& call, const Stripes& stripes, Work work) {
  const int64_t heads = call.batch * call.kv_heads, jobs = stripes.jobs(call);
#pragma omp for schedule(dynamic, 1)
  for (int64_t job = 0; job < jobs; ++job) {
    const int64_t head = job % heads, stripe = stripes.count - 1 - job / heads;
    for (int64_t tile = stripes.first_tile(stripe); tile < stripes.first_tile(stripe + 1); ++tile) {
      const int64_t first = tile * stripes.queries_per_tile;
      work(Tile{head / call.kv_heads, head % call.kv_heads, call.heads / call.kv_heads, first,
                std::min(stripes.queries_per_tile, call.num_queries - first)},
           stripe);
    }
  }
}

}  // namespace llama_attn
