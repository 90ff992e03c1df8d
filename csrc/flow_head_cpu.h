// The flow head on the CPU: couplings, log-determinant and mixture in one pass over tiles of rows whose state stays in
// the L1 cache. Features are in the vector's lanes, so every product, gradients included, is broadcast x vector.
//
// Backward rebuilds each coupling's input from its output, so memory does not grow with their number. In float32 that
// loses digits at every coupling; twenty can lose all. The state is therefore carried and saved in double, and the
// networks see it rounded to float: the rebuilt state rounds to the same floats, so the networks return the same bits.
//
// FLOP per row: 2 W + 3 K D forward and 8 W + 6 K D backward, with W weights.
#pragma once

#include <limits>
#include <memory>

#include "flow_head.h"
#include "gmm_log_prob_cpu.h"

namespace normatch {

constexpr int64_t kTileRows = 32;

// Uninitialized memory, aligned for vectors.
template <typename Acc>
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(new Acc[size + kPad]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<Acc*>((address + 63) / 64 * 64);
  }
  Acc* data() const { return data_; }
  Acc& operator[](int64_t i) const { return data_[i]; }

 private:
  std::unique_ptr<Acc[]> memory_;
  Acc* data_;
};

struct Shape {
  int64_t features, hidden, classes, couplings;
  int64_t hidden_pad, classes_pad, half_pad[2], row;  // row: both halves of the state, filled up
  int64_t stretch;  // squares added up in one go in a distance: D^(2/3) rounds as much within as between stretches

  Shape(int64_t features, int64_t hidden, int64_t classes, int64_t couplings)
      : features(features),
        hidden(hidden),
        classes(classes),
        couplings(couplings),
        hidden_pad(padded(hidden)),
        classes_pad(padded(classes)),
        half_pad{padded(half_width(0, features)), padded(half_width(1, features))},
        row(half_pad[0] + half_pad[1]),
        stretch(std::max<int64_t>(32, std::cbrt(double(features) * double(features)))) {}
  int64_t half(int which) const { return half_width(which, features); }
  int64_t offset(int which) const { return which ? half_pad[0] : 0; }  // of a half in the state's row
};

// The offsets of a coupling's padded parameters, in the layout of their gradients, then of the transposed matrices.
struct CouplingLayout {
  int64_t weight[3], bias[3], gain, gradients, transposed[3], size;

  CouplingLayout(const Shape& shape, int kept) {
    const int64_t h = shape.hidden_pad, in = shape.half_pad[kept], out = 2 * shape.half_pad[1 - kept];
    const int64_t weights[] = {shape.hidden * in, shape.hidden * h, out * h}, biases[] = {h, h, out};
    int64_t at = 0;
    for (int i = 0; i < 3; ++i) {
      weight[i] = at;
      bias[i] = at + weights[i];
      at = bias[i] + biases[i];
    }
    gain = at;
    gradients = at += out / 2;
    const int64_t across[] = {shape.half(kept) * h, shape.hidden * h, shape.hidden * out};
    for (int i = 0; i < 3; ++i) {
      transposed[i] = at;
      at += across[i];
    }
    size = at;
  }
};

