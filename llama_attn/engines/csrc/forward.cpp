#include "forward.h"

namespace llama_attn {

namespace {

// More stripes balance more threads, and take more memory for partial sums.
constexpr int64_t kStripes = 16;

template <class T, bool kEntropy, bool kDistance>
auto choose(bool squares) {
  return squares ? exponentiate<T, kEntropy, kDistance, true> : exponentiate<T, kEntropy, kDistance, false>;
}

template <class T>
auto choose(const Call& call) {
  const bool squares = call.effective_keys != 0, distance = call.mean_distance != 0;
  if (call.entropy != 0) return distance ? choose<T, true, true>(squares) : choose<T, true, false>(squares);
  return distance ? choose<T, false, true>(squares) : choose<T, false, false>(squares);
}

// `which` counts the statistics from 1, and is 0 for one that nobody asks for.
template <class T>
void put(const Call& call, int64_t which, int64_t index, T value) {
  if (which != 0) data_of<T>(call.rows)[(which - 1) * call.batch * call.heads * call.num_queries + index] = value;
}

}  // namespace

template <class T>
Forward<T>::Forward(const Call& call)
    : call_(call),
      sight_(call),
      stripes_(call, kStripes),
      parts_(call.num_queries > 1 ? 1 : parts_of(call.batch * call.kv_heads)),
      depth_(round_up(call.channels, kLanes<T>)),
      exponentiate_(choose<T>(call)) {
  keys_.channels = call.channels;
  if (packs()) keys_.allocate_for(call, call.channels);
  if (call.value.data != nullptr) values_.prepare(call, call.value, call.value_channels);
  slot_keys_ = round_up(call.num_keys, kPanel<T>);
  const int64_t slots = call.batch * call.heads * stripes_.count;
  if (call.received.data != nullptr && call.num_queries != 1) received_ = zeros<T>(slots * slot_keys_);
  if (call.distance_histogram.data != nullptr) histogram_ = zeros<T>(slots * call.distance_histogram.size[2]);
  if (bins_weights()) numbers_ = zeros<double>(slots * kWeightBins), masses_ = zeros<double>(slots * kWeightBins);
  if (call.kept_mass != 0) kept_ = allocate<T>(call.batch * call.kv_heads * slot_keys_);
  if (parts_ > 1) done_.assign(static_cast<size_t>(call.batch * call.kv_heads), 0);
  if (call.sink_mass == 0 || call.rank.data == nullptr) return;
  const int64_t *rank = data_of<int64_t>(call.rank), panels = slot_keys_ / kPanel<T>;
  const uint8_t* real = data_of<uint8_t>(call.real_keys);
  sinks_ = allocate<T>(call.batch * call.num_keys);
  within_.assign(static_cast<size_t>(call.batch * panels), Span{call.num_keys, 0});
  for (int64_t at = 0; at < call.batch * call.num_keys; ++at) {
    const bool sink = rank[at] < call.sink_tokens && (real == nullptr || real[at]);
    sinks_[at] = sink;
    if (!sink) continue;
    const int64_t key = at % call.num_keys;
    Span& within = within_[static_cast<size_t>(at / call.num_keys * panels + key / kPanel<T>)];
    within = {std::min(within.first, key), key + 1};
  }
}

template <class T>
typename Forward<T>::Scratch Forward<T>::make_scratch() const {
  const int64_t rows = rows_per_tile(), blocks = blocks_of(keys_per_part({0, call_.num_keys}));
  const int64_t kept = keeps_blocks() ? blocks : 1, width = round_up(call_.value_channels, kLanes<T>);
  const int64_t row = std::max({call_.block_keys, rows, Panels<T>::scratch_size(call_.channels)});
  Scratch scratch;
  // Whole lines of the cache, in one piece: of a decoded token's attention, a call for each would be a tenth.
  T** const places[] = {&scratch.queries, &scratch.scores, &scratch.maxima,
                        &scratch.output,  &scratch.row,    &scratch.factors};
  const int64_t sizes[] = {rows * depth_, kept * rows * call_.block_keys, kept * rows, rows * width, row, rows};
  int64_t all = 0;
  for (const int64_t size : sizes) all += round_up(size, kPanel<T>);
  scratch.memory = allocate<T>(all);
  T* next = scratch.memory.get();
  for (size_t i = 0; i < std::size(sizes); next += round_up(sizes[i++], kPanel<T>)) *places[i] = next;
  if (bins_weights()) scratch.bins.prepare();
  scratch.sums.resize(static_cast<size_t>(rows));
  scratch.blocks.reserve(static_cast<size_t>(blocks));
  return scratch;
}

template <class T>
void Forward<T>::run() {
  const int64_t heads = call_.batch * call_.kv_heads, panels = slot_keys_ / kPanel<T>;
  const int64_t jobs = parts_ > 1 ? heads * parts_ : stripes_.jobs(call_);
  const int64_t threads = std::max<int64_t>(1, std::min(call_.threads, jobs));
  std::vector<Scratch> scratches;
  // Parts of one head wait for one another.
  const int64_t places = parts_ > 1 ? std::max(threads, jobs) : threads;
  for (int64_t place = 0; place < places; ++place) scratches.push_back(make_scratch());
  // A token waits for the other threads as seldom as can be.
  const bool prepares = packs() || values_.copy != nullptr || kept_ != nullptr;
  int64_t next = 0;
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    int64_t mine;
#pragma omp atomic capture
    mine = next++;
    Scratch& scratch = scratches[static_cast<size_t>(mine)];
    if (prepares) {
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < heads * panels; ++panel)
        prepare(panel / panels, panel % panels * kPanel<T>, scratch.row);
    }
    if (parts_ > 1) {
      walk_parts(scratches.data());
    } else {
      for_each_job(call_, stripes_, [&](const Tile& tile, int64_t stripe) {
        walk(tile, sight_.span(tile), scratch);
        complete(tile, stripe, &scratch);
      });
    }
#pragma omp for schedule(static) nowait
    for (int64_t head = 0; head < call_.batch * call_.heads; ++head) {
      reduce(call_.received, received_, slot_keys_, call_.num_keys, head);
      reduce(call_.distance_histogram, histogram_, call_.distance_histogram.size[2], call_.distance_histogram.size[2],
             head);
      reduce(call_.weight_count, numbers_, kWeightBins, kWeightBins, head);
      reduce(call_.weight_mass, masses_, kWeightBins, kWeightBins, head);
    }
  }
}

