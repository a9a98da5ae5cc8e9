#include "backward.h"

namespace llama_attn {

namespace {

// Each stripe has gradients of all keys and values of its own.
constexpr int64_t kStripes = 4;

// Scores x become y = c · tanh(x / c), whose slope is 1 − (y / c)².
template <class T>
void cap(T* scores, int64_t width, T softcap, T* slopes) {
  for (int64_t j = 0; j < width; j += kLanes<T>) {
    const Vector<T> capped = hyperbolic_tangent<T>(load(scores + j) / softcap);
    store(scores + j, softcap * capped);
    store(slopes + j, (1 - capped) * (1 + capped));
  }
}

}  // namespace

template <class T>
Backward<T>::Backward(const Call& call)
    : call_(call),
      sight_(call),
      stripes_(call, kStripes),
      width_(round_up(call.channels, kLanes<T>)),
      value_width_(round_up(call.value_channels, kLanes<T>)) {
  keys_by_token_.allocate_for(call, call.channels);
  values_by_token_.allocate_for(call, call.value_channels);
  keys_.prepare(call, call.key, call.channels);
  const int64_t tokens = stripes_.jobs(call) * call.num_keys;
  grad_key_ = zeros<T>(tokens * width_);
  grad_value_ = zeros<T>(tokens * value_width_);
}

template <class T>
typename Backward<T>::Scratch Backward<T>::make_scratch() const {
  const int64_t rows = stripes_.queries_per_tile * (call_.heads / call_.kv_heads);
  Scratch scratch;
  scratch.queries = allocate<T>(rows * width_);
  scratch.grad_output = allocate<T>(rows * value_width_);
  scratch.grad_query = allocate<T>(rows * width_);
  scratch.weights = allocate<T>(rows * call_.block_keys);
  scratch.grad_scores = allocate<T>(rows * call_.block_keys);
  scratch.slopes = allocate<T>(call_.softcap != 0 ? call_.block_keys : 0);
  scratch.row = allocate<T>(std::max({call_.block_keys, kLanes<T> * width_, kLanes<T> * value_width_}));
  return scratch;
}

template <class T>
void Backward<T>::run() {
  std::vector<Scratch> scratches;
  const int64_t heads = call_.batch * call_.kv_heads, panels = round_up(call_.num_keys, kPanel<T>) / kPanel<T>;
  const int64_t threads = std::max<int64_t>(1, std::min(call_.threads, stripes_.jobs(call_)));
  for (int64_t thread = 0; thread < threads; ++thread) scratches.push_back(make_scratch());
  int64_t next = 0;
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    int64_t mine;
#pragma omp atomic capture
    mine = next++;
    Scratch& scratch = scratches[static_cast<size_t>(mine)];
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < heads * panels; ++panel) {
      const int64_t head = panel / panels, first = panel % panels * kPanel<T>;
      keys_by_token_.pack(call_, call_.key, head, first, keys_by_token_.at(head, first), scratch.row.get());
      values_by_token_.pack(call_, call_.value, head, first, values_by_token_.at(head, first), scratch.row.get());
      keys_.fill(call_, call_.key, head, first);
    }
    for_each_job(call_, stripes_, [&](const Tile& tile, int64_t stripe) { walk(tile, stripe, scratch); });
#pragma omp for schedule(static)
    for (int64_t token = 0; token < heads * call_.num_keys; ++token) {
      reduce(call_.grad_key, grad_key_, width_, call_.channels, token, scratch.row.get());
      reduce(call_.grad_value, grad_value_, value_width_, call_.value_channels, token, scratch.row.get());
    }
  }
}

template <class T>
void Backward<T>::walk(const Tile& tile, int64_t stripe, Scratch& scratch) const {
  const Tensor &query = call_.query, &grad_output = call_.grad_output, &grad_query = call_.grad_query;
  const T scaling = static_cast<T>(call_.scaling);
  gather(query, query.stride[1], query.stride[2], tile, call_.channels, scaling, scratch.queries.get(), width_);
  gather(grad_output, grad_output.stride[2], grad_output.stride[1], tile, call_.value_channels, T{1},
         scratch.grad_output.get(), value_width_);
  std::fill_n(scratch.grad_query.get(), tile.rows() * width_, T{0});
  const int64_t slot = (tile.batch * call_.kv_heads + tile.kv_head) * stripes_.count + stripe;
  const Span seen = sight_.span(tile);
  for (int64_t first = seen.first; first < seen.stop; first += call_.block_keys) {
    const Span keys{first, std::min(first + call_.block_keys, seen.stop)};
    if (sight_.any_real(tile, keys)) block(tile, keys, slot, scratch);
  }
  for (int64_t row = 0; row < tile.rows(); ++row) {
    const int64_t begin = tile.batch * grad_query.stride[0] + tile.head(row) * grad_query.stride[1] +
                          tile.query(row) * grad_query.stride[2];
    write(grad_query, begin, grad_query.stride[3], call_.channels, scratch.grad_query.get() + row * width_, scaling);
  }
}