// All parameters, padded with zeros; `both`: also the untransposed matrices, which only backward needs.
template <typename Acc>
class Network {
 public:
  Network(const Shape& shape, const std::vector<Tensor>& tensors, bool both)
      : shape_(shape),
        both_(both),
        layouts_{CouplingLayout(shape, 0), CouplingLayout(shape, 1)},
        memory_(start(shape.couplings)) {
    std::vector<const Acc*> sources;
    std::vector<Tensor> dense;
    for (const Tensor& tensor : tensors) {
      dense.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
      sources.push_back(dense.back().template const_data_ptr<Acc>());
    }
    parallel_rows(shape.couplings, layouts_[0].size, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        pack(&sources[j * kCouplingTensors], layouts_[j % 2], memory_.data() + start(j), j % 2);
    });
  }

  const CouplingLayout& layout(int64_t j) const { return layouts_[j % 2]; }
  const Acc* operator[](int64_t j) const { return memory_.data() + start(j); }

 private:
  int64_t start(int64_t j) const { return j / 2 * (layouts_[0].size + layouts_[1].size) + j % 2 * layouts_[0].size; }

  void pack(const Acc* const* from, const CouplingLayout& at, Acc* to, int kept) {
    const int64_t h = shape_.hidden, hp = shape_.hidden_pad, in = shape_.half(kept), in_pad = shape_.half_pad[kept];
    const int64_t out = shape_.half(1 - kept), out_pad = shape_.half_pad[1 - kept];
    if (hp > h || in_pad > in || out_pad > out) std::fill_n(to, at.size, Acc(0));
    copy_matrix(from[kWeight0], h, in, to + at.weight[0], in_pad, to + at.transposed[0], hp);
    copy_matrix(from[kWeight1], h, h, to + at.weight[1], hp, to + at.transposed[1], hp);
    for (int part = 0; part < 2; ++part) {  // s, then t
      copy_matrix(from[kWeight2] + part * out * h, out, h, to + at.weight[2] + part * out_pad * hp, hp,
                  to + at.transposed[2] + part * out_pad, 2 * out_pad);
      std::copy_n(from[kBias2] + part * out, out, to + at.bias[2] + part * out_pad);
    }
    std::copy_n(from[kBias0], h, to + at.bias[0]);
    std::copy_n(from[kBias1], h, to + at.bias[1]);
    std::copy_n(from[kGain], out, to + at.gain);
  }

  // A dense matrix into one whose rows are `row` apart, where backward needs it, and its transpose into `across`.
  void copy_matrix(const Acc* from, int64_t rows, int64_t columns, Acc* to, int64_t row, Acc* across,
                   int64_t across_row) const {
    constexpr int64_t kBlock = 16;  // a cache line of floats: no line of either side is touched twice
    for (int64_t first = 0; first < rows; first += kBlock)
      for (int64_t i = 0; i < columns; ++i)
        for (int64_t o = first; o < std::min(first + kBlock, rows); ++o)
          across[i * across_row + o] = from[o * columns + i];
    if (!both_) return;
    for (int64_t o = 0; o < rows; ++o) std::copy_n(from + o * columns, columns, to + o * row);
  }

  Shape shape_;
  bool both_;
  CouplingLayout layouts_[2];
  Scratch<Acc> memory_;
};

// ---- products -----------------------------------------------------------------------------------------------------