// One query, whose keys several threads meet; who comes last to the end of a head completes it.
template <class T>
void Forward<T>::walk_parts(Scratch* scratches) {
  const int64_t group = call_.heads / call_.kv_heads;
#pragma omp for schedule(dynamic, 1)
  for (int64_t job = 0; job < call_.batch * call_.kv_heads * parts_; ++job) {
    const int64_t head = job / parts_, part = job % parts_;
    const Tile tile{head / call_.kv_heads, head % call_.kv_heads, group, 0, 1};
    const Span seen = sight_.span(tile);
    const int64_t size = keys_per_part(seen), first = seen.first + part * size;
    walk(tile, {first, std::min(first + size, seen.stop)}, scratches[job]);
    int64_t done;
#pragma omp atomic capture seq_cst
    done = ++done_[static_cast<size_t>(head)];
    if (done == parts_) complete(tile, 0, scratches + head * parts_);
  }
}

template <class T>
void Forward<T>::prepare(int64_t head, int64_t first, T* rows) {
  if (packs()) keys_.pack(call_, call_.key, head, first, keys_.at(head, first), rows);
  if (call_.value.data != nullptr) values_.fill(call_, call_.value, head, first);
  if (kept_ == nullptr) return;
  T* marks = kept_.get() + head * slot_keys_ + first;
  const int64_t there = std::min(kPanel<T>, call_.num_keys - first);
  read(call_.kept, head * call_.num_keys + first, 1, there, marks);
  std::fill(marks + there, marks + kPanel<T>, T{0});
}