template <class T>
void Backward<T>::block(const Tile& tile, Span keys, int64_t slot, Scratch& scratch) const {
  const int64_t rows = tile.rows(), stride = call_.block_keys, count = keys.stop - keys.first;
  const int64_t columns = round_up(count, kLanes<T>), head = tile.batch * call_.kv_heads + tile.kv_head;
  T *weights = scratch.weights.get(), *grad_scores = scratch.grad_scores.get();
  multiply_panels(keys_by_token_.at(head, keys.first), call_.channels, columns, rows, scratch.queries.get(), width_,
                  weights, stride);
  multiply_panels(values_by_token_.at(head, keys.first), call_.value_channels, columns, rows,
                  scratch.grad_output.get(), value_width_, grad_scores, stride);
  for (int64_t row = 0; row < rows; ++row) {
    T *mine = weights + row * stride, *grad = grad_scores + row * stride;
    if (call_.softcap != 0) cap(mine, columns, static_cast<T>(call_.softcap), scratch.slopes.get());
    sight_.apply(tile, row, keys.first, columns, mine, scratch.row.get());
    const int64_t index = tile.index(call_, row);
    const T logsumexp = data_of<T>(call_.row_logsumexp)[index], shift = data_of<T>(call_.shift)[index];
    // 0 for a row that sees nothing; NaN stays NaN.
    const T sees = logsumexp < static_cast<T>(call_.hidden_score / 2) ? T{0} : T{1};
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const Vector<T> weight = exp_negative(load(mine + j) - logsumexp) * sees;
      store(mine + j, weight);
      store(grad + j, weight * (load(grad + j) - shift));
    }
    if (call_.grad_position_bias.data != nullptr)
      std::copy_n(grad, count, data_of<T>(call_.grad_position_bias) + index * call_.num_keys + keys.first);
    if (call_.softcap == 0) continue;
    for (int64_t j = 0; j < columns; j += kLanes<T>) store(grad + j, load(grad + j) * load(scratch.slopes.get() + j));
  }
  multiply<T>(rows, width_, count, {grad_scores, stride, 1}, keys_.at(head, keys.first), keys_.stride,
              scratch.grad_query.get(), width_, true);
  // The queries already carry the scaling.
  const int64_t token = slot * call_.num_keys + keys.first;
  multiply<T>(count, width_, rows, {grad_scores, 1, stride}, scratch.queries.get(), width_,
              grad_key_.get() + token * width_, width_, true);
  multiply<T>(count, value_width_, rows, {weights, 1, stride}, scratch.grad_output.get(), value_width_,
              grad_value_.get() + token * value_width_, value_width_, true);
}

// Adds what the stripes hold for one token, in their order; `token` counts over (batch, kv_head, key).
template <class T>
void Backward<T>::reduce(const Tensor& to, const Buffer<T>& slots, int64_t width, int64_t channels, int64_t token,
                         T* row) const {
  const int64_t head = token / call_.num_keys, key = token % call_.num_keys;
  std::fill_n(row, width, T{0});
  for (int64_t stripe = 0; stripe < stripes_.count; ++stripe) {
    const T* slot = slots.get() + ((head * stripes_.count + stripe) * call_.num_keys + key) * width;
    for (int64_t channel = 0; channel < width; ++channel) row[channel] += slot[channel];
  }
  const int64_t begin =
      head / call_.kv_heads * to.stride[0] + head % call_.kv_heads * to.stride[1] + key * to.stride[2];
  write(to, begin, to.stride[3], channels, row, T{1});
}

template class Backward<float>;
template class Backward<double>;

}  // namespace llama_attn