template <typename V, int R, int C, typename Acc, typename F>
NM_HD void multiply_block(int64_t first, int64_t column, int64_t depth, const Acc* a, int64_t a_row, int64_t a_depth,
                          const Acc* b, int64_t b_row, const F& done) {
  V sums[R][C] = {};
  for (int64_t i = 0; i < depth; ++i) {
    V row[C];
    for (int c = 0; c < C; ++c) row[c] = load<V>(b + i * b_row + column + c * kLanes<V>);
    for (int r = 0; r < R; ++r) {
      const Acc value = a[(first + r) * a_row + i * a_depth];
      for (int c = 0; c < C; ++c) sums[r][c] += value * row[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) done(first + r, column + c * kLanes<V>, sums[r][c]);
}

// done(i, j, sum of a(i, k) b(k, j) over k < depth), j in vectors; a(i, k) lies at i * a_row + k * a_depth, and
// columns are a whole number of vectors.
template <typename V, typename Acc, typename F>
NM_HD void multiply(int64_t rows, int64_t columns, int64_t depth, const Acc* a, int64_t a_row, int64_t a_depth,
                    const Acc* b, int64_t b_row, const F& done) {
  constexpr int R = kLanes<V> == 16 ? 8 : 4;
  constexpr int64_t L = kLanes<V>;
  int64_t j = 0;
  for (; j + 2 * L <= columns; j += 2 * L) {
    int64_t i = 0;
    for (; i + R <= rows; i += R) multiply_block<V, R, 2>(i, j, depth, a, a_row, a_depth, b, b_row, done);
    for (; i < rows; ++i) multiply_block<V, 1, 2>(i, j, depth, a, a_row, a_depth, b, b_row, done);
  }
  for (; j < columns; j += L) {
    int64_t i = 0;
    for (; i + R <= rows; i += R) multiply_block<V, R, 1>(i, j, depth, a, a_row, a_depth, b, b_row, done);
    for (; i < rows; ++i) multiply_block<V, 1, 1>(i, j, depth, a, a_row, a_depth, b, b_row, done);
  }
}

// ---- one tile of rows ---------------------------------------------------------------------------------------------

// Activations of a coupling for one tile.
template <typename Acc>
struct Activations {
  Scratch<Acc> hidden0, hidden1, affine, keep;

  explicit Activations(const Shape& shape)
      : hidden0(kTileRows * shape.hidden_pad),
        hidden1(kTileRows * shape.hidden_pad),
        affine(kTileRows * 3 * std::max(shape.half_pad[0], shape.half_pad[1])),
        keep(kTileRows * shape.hidden_pad) {}
};

// The network of coupling j, from the half that is kept: tile.affine = [rows][tanh s_raw | t | exp(s)][half]. Compiled
// once, in flow_head.cpp, so that forward and backward run the same instructions and get the same bits.
template <typename Acc>
void run_network(const Shape& shape, const CouplingLayout& at, const Acc* p, const Dropout& dropout, int64_t row,
                 int64_t j, const Acc* kept, Activations<Acc>& tile);

// Calls f(Type<T>{}) with the type of a tensor that is summed in Acc.
template <typename Acc, typename F>
NM_HD void dispatch_tile(ScalarType type, const F& f) {
  if constexpr (std::is_same_v<Acc, double>) {
    f(Type<double>{});
  } else {
    if (type == ScalarType::Float) f(Type<float>{});
    if (type == ScalarType::BFloat16) f(Type<BFloat16>{});
    if (type == ScalarType::Half) f(Type<Half>{});
  }
}

// Reads rows of an (N, D) tensor into the tile's halves. Rows past the end repeat the last one, which keeps them
// finite; their gradients are zero.
template <typename V, typename Acc>
NM_HD void read_tile(const Shape& shape, const Tensor& tensor, int64_t first, int64_t rows, Acc* tile) {
  std::fill_n(tile, kTileRows * shape.row, Acc(0));
  dispatch_tile<Acc>(tensor.scalar_type(), [&](auto type) NM_INLINE {
    const auto from = read_rows<typename decltype(type)::type>(tensor);
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int half = 0; half < 2; ++half)
        for_columns<V>(0, shape.half(half), [&](int64_t d, const auto& load, const auto&) NM_INLINE {
          store<V>(tile + r * shape.row + shape.offset(half) + d,
                   load(from[first + std::min(r, rows - 1)] + half_begin(half, shape.features) + d));
        });
  });
}

template <typename V, typename Acc>
NM_HD void write_tile(const Shape& shape, const Acc* tile, const Tensor& tensor, int64_t first, int64_t rows) {
  dispatch_tile<Acc>(tensor.scalar_type(), [&](auto type) NM_INLINE {
    const auto to = write_rows<typename decltype(type)::type>(tensor);
    for (int64_t r = 0; r < rows; ++r)
      for (int half = 0; half < 2; ++half)
        for_columns<V>(0, shape.half(half), [&](int64_t d, const auto& load, const auto& store) NM_INLINE {
          store(to[first + r] + half_begin(half, shape.features) + d,
                load(tile + r * shape.row + shape.offset(half) + d));
        });
  });
}

// The state, exact and rounded: both [kTileRows][row].
template <typename Acc>
struct State {
  Scratch<double> exact;
  Scratch<Acc> rounded;
  explicit State(const Shape& shape) : exact(kTileRows * shape.row), rounded(kTileRows * shape.row) {}
};

// log sum exp of `width` values, a whole number of vectors
template <typename V, typename Acc>
NM_HD double logsumexp(const Acc* values, int64_t width, Acc* top) {
  Acc largest = -std::numeric_limits<Acc>::infinity();
  for (int64_t k = 0; k < width; ++k) largest = values[k] > largest ? values[k] : largest;
  *top = largest - largest == 0 ? largest : Acc(0);
  V sum{};
  for (int64_t k = 0; k < width; k += kLanes<V>) sum += Math<V>::exp(load<V>(values + k) - *top);
  return double(*top) + std::log(exact_sum(sum));
}

inline Shape shape_of(const Tensor& x, const std::vector<Tensor>& couplings, const Tensor& means) {
  return Shape(x.size(1), couplings[kBias0].size(0), means.size(0), int64_t(couplings.size()) / kCouplingTensors);
}

inline Dropout dropout_of(const std::optional<Tensor>& seed, double dropout) {
  return Dropout::of(seed ? dropout : 0, seed ? uint64_t(*seed->const_data_ptr<int64_t>()) : 0);
}

}  // namespace normatch