// What rows get of these keys.
template <class T>
void Forward<T>::walk(const Tile& tile, Span keys, Scratch& scratch) const {
  const T hidden = static_cast<T>(call_.hidden_score);
  const int64_t rows = tile.rows(), width = round_up(call_.value_channels, kLanes<T>);
  gather(call_.query, call_.query.stride[1], call_.query.stride[2], tile, call_.channels,
         static_cast<T>(call_.scaling), scratch.queries, depth_);
  std::fill_n(scratch.sums.begin(), rows, RowSums<T>{{}, {}, {}, {}, hidden, 0, 0, 0, 0});
  if (call_.value.data != nullptr) std::fill_n(scratch.output, rows * width, T{0});
  scratch.blocks.clear();
  for (int64_t first = keys.first; first < keys.stop; first += call_.block_keys) {
    const Span some{first, std::min(first + call_.block_keys, keys.stop)};
    if (!sight_.any_real(tile, some)) continue;
    const int64_t slot = keeps_blocks() ? static_cast<int64_t>(scratch.blocks.size()) : 0;
    block(tile, some, scratch.scores + slot * rows * call_.block_keys, scratch);
    for (int64_t row = 0; row < rows; ++row)
      scratch.maxima[slot * rows + row] = scratch.sums[static_cast<size_t>(row)].most;
    scratch.blocks.push_back(some);
  }
}

// All keys were met, in the parts of this tile.
template <class T>
void Forward<T>::complete(const Tile& tile, int64_t stripe, Scratch* parts) const {
  merge(tile.rows(), parts);
  finish(tile, parts[0]);
  for (Scratch* part = parts; part < parts + parts_; ++part) {
    if (part != parts) {
      std::copy_n(parts->sums.begin(), tile.rows(), part->sums.begin());
      std::copy_n(parts->factors, tile.rows(), part->factors);
    }
    if (received_ != nullptr || call_.distance_histogram.data != nullptr) receive(tile, stripe, *part);
    if (bins_weights()) bin_weights(tile, stripe, *part);
  }
  if (call_.received.data != nullptr && received_ == nullptr) write_received(tile, parts);
  if (call_.row_weights.data != nullptr) write_rows(tile, parts);
}

// The first of the parts becomes that of all their keys.
template <class T>
void Forward<T>::merge(int64_t rows, Scratch* parts) const {
  const int64_t width = round_up(call_.value_channels, kLanes<T>);
  for (Scratch* part = parts + 1; part < parts + parts_; ++part) {
    for (int64_t row = 0; row < rows; ++row) {
      RowSums<T>&all = parts->sums[static_cast<size_t>(row)], &more = part->sums[static_cast<size_t>(row)];
      const T most = std::max(all.most, more.most);
      const T factor = all.raise(most), other = more.raise(most);
      all.add(more);
      if (call_.value.data == nullptr) continue;
      T* output = parts->output + row * width;
      const T* added = part->output + row * width;
      for (int64_t channel = 0; channel < width; ++channel)
        output[channel] = output[channel] * factor + added[channel] * other;
    }
  }
}

// Makes what a row has got so far relative to a larger score, if it is one.
template <class T>
void Forward<T>::raise(int64_t row, T larger, Scratch& scratch) const {
  RowSums<T>& sums = scratch.sums[static_cast<size_t>(row)];
  if (!(larger > sums.most)) return;
  const int64_t width = round_up(call_.value_channels, kLanes<T>);
  const T factor = sums.raise(larger);
  T* output = scratch.output + row * width;
  for (int64_t channel = 0; channel < width; ++channel) output[channel] *= factor;
}

// The scores of one block, their exponentials, and what these add to every row.
template <class T>
void Forward<T>::block(const Tile& tile, Span keys, T* scores, Scratch& scratch) const {
  const int64_t rows = tile.rows(), stride = call_.block_keys, width = round_up(keys.stop - keys.first, kLanes<T>);
  const int64_t kv_head = tile.batch * call_.kv_heads + tile.kv_head;
  const int64_t value_width = round_up(call_.value_channels, kLanes<T>);
  if (packs())
    multiply_panels(keys_.at(kv_head, keys.first), call_.channels, width, rows, scratch.queries, depth_, scores, stride);
  else
    multiply_keys(call_, kv_head, keys.first, width, rows, scratch.queries, depth_, scores, stride, scratch.row);
  const Span sinks = sinks_in(keys, tile.batch);
  for (int64_t row = 0; row < rows; ++row) {
    T* mine = scores + row * stride;
    RowSums<T>& sums = scratch.sums[static_cast<size_t>(row)];
    if (call_.softcap != 0) cap(mine, width, static_cast<T>(call_.softcap));
    sight_.apply(tile, row, keys.first, width, mine, scratch.row);
    const T most = largest_of(mine, width);
    raise(row, most, scratch);
    const int64_t position = sight_.position(tile.query(row));
    exponentiate_(mine, width, static_cast<T>(position - keys.first), sums);
    if (sinks_ == nullptr) {
      if (sinks.first < sinks.stop) sums.sink += sum_of(mine, sinks.stop - sinks.first);
    } else {
      const T* marks = sinks_.get() + tile.batch * call_.num_keys;
      for (int64_t key = sinks.first; key < sinks.stop; ++key) sums.sink += mine[key - keys.first] * marks[key];
    }
    if (call_.local_mass != 0) {
      const int64_t first = std::max(keys.first, position - call_.window + 1);
      const int64_t stop = std::min(keys.stop, position + call_.window);
      if (first < stop) sums.local += sum_of(mine + first - keys.first, stop - first);
    }
    if (kept_ != nullptr) sums.kept += dot(mine, kept_.get() + kv_head * slot_keys_ + keys.first, width);
  }
  if (call_.value.data != nullptr)
    multiply<T>(rows, value_width, keys.stop - keys.first, {scores, stride, 1}, values_.at(kv_head, keys.first),
                values_.stride, scratch.output, value_width, true);
}

// Where the sinks of a block lie; empty if it has none, or nobody asks.
template <class T>
Span Forward<T>::sinks_in(Span keys, int64_t batch) const {
  if (call_.sink_mass == 0) return {0, 0};
  if (sinks_ == nullptr) return {keys.first, std::min(keys.stop, call_.sink_tokens)};
  const Span* panels = within_.data() + batch * (slot_keys_ / kPanel<T>);
  Span all{keys.stop, keys.first};
  for (int64_t panel = keys.first / kPanel<T>; panel * kPanel<T> < keys.stop; ++panel)
    all = {std::min(all.first, panels[panel].first), std::max(all.stop, panels[panel].stop)};
  return {all.first, std::min(all.stop, keys.stop)};
}

// One more outcome, which no key has: a row that is complete but for it learns its score.
template <class T>
void Forward<T>::add_learned_sink(const Tile& tile, int64_t row, Scratch& scratch) const {
  RowSums<T>& sums = scratch.sums[static_cast<size_t>(row)];
  const T score = data_of<T>(call_.sinks)[tile.head(row)];
  raise(row, score, scratch);
  const T centred = score - sums.most, weight = std::exp(centred);
  // Of a score of −∞, zero times it would be NaN.
  if (weight == 0) return;
  sums.total[0] += weight;
  sums.centred[0] += weight * centred;
  sums.squares[0] += weight * weight;
  sums.learned = weight;
}

// Rows are complete: the output and the statistics of each.
template <class T>
void Forward<T>::finish(const Tile& tile, Scratch& scratch) const {
  constexpr T kNone = std::numeric_limits<T>::quiet_NaN();
  const int64_t value_width = round_up(call_.value_channels, kLanes<T>);
  for (int64_t row = 0; row < tile.rows(); ++row) {
    const RowSums<T>& sums = scratch.sums[static_cast<size_t>(row)];
    const int64_t index = tile.index(call_, row);
    const T most = sums.most;
    if (call_.sinks.data != nullptr) add_learned_sink(tile, row, scratch);
    const bool sees = most > static_cast<T>(call_.hidden_score / 2);
    // Nothing was summed if the blocks of a row that sees nothing were passed over.
    const T total = sum<T>(sums.total), log_total = total == 0 ? T{0} : std::log(total);
    const T inverse = sees ? 1 / total : total != total ? total : T{0};
    if (call_.value.data != nullptr) {
      const Tensor& output = call_.output;
      const int64_t begin = tile.batch * output.stride[0] + tile.query(row) * output.stride[1] +
                            tile.head(row) * output.stride[2];
      write(output, begin, output.stride[3], call_.value_channels, scratch.output + row * value_width, inverse);
    }
    scratch.factors[row] = sight_.real_row(tile, row) ? inverse : T{0};
    if (call_.row_logsumexp.data != nullptr) data_of<T>(call_.row_logsumexp)[index] = sums.most + log_total;
    const T none = sees ? T{0} : kNone;
    put(call_, call_.logsumexp, index, sums.most + log_total + none);
    put(call_, call_.entropy, index, log_total - sum<T>(sums.centred) * inverse + none);
    // A score that is NaN is not the largest, but the row has none.
    put(call_, call_.max_logit, index, most + inverse * 0 + none);
    put(call_, call_.max_weight, index, (most == sums.most ? inverse : std::exp(most - sums.most) * inverse) + none);
    put(call_, call_.effective_keys, index, total * total / sum<T>(sums.squares) + none);
    put(call_, call_.sink_mass, index, sums.sink * inverse + none);
    put(call_, call_.local_mass, index, sums.local * inverse + none);
    put(call_, call_.mean_distance, index, sum<T>(sums.distance) * inverse + none);
    put(call_, call_.kept_mass, index, sums.kept * inverse + none);
    put(call_, call_.learned_sink_mass, index, sums.learned * inverse + none);
  }
}

// What makes final weights of the exponentials of a row in one block.
template <class T>
T Forward<T>::factor_of(int64_t row, size_t slot, int64_t rows, const Scratch& scratch) {
  const T then = scratch.maxima[static_cast<int64_t>(slot) * rows + row];
  const T most = scratch.sums[static_cast<size_t>(row)].most;
  return scratch.factors[row] * (then == most ? T{1} : std::exp(then - most));
}

// Final weights: the kept exponentials times what their block lacks.
template <class T>
void Forward<T>::receive(const Tile& tile, int64_t stripe, Scratch& scratch) const {
  const int64_t rows = tile.rows(), stride = call_.block_keys, bins_per_slot = call_.distance_histogram.size[2];
  T* factors = scratch.row;
  for (size_t slot = 0; slot < scratch.blocks.size(); ++slot) {
    const Span keys = scratch.blocks[slot];
    const int64_t width = round_up(keys.stop - keys.first, kLanes<T>);
    const T* exponentials = scratch.scores + static_cast<int64_t>(slot) * rows * stride;
    for (int64_t member = 0; member < tile.group; ++member) {
      const int64_t head = tile.batch * call_.heads + tile.kv_head * tile.group + member;
      const int64_t first_row = member * tile.queries, place = head * stripes_.count + stripe;
      for (int64_t i = 0; i < tile.queries; ++i) factors[i] = factor_of(first_row + i, slot, rows, scratch);
      const T* weights = exponentials + first_row * stride;
      if (received_ != nullptr) {
        T* to = received_.get() + place * slot_keys_ + keys.first;
        // One row of factors times the block.
        multiply<T>(1, width, tile.queries, {factors, 0, 1}, weights, stride, to, 0, true);
      }
      if (call_.distance_histogram.data == nullptr) continue;
      T* bins = histogram_.get() + place * bins_per_slot;
      for (int64_t i = 0; i < tile.queries; ++i)
        bin_distances(factors[i], weights + i * stride, keys, sight_.position(tile.first_row + i), bins);
    }
  }
}

// What the keys receive of a query that is alone: its weights.
template <class T>
void Forward<T>::write_received(const Tile& tile, const Scratch* parts) const {
  for (int64_t row = 0; row < tile.rows(); ++row)
    write_weights(tile, row, parts,
                  data_of<T>(call_.received) + (tile.batch * call_.heads + tile.head(row)) * call_.num_keys);
}

// The final weights of the chosen rows; NaN for a row that is padding or sees nothing.
template <class T>
void Forward<T>::write_rows(const Tile& tile, const Scratch* parts) const {
  const int64_t chosen = call_.row_weights.size[2];
  for (int64_t row = 0; row < tile.rows(); ++row) {
    const int64_t place = data_of<int64_t>(call_.row_places)[tile.query(row)];
    if (place < 0) continue;
    const int64_t head = tile.batch * call_.heads + tile.head(row);
    T* to = data_of<T>(call_.row_weights) + (head * chosen + place) * call_.num_keys;
    if (parts->factors[row] > 0)
      write_weights(tile, row, parts, to);
    else
      std::fill_n(to, call_.num_keys, std::numeric_limits<T>::quiet_NaN());
  }
}

// The final weights of a row, of all keys; zero where blocks were passed over.
template <class T>
void Forward<T>::write_weights(const Tile& tile, int64_t row, const Scratch* parts, T* to) const {
  const int64_t rows = tile.rows(), stride = call_.block_keys;
  int64_t done = 0;
  for (const Scratch* part = parts; part < parts + parts_; ++part) {
    for (size_t slot = 0; slot < part->blocks.size(); ++slot) {
      const auto [first, stop] = part->blocks[slot];
      const T* exponentials = part->scores + (static_cast<int64_t>(slot) * rows + row) * stride;
      const T factor = factor_of(row, slot, rows, *part);
      std::fill(to + done, to + first, T{0});
      for (int64_t key = first; key < stop; ++key) to[key] = factor * exponentials[key - first];
      done = stop;
    }
  }
  std::fill(to + done, to + call_.num_keys, T{0});
}

// The final weights of one head after the other, so that sums over all its blocks are made once.
template <class T>
void Forward<T>::bin_weights(const Tile& tile, int64_t stripe, Scratch& scratch) const {
  const int64_t rows = tile.rows(), stride = call_.block_keys;
  for (int64_t member = 0; member < tile.group; ++member) {
    for (size_t slot = 0; slot < scratch.blocks.size(); ++slot) {
      const int64_t at = static_cast<int64_t>(slot) * rows;
      const int64_t width = round_up(scratch.blocks[slot].stop - scratch.blocks[slot].first, kLanes<T>);
      for (int64_t row = member * tile.queries; row < (member + 1) * tile.queries; ++row)
        scratch.bins.add(scratch.scores + (at + row) * stride, width, factor_of(row, slot, rows, scratch));
    }
    const int64_t head = tile.batch * call_.heads + tile.kv_head * tile.group + member;
    const int64_t place = (head * stripes_.count + stripe) * kWeightBins;
    scratch.bins.flush(numbers_.get() + place, masses_.get() + place);
  }
}

// Bin b holds the distances [2^b − 1, 2^(b+1) − 1): a run of keys on each side of the query. The last holds all beyond.
template <class T>
void Forward<T>::bin_distances(T factor, const T* weights, Span keys, int64_t position, T* bins) const {
  const auto add = [&](int64_t bin, int64_t first, int64_t stop) {
    first = std::max(first, keys.first), stop = std::min(stop, keys.stop);
    if (first < stop) bins[bin] += factor * sum_of(weights + first - keys.first, stop - first);
  };
  const int64_t last = call_.distance_histogram.size[2] - 1;
  for (int64_t bin = 0; bin <= last; ++bin) {
    const int64_t nearest = (int64_t{1} << bin) - 1, beyond = 2 * nearest + 1;
    add(bin, bin == last ? 0 : position - beyond + 1, position - nearest + 1);
    if (!call_.causal && (bin > 0 || last == 0))
      add(bin, position + std::max<int64_t>(nearest, 1), bin == last ? keys.stop : position + beyond);
  }
}

// Adds the slots of one head in their order.
template <class T>
template <class From>
void Forward<T>::reduce(const Tensor& to, const Buffer<From>& slots, int64_t slot_size, int64_t size,
                        int64_t head) const {
  if (to.data == nullptr || slots == nullptr) return;
  T* totals = data_of<T>(to) + head * size;
  std::fill_n(totals, size, T{0});
  for (int64_t stripe = 0; stripe < stripes_.count; ++stripe) {
    const From* slot = slots.get() + (head * stripes_.count + stripe) * slot_size;
    for (int64_t i = 0; i < size; ++i) totals[i] += static_cast<T>(slot[i]);
  }
}

template class Forward<float>;
template class Forward<double>;

}  // namespace llama_attn
