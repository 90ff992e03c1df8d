// The whole flow head on the CPU: couplings with their networks, log-determinant and mixture in one pass over tiles of
// rows whose state stays in the first-level cache. Matrices are read row by row with features in the vector's lanes,
// so that every product is broadcast x vector, forward, backward and for the weights' gradients alike.
//
// Backward rebuilds each coupling's input from its output, so that nothing is kept of the couplings, whatever their
// number. In float32 alone that would lose digits at every coupling, and twenty of them can lose all. So the state is
// carried in double and saved so, while the networks see it rounded to float: the rebuilt state rounds to the same
// floats, hence to the same networks' results, and the error stays at the rounding of the doubles.
//
// FLOP for a row: 2 W + 3 K D forward and 8 W + 6 K D backward, W being the number of weights.
#include "flow_head.h"

#include <cmath>
#include <limits>
#include <memory>
#include <tuple>

#include "affine_coupling.h"
#include "cpu.h"
#include "gmm_log_prob.h"

namespace normatch {
namespace {

constexpr int64_t kTileRows = 32;
constexpr int64_t kPad = 16;  // widths are filled up with zeros to whole vectors of any instruction set

int64_t padded(int64_t width) {
  return (width + kPad - 1) / kPad * kPad;
}

// Uninitialised memory, aligned for vectors.
template <typename Acc>
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(new Acc[size + kPad]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<Acc*>((address + 63) / 64 * 64);
  }
  Acc* data() { return data_; }
  Acc& operator[](int64_t i) { return data_[i]; }

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

// Where the parts of a coupling stand in memory, filled up: the parameters in the layout of their gradients, and the
// matrices' transposes behind them.
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

// All parameters, filled up with zeros; `both`: the matrices as they are, too, which forward has no use for.
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
  const Acc* operator[](int64_t j) { return memory_.data() + start(j); }

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

// What the mixture's parameters come to, per class.
template <typename Acc>
struct Mixture {
  std::vector<double> log_pi, slope;  // slope: of log sigma in rho
  std::vector<Acc> offset, precision;

  Mixture(const Shape& shape, const Tensor& rho, const Tensor& logits, double eps) {
    const Tensor dense_rho = torch::stable::contiguous(rho), dense_logits = torch::stable::contiguous(logits);
    const Acc* r = dense_rho.template const_data_ptr<Acc>();
    const Acc* a = dense_logits.template const_data_ptr<Acc>();
    const double top = *std::max_element(a, a + shape.classes);
    double sum = 0;
    for (int64_t k = 0; k < shape.classes; ++k) sum += std::exp(double(a[k]) - top);
    for (int64_t k = 0; k < shape.classes; ++k) {
      const double log_sigma = log_softplus(double(r[k]));
      log_pi.push_back(double(a[k]) - top - std::log(sum));
      slope.push_back(log_softplus_slope(double(r[k])));
      offset.push_back(Acc(gmm_offset(log_pi[k], log_sigma, eps, double(shape.features))));
      precision.push_back(gmm_precision<Acc>(log_sigma));
    }
  }
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

template <typename V, typename Acc>
NM_HD void accumulate(Acc* to, V v) {
  store<V>(to, load<V>(to) + v);
}

// sums[column] += the sum over the tile's rows of f(row, column)
template <typename V, typename Acc, typename F>
NM_HD void sum_rows(int64_t columns, Acc* sums, const F& f) {
  for (int64_t j = 0; j < columns; j += kLanes<V>) {
    V sum{};
    for (int64_t r = 0; r < kTileRows; ++r) sum += f(r, j);
    accumulate<V>(sums + j, sum);
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

// keep[r][u]: 1 / (1 - dropout) where unit u of row r is kept, else 0
template <typename Acc>
NM_HD void draw_dropout(const Dropout& dropout, int64_t first_row, int64_t rows, int coupling, int64_t hidden_pad,
                        Acc* keep) {
  const Acc scale = Acc(dropout.scale);
  for (int64_t r = 0; r < rows; ++r) {
    Acc* const out = keep + r * hidden_pad;
    for (int64_t u = 0; u < hidden_pad; u += 4) {
      const Words words = dropout_words(dropout.seed, first_row + r, u, coupling);
      for (int w = 0; w < 4; ++w) out[u + w] = words.w[w] >= dropout.threshold ? scale : Acc(0);
    }
  }
}

// The network of coupling j, from the half that is kept: tile.affine = [rows][tanh s_raw | t | exp(s)][half]. A
// function of its own, so that forward and backward run the same instructions and get the same bits.
template <typename Acc>
__attribute__((noinline)) void run_network(const Shape& shape, const CouplingLayout& at, const Acc* p,
                                           const Dropout& dropout, int64_t row, int64_t j, const Acc* kept,
                                           Activations<Acc>& tile) {
  vectorised<Acc>([&](auto lanes) NM_INLINE {
    using V = typename decltype(lanes)::type;
    const int64_t hp = shape.hidden_pad, width = shape.half_pad[1 - j % 2];
    Acc *const hidden0 = tile.hidden0.data(), *const hidden1 = tile.hidden1.data(), *const affine = tile.affine.data();
    const Acc* const keep = tile.keep.data();
    if (dropout.active) draw_dropout(dropout, row, kTileRows, int(j), hp, tile.keep.data());
    multiply<V>(kTileRows, hp, shape.half(j % 2), kept, shape.row, 1, p + at.transposed[0], hp,
                [&](int64_t r, int64_t u, V sum) NM_INLINE {
                  const V value = sum + load<V>(p + at.bias[0] + u);
                  V live = value < 0 ? V{} : value;  // so that NaN passes
                  if (dropout.active) live *= load<V>(keep + r * hp + u);
                  store<V>(hidden0 + r * hp + u, live);
                });
    multiply<V>(kTileRows, hp, shape.hidden, hidden0, hp, 1, p + at.transposed[1], hp,
                [&](int64_t r, int64_t u, V sum) NM_INLINE {
                  const V value = sum + load<V>(p + at.bias[1] + u);
                  store<V>(hidden1 + r * hp + u, value < 0 ? V{} : value);
                });
    multiply<V>(kTileRows, 2 * width, shape.hidden, hidden1, hp, 1, p + at.transposed[2], 2 * width,
                [&](int64_t r, int64_t d, V sum)
                    NM_INLINE { store<V>(affine + r * 3 * width + d, sum + load<V>(p + at.bias[2] + d)); });
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int64_t d = 0; d < width; d += kLanes<V>) {
        Acc* const here = affine + r * 3 * width + d;
        const AffineScale<V> scale = affine_scale(load<V>(here), load<V>(p + at.gain + d));
        store<V>(here, scale.tanh_s);
        store<V>(here + 2 * width, Math<V>::exp(scale.s));
      }
  });
}

// A vector's lanes as doubles.
template <typename V>
struct Doubles {
  typedef double type __attribute__((vector_size(2 * sizeof(V))));
  static NM_HD type of(V v) { return __builtin_convertvector(v, type); }
  static NM_HD V rounded(type v) { return __builtin_convertvector(v, V); }
};
template <>
struct Doubles<double> {
  using type = double;
  static NM_HD double of(double v) { return v; }
  static NM_HD double rounded(double v) { return v; }
};

template <typename D>
NM_HD D load_doubles(const double* p) {
  D v;
  memcpy(&v, p, sizeof(v));
  return v;
}

// Rows of a (N, D) tensor to and from the tile's halves. The rows past the end repeat the last one: their values
// stay as tame as its own, and their gradients are zero.
template <typename V, typename Acc>
NM_HD void read_tile(const Shape& shape, const Tensor& tensor, ScalarType type, int64_t first, int64_t rows,
                     Acc* tile) {
  std::fill_n(tile, kTileRows * shape.row, Acc(0));
  const auto read = [&](const auto& from) NM_INLINE {
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int half = 0; half < 2; ++half)
        for_columns<V>(0, shape.half(half), [&](int64_t d, const auto& load, const auto&) NM_INLINE {
          store<V>(tile + r * shape.row + shape.offset(half) + d,
                   load(from[first + std::min(r, rows - 1)] + half_begin(half, shape.features) + d));
        });
  };
  if constexpr (std::is_same_v<Acc, double>) {
    read(read_rows<double>(tensor));
  } else {
    if (type == ScalarType::Float) read(read_rows<float>(tensor));
    if (type == ScalarType::BFloat16) read(read_rows<BFloat16>(tensor));
    if (type == ScalarType::Half) read(read_rows<Half>(tensor));
  }
}

// The state, exact and rounded: both [kTileRows][row].
template <typename Acc>
struct State {
  Scratch<double> exact_memory;
  Scratch<Acc> rounded_memory;
  double* exact;
  Acc* rounded;

  explicit State(const Shape& shape)
      : exact_memory(kTileRows * shape.row),
        rounded_memory(kTileRows * shape.row),
        exact(exact_memory.data()),
        rounded(rounded_memory.data()) {}
};

template <typename V, typename Acc>
NM_HD void write_tile(const Shape& shape, const Acc* tile, const Tensor& tensor, ScalarType type, int64_t first,
                      int64_t rows) {
  const auto write = [&](const auto& to) NM_INLINE {
    for (int64_t r = 0; r < rows; ++r)
      for (int half = 0; half < 2; ++half)
        for_columns<V>(0, shape.half(half), [&](int64_t d, const auto& load, const auto& store) NM_INLINE {
          store(to[first + r] + half_begin(half, shape.features) + d,
                load(tile + r * shape.row + shape.offset(half) + d));
        });
  };
  if constexpr (std::is_same_v<Acc, double>) {
    write(write_rows<double>(tensor));
  } else {
    if (type == ScalarType::Float) write(write_rows<float>(tensor));
    if (type == ScalarType::BFloat16) write(write_rows<BFloat16>(tensor));
    if (type == ScalarType::Half) write(write_rows<Half>(tensor));
  }
}

inline void write_state(const Shape& shape, const double* tile, const Tensor& tensor, int64_t first, int64_t rows) {
  const auto to = write_rows<double>(tensor);
  for (int64_t r = 0; r < rows; ++r)
    for (int half = 0; half < 2; ++half)
      std::copy_n(tile + r * shape.row + shape.offset(half), shape.half(half),
                  to[first + r] + half_begin(half, shape.features));
}

template <typename Acc>
void read_state(const Shape& shape, const Tensor& tensor, int64_t first, int64_t rows, const State<Acc>& state) {
  const auto from = read_rows<double>(tensor);
  std::fill_n(state.exact, kTileRows * shape.row, 0.0);
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int half = 0; half < 2; ++half)
      std::copy_n(from[first + std::min(r, rows - 1)] + half_begin(half, shape.features), shape.half(half),
                  state.exact + r * shape.row + shape.offset(half));
  std::copy_n(state.exact, kTileRows * shape.row, state.rounded);
}

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

// ---- forward ------------------------------------------------------------------------------------------------------

// |z_r - mu_k|^2 for R rows and C vectors of classes. means: [D, in the state's order without its gaps][classes]
template <typename V, int R, int C, typename Acc>
NM_HD void distances(const Shape& shape, const Acc* z, const Acc* means, Acc* out) {
  V totals[R][C] = {};
  for (int half = 0; half < 2; ++half) {
    const Acc* const points = z + shape.offset(half);
    const Acc* const mu = means + half_begin(half, shape.features) * shape.classes_pad;
    const int64_t width = shape.half(half);
    for (int64_t begin = 0; begin < width; begin += shape.stretch) {
      V sums[R][C] = {};
      for (int64_t d = begin; d < std::min(begin + shape.stretch, width); ++d) {
        V row[C];
        for (int c = 0; c < C; ++c) row[c] = load<V>(mu + d * shape.classes_pad + c * kLanes<V>);
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < C; ++c) {
            const V difference = points[r * shape.row + d] - row[c];
            sums[r][c] += difference * difference;
          }
      }
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) totals[r][c] += sums[r][c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store<V>(out + r * shape.classes_pad + c * kLanes<V>, totals[r][c]);
}

template <typename Acc>
void forward(const Shape& shape, const Tensor& x, const std::vector<Tensor>& parameters, const Tensor& means,
             const Tensor& rho, const Tensor& logits, const Dropout& dropout, double eps, const Tensor& z,
             const Tensor& logdet, const Tensor& class_log_prob, const Tensor& log_prob, const Tensor& saved) {
  Network<Acc> network(shape, parameters, false);
  const Mixture<Acc> mixture(shape, rho, logits, eps);
  const Tensor dense_means = dense_rows(means);
  const auto mu = read_rows<Acc>(dense_means);
  const int64_t kp = shape.classes_pad, rows = x.size(0);
  Scratch<Acc> centres(shape.features * kp);
  std::fill_n(centres.data(), shape.features * kp, Acc(0));
  for (int64_t k = 0; k < shape.classes; ++k)
    for (int64_t d = 0; d < shape.features; ++d) centres[d * kp + k] = mu[k][d];
  const ScalarType type = x.scalar_type();
  Acc* const out_logdet = logdet.mutable_data_ptr<Acc>();
  Acc* const out_classes = class_log_prob.mutable_data_ptr<Acc>();
  Acc* const out_log_prob = log_prob.mutable_data_ptr<Acc>();

  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    Activations<Acc> tile(shape);
    State<Acc> state(shape);
    Scratch<Acc> scores_memory(kTileRows * kp);
    Acc* const scores = scores_memory.data();
    double sums[kTileRows];
    vectorised<Acc>([&](auto lanes) NM_INLINE {
      using V = typename decltype(lanes)::type;
      for (int64_t first = begin * kTileRows; first < std::min(end * kTileRows, rows); first += kTileRows) {
        const int64_t here = std::min(kTileRows, rows - first);
        read_tile<V>(shape, x, type, first, here, state.rounded);
        std::copy_n(state.rounded, kTileRows * shape.row, state.exact);
        std::fill_n(sums, kTileRows, 0.0);
        for (int64_t j = 0; j < shape.couplings; ++j) {
          const CouplingLayout& at = network.layout(j);
          const Acc* const p = network[j];
          const int kept = j % 2, changed = 1 - kept;
          const int64_t width = shape.half_pad[changed];
          run_network(shape, at, p, dropout, first, j, state.rounded + shape.offset(kept), tile);
          for (int64_t r = 0; r < kTileRows; ++r) {
            const Acc* const affine = &tile.affine[r * 3 * width];
            const int64_t begin_changed = r * shape.row + shape.offset(changed);
            sums[r] += blocked_sum<V>(width, [&](int64_t d, const auto&, const auto&) NM_INLINE {
              using D = Doubles<V>;
              double* const exact = state.exact + begin_changed + d;
              const auto y = (load_doubles<typename D::type>(exact) + D::of(load<V>(affine + width + d))) *
                             D::of(load<V>(affine + 2 * width + d));
              memcpy(exact, &y, sizeof(y));
              store<V>(state.rounded + begin_changed + d, D::rounded(y));
              return load<V>(p + at.gain + d) * load<V>(affine + d);
            });
          }
        }
        write_tile<V>(shape, state.rounded, z, z.scalar_type(), first, here);
        write_state(shape, state.exact, saved, first, here);

        constexpr int R = kLanes<V> == 16 ? 8 : 4;
        for (int64_t r = 0; r < kTileRows; r += R) {
          int64_t k = 0;
          for (; k + 2 * kLanes<V> <= kp; k += 2 * kLanes<V>)
            distances<V, R, 2>(shape, state.rounded + r * shape.row, centres.data() + k, scores + r * kp + k);
          for (; k < kp; k += kLanes<V>)
            distances<V, R, 1>(shape, state.rounded + r * shape.row, centres.data() + k, scores + r * kp + k);
        }
        for (int64_t r = 0; r < here; ++r) {
          Acc* const row = scores + r * kp;
          for (int64_t k = 0; k < shape.classes; ++k)
            row[k] = mixture.offset[k] - Acc(0.5) * mixture.precision[k] * row[k];
          std::fill(row + shape.classes, row + kp, -std::numeric_limits<Acc>::infinity());
          std::copy_n(row, shape.classes, out_classes + (first + r) * shape.classes);
          Acc top;
          out_logdet[first + r] = Acc(sums[r]);
          out_log_prob[first + r] = Acc(logsumexp<V>(row, kp, &top) + sums[r]);
        }
      }
    });
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------

// With w = dlog_prob_k / sigma_k^2 (weights, [classes][rows]):  dz_r -= sum_k w (z - mu_k),  dmu_k += sum_r w (z -
// mu_k). means, grad_means: [row / kPad][classes][kPad]
template <typename V, typename Acc>
NM_HD void mixture_backward(const Shape& shape, const Acc* weights, const Acc* z, const Acc* means, Acc* grad_z,
                            Acc* grad_means) {
  constexpr int R = kLanes<V> == 16 ? 8 : 4;
  for (int64_t d = 0; d < shape.row; d += kLanes<V>) {
    const int64_t at = d / kPad * shape.classes * kPad + d % kPad;
    for (int64_t first = 0; first < kTileRows; first += R) {
      V point[R], grad[R];
      for (int r = 0; r < R; ++r) {
        point[r] = load<V>(z + (first + r) * shape.row + d);
        grad[r] = load<V>(grad_z + (first + r) * shape.row + d);
      }
      for (int64_t begin = 0; begin < shape.classes; begin += kClassStretch) {
        V part[R] = {};
        for (int64_t k = begin; k < std::min(begin + kClassStretch, shape.classes); ++k) {
          const V mu = load<V>(means + at + k * kPad);
          V grad_mu{};
          for (int r = 0; r < R; ++r) {
            const V pull = weights[k * kTileRows + first + r] * (point[r] - mu);
            part[r] += pull;
            grad_mu += pull;
          }
          accumulate<V>(grad_means + at + k * kPad, grad_mu);
        }
        for (int r = 0; r < R; ++r) grad[r] -= part[r];
      }
      for (int r = 0; r < R; ++r) store<V>(grad_z + (first + r) * shape.row + d, grad[r]);
    }
  }
}

// One coupling, from its output and the gradient of it to its input and the gradient of that, in place; adds the
// parameters' gradients to `grads`.
template <typename V, typename Acc>
NM_HD void coupling_backward(const Shape& shape, const CouplingLayout& at, const Acc* p, const Dropout& dropout,
                             int64_t row, int64_t j, const Acc* grad_logdet, const State<Acc>& state, Acc* grad,
                             Acc* grads, Activations<Acc>& tile, Acc* grad_affine, Acc* grad_hidden) {
  const int kept = j % 2, changed = 1 - kept;
  const int64_t hp = shape.hidden_pad, width = shape.half_pad[changed];
  Acc *const hidden0 = tile.hidden0.data(), *const hidden1 = tile.hidden1.data();
  const Acc* const in = state.rounded + shape.offset(kept);
  Acc *const grad_in = grad + shape.offset(kept), *const grad_out = grad + shape.offset(changed);
  run_network(shape, at, p, dropout, row, j, in, tile);

  const Acc* const affine = tile.affine.data();
  for (int64_t d = 0; d < width; d += kLanes<V>) {
    using D = Doubles<V>;
    const V gain = load<V>(p + at.gain + d);
    V gain_sum{}, s_sum{}, t_sum{};
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t here = r * shape.row + shape.offset(changed) + d;
      const V tanh_s = load<V>(affine + r * 3 * width + d), t = load<V>(affine + r * 3 * width + width + d);
      const V factor = load<V>(affine + r * 3 * width + 2 * width + d);
      const V y = load<V>(state.rounded + here), grad_y = load<V>(grad_out + r * shape.row + d);
      const auto found = affine_gradients(V(grad_y * factor), V(grad_y * y + grad_logdet[r]), tanh_s, gain);
      const auto x = load_doubles<typename D::type>(state.exact + here) / D::of(factor) - D::of(t);
      memcpy(state.exact + here, &x, sizeof(x));
      store<V>(state.rounded + here, D::rounded(x));
      store<V>(grad_out + r * shape.row + d, found.input);
      store<V>(grad_affine + r * 2 * width + d, found.s_raw);
      store<V>(grad_affine + r * 2 * width + width + d, found.input);
      gain_sum += found.gain;
      s_sum += found.s_raw;
      t_sum += found.input;
    }
    accumulate<V>(grads + at.gain + d, gain_sum);
    accumulate<V>(grads + at.bias[2] + d, s_sum);
    accumulate<V>(grads + at.bias[2] + width + d, t_sum);
  }

  multiply<V>(2 * width, hp, kTileRows, grad_affine, 1, 2 * width, hidden1, hp,
              [&](int64_t o, int64_t u, V sum) NM_INLINE { accumulate<V>(grads + at.weight[2] + o * hp + u, sum); });
  multiply<V>(kTileRows, hp, 2 * width, grad_affine, 2 * width, 1, p + at.weight[2], hp,
              [&](int64_t r, int64_t u, V sum)
                  NM_INLINE { store<V>(grad_hidden + r * hp + u, load<V>(hidden1 + r * hp + u) > 0 ? sum : V{}); });
  sum_rows<V>(hp, grads + at.bias[1],
              [&](int64_t r, int64_t u) NM_INLINE { return load<V>(grad_hidden + r * hp + u); });
  multiply<V>(shape.hidden, hp, kTileRows, grad_hidden, 1, hp, hidden0, hp,
              [&](int64_t o, int64_t u, V sum) NM_INLINE { accumulate<V>(grads + at.weight[1] + o * hp + u, sum); });
  Acc* const grad_hidden0 = hidden1;  // no longer needed
  const Acc scale = dropout.active ? Acc(dropout.scale) : Acc(1);
  multiply<V>(kTileRows, hp, shape.hidden, grad_hidden, hp, 1, p + at.weight[1], hp,
              [&](int64_t r, int64_t u, V sum) NM_INLINE {
                store<V>(grad_hidden0 + r * hp + u, load<V>(hidden0 + r * hp + u) > 0 ? sum * scale : V{});
              });
  sum_rows<V>(hp, grads + at.bias[0],
              [&](int64_t r, int64_t u) NM_INLINE { return load<V>(grad_hidden0 + r * hp + u); });
  multiply<V>(shape.hidden, shape.half_pad[kept], kTileRows, grad_hidden0, 1, hp, in, shape.row,
              [&](int64_t o, int64_t d, V sum)
                  NM_INLINE { accumulate<V>(grads + at.weight[0] + o * shape.half_pad[kept] + d, sum); });
  multiply<V>(kTileRows, shape.half_pad[kept], shape.hidden, grad_hidden0, hp, 1, p + at.weight[0],
              shape.half_pad[kept],
              [&](int64_t r, int64_t d, V sum) NM_INLINE { accumulate<V>(grad_in + r * shape.row + d, sum); });
}

// A run of values of a gradient, each the sum of one value of every chunk.
template <typename Acc>
struct Segment {
  int64_t from, width;
  Acc* to;
};

template <typename Acc>
class Gradients {
 public:
  Gradients(const Shape& shape, const std::vector<Tensor>& parameters, const Tensor& means) {
    tensors.reserve(parameters.size());
    for (int64_t j = 0; j < shape.couplings; ++j) {
      const int kept = j % 2;
      const CouplingLayout at(shape, kept);
      const int64_t h = shape.hidden, hp = shape.hidden_pad, in = shape.half(kept), out = shape.half(1 - kept);
      const int64_t out_pad = shape.half_pad[1 - kept];
      Acc* to[kCouplingTensors];
      for (int i = 0; i < kCouplingTensors; ++i) {
        const Tensor& like = parameters[j * kCouplingTensors + i];
        tensors.push_back(like.dim() == 2 ? new_tensor(like, {like.size(0), like.size(1)}, like.scalar_type())
                                          : new_tensor(like, {like.size(0)}, like.scalar_type()));
        to[i] = tensors.back().template mutable_data_ptr<Acc>();
      }
      starts.push_back(size);
      add(at.weight[0], h, in, shape.half_pad[kept], to[kWeight0]);
      add(at.bias[0], 1, h, hp, to[kBias0]);
      add(at.weight[1], h, h, hp, to[kWeight1]);
      add(at.bias[1], 1, h, hp, to[kBias1]);
      add(at.weight[2], out, h, hp, to[kWeight2]);
      add(at.weight[2] + out_pad * hp, out, h, hp, to[kWeight2] + out * h);
      add(at.bias[2], 1, out, out, to[kBias2]);
      add(at.bias[2] + out_pad, 1, out, out, to[kBias2] + out);
      add(at.gain, 1, out, out, to[kGain]);
      size += at.gradients;
    }
    starts.push_back(size);
    grad_means = new_tensor(means, {shape.classes, shape.features}, means.scalar_type());
    Acc* const to = grad_means.template mutable_data_ptr<Acc>();
    for (int half = 0; half < 2; ++half)
      for (int64_t d = 0; d < shape.half(half); d += kPad)
        for (int64_t k = 0; k < shape.classes; ++k)
          segments.push_back({size + ((shape.offset(half) + d) / kPad * shape.classes + k) * kPad,
                              std::min(kPad, shape.half(half) - d),
                              to + k * shape.features + half_begin(half, shape.features) + d});
    size += shape.row * shape.classes;
  }

  // Adds up the chunks, in order.
  void sum(const Acc* partial, int64_t chunks) const {
    parallel_rows(segments.size(), 32 * chunks, [&](int64_t begin, int64_t end) {
      vectorised<Acc>([&](auto lanes) NM_INLINE {
        using V = typename decltype(lanes)::type;
        for (int64_t i = begin; i < end; ++i) {
          const Segment<Acc> segment = segments[i];
          for_columns<V>(0, segment.width, [&](int64_t j, const auto& load, const auto& store) NM_INLINE {
            V sum{};
            for (int64_t c = 0; c < chunks; ++c) sum += load(partial + c * size + segment.from + j);
            store(segment.to + j, sum);
          });
        }
      });
    });
  }

  std::vector<Tensor> tensors;
  Tensor grad_means;
  std::vector<int64_t> starts;  // of the couplings in a chunk's sums, then of the means
  int64_t size = 0;

 private:
  void add(int64_t from, int64_t rows, int64_t width, int64_t stride, Acc* to) {
    for (int64_t r = 0; r < rows; ++r) segments.push_back({size + from + r * stride, width, to + r * width});
  }
  std::vector<Segment<Acc>> segments;
};

// A tensor of gradients that may be missing, which stands for zeros.
template <typename Acc>
struct Upstream {
  Tensor dense;
  const Acc* data = nullptr;
  explicit Upstream(const std::optional<Tensor>& grad) {
    if (!grad) return;
    dense = grad->is_contiguous() ? *grad : torch::stable::contiguous(*grad);
    data = dense.template const_data_ptr<Acc>();
  }
  Acc operator[](int64_t i) const { return data ? data[i] : Acc(0); }
};

using FlowHeadGradients = std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor, Tensor>;

template <typename Acc>
FlowHeadGradients backward(const Shape& shape, const std::optional<Tensor>& grad_z,
                           const std::optional<Tensor>& grad_logdet, const std::optional<Tensor>& grad_class_log_prob,
                           const std::optional<Tensor>& grad_log_prob, const Tensor& saved,
                           const Tensor& class_log_prob, const std::vector<Tensor>& parameters, const Tensor& means,
                           const Tensor& rho, const Tensor& logits, const Dropout& dropout, double eps,
                           ScalarType type) {
  Network<Acc> network(shape, parameters, true);
  const Mixture<Acc> mixture(shape, rho, logits, eps);
  Gradients<Acc> gradients(shape, parameters, means);
  const int64_t rows = saved.size(0), classes = shape.classes, kp = shape.classes_pad;
  const Tensor dense_state = dense_rows(saved), dense_means = dense_rows(means);
  const Tensor dense_classes = torch::stable::contiguous(class_log_prob);
  const Acc* const scores = dense_classes.const_data_ptr<Acc>();
  const Upstream<Acc> from_z(grad_z), from_logdet(grad_logdet), from_classes(grad_class_log_prob),
      from_log_prob(grad_log_prob);
  const Tensor grad_x = new_tensor(saved, {rows, shape.features}, type);

  const auto mu = read_rows<Acc>(dense_means);
  Scratch<Acc> centres(shape.row * classes);
  std::fill_n(centres.data(), shape.row * classes, Acc(0));
  for (int64_t k = 0; k < classes; ++k)
    for (int half = 0; half < 2; ++half)
      for (int64_t d = 0; d < shape.half(half); ++d) {
        const int64_t at = shape.offset(half) + d;
        centres[(at / kPad * classes + k) * kPad + at % kPad] = mu[k][half_begin(half, shape.features) + d];
      }

  // Each chunk has its own sums of the parameters' gradients: as many as 64 MB of floats allow, at least 4.
  const Chunks chunks(rows, gradients.size > 100000 ? 4 * kTileRows : 2 * kTileRows,
                      std::clamp<int64_t>((1 << 24) / gradients.size, 4, 64));
  Scratch<Acc> partial(chunks.count * gradients.size);
  std::vector<double> scatter(chunks.count * classes), total(chunks.count * classes);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    Activations<Acc> tile(shape);
    State<Acc> state(shape);
    Scratch<Acc> grad_memory(kTileRows * shape.row), weights_memory(kTileRows * classes), row_memory(kp),
        hidden_memory(kTileRows * shape.hidden_pad),
        affine_memory(kTileRows * 2 * std::max(shape.half_pad[0], shape.half_pad[1]));
    Acc *const grad = grad_memory.data(), *const weights = weights_memory.data();
    Acc *const row = row_memory.data(), *const grad_hidden = hidden_memory.data(),
               *const grad_affine = affine_memory.data();
    Acc logdet_grads[kTileRows];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      Acc* const sums = partial.data() + chunk * gradients.size;
      double *const scattered = &scatter[chunk * classes], *const counted = &total[chunk * classes];
      std::fill_n(sums, gradients.size, Acc(0));
      vectorised<Acc>([&](auto lanes) NM_INLINE {
        using V = typename decltype(lanes)::type;
        for (int64_t first = chunks.begin(chunk); first < chunks.end(chunk); first += kTileRows) {
          const int64_t here = std::min(kTileRows, chunks.end(chunk) - first);
          read_state(shape, dense_state, first, here, state);
          std::fill_n(grad, kTileRows * shape.row, Acc(0));
          std::fill_n(weights, kTileRows * classes, Acc(0));
          std::fill_n(logdet_grads, kTileRows, Acc(0));
          if (from_z.data) read_tile<V>(shape, from_z.dense, from_z.dense.scalar_type(), first, here, grad);
          std::fill(grad + here * shape.row, grad + kTileRows * shape.row, Acc(0));
          for (int64_t r = 0; r < here; ++r) {
            const int64_t i = first + r;
            const Acc of_log_prob = from_log_prob[i];
            logdet_grads[r] = from_logdet[i] + of_log_prob;
            std::fill_n(row, kp, -std::numeric_limits<Acc>::infinity());
            std::copy_n(scores + i * classes, classes, row);
            if (from_log_prob.data) {
              Acc top;
              const Acc norm = Acc(logsumexp<V>(row, kp, &top) - double(top));
              for (int64_t k = 0; k < kp; k += kLanes<V>)
                store<V>(row + k, Math<V>::exp(load<V>(row + k) - top - norm) * of_log_prob);
            } else {
              std::fill_n(row, kp, Acc(0));
            }
            for (int64_t k = 0; k < classes; ++k) {
              const Acc g = row[k] + from_classes[i * classes + k];
              weights[k * kTileRows + r] = g * mixture.precision[k];
              counted[k] += g;
              scattered[k] += 2.0 * g * (double(mixture.offset[k]) - double(scores[i * classes + k]));
            }
          }
          mixture_backward<V>(shape, weights, state.rounded, centres.data(), grad,
                              sums + gradients.starts[shape.couplings]);
          for (int64_t j = shape.couplings - 1; j >= 0; --j)
            coupling_backward<V>(shape, network.layout(j), network[j], dropout, first, j, logdet_grads, state, grad,
                                 sums + gradients.starts[j], tile, grad_affine, grad_hidden);
          write_tile<V>(shape, grad, grad_x, type, first, here);
        }
      });
    }
  });
  gradients.sum(partial.data(), chunks.count);

  const Tensor grad_rho = new_tensor(rho, {classes}, rho.scalar_type());
  const Tensor grad_logits = new_tensor(logits, {classes}, logits.scalar_type());
  Acc* const out_rho = grad_rho.mutable_data_ptr<Acc>();
  Acc* const out_logits = grad_logits.mutable_data_ptr<Acc>();
  std::vector<double> weight(classes);
  double weight_sum = 0;
  for (int64_t k = 0; k < classes; ++k) {
    double spread = 0, count = 0;
    for (int64_t c = 0; c < chunks.count; ++c) {
      spread += scatter[c * classes + k];
      count += total[c * classes + k];
    }
    out_rho[k] = Acc((spread - double(shape.features) * count) * mixture.slope[k]);
    weight[k] = count * log_weight_slope(mixture.log_pi[k], eps);
    weight_sum += weight[k];
  }
  for (int64_t k = 0; k < classes; ++k) out_logits[k] = Acc(weight[k] - std::exp(mixture.log_pi[k]) * weight_sum);
  return {grad_x, std::move(gradients.tensors), gradients.grad_means, grad_rho, grad_logits};
}

// ---- the ops ------------------------------------------------------------------------------------------------------

Shape shape_of(const Tensor& x, const std::vector<Tensor>& couplings, const Tensor& means) {
  return Shape(x.size(1), couplings[kBias0].size(0), means.size(0), int64_t(couplings.size()) / kCouplingTensors);
}

Dropout dropout_of(const std::optional<Tensor>& seed, double dropout) {
  return Dropout::of(seed ? dropout : 0, seed ? uint64_t(*seed->const_data_ptr<int64_t>()) : 0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flow_head(const Tensor& x, std::vector<Tensor> couplings,
                                                             const Tensor& means, const Tensor& rho,
                                                             const Tensor& logits, std::optional<Tensor> seed,
                                                             double dropout, double eps) {
  const Shape shape = shape_of(x, couplings, means);
  const int64_t rows = x.size(0);
  const ScalarType type = accumulation_type(x);
  const Tensor z = new_tensor(x, {rows, shape.features}, type), logdet = new_tensor(x, {rows}, type);
  const Tensor class_log_prob = new_tensor(x, {rows, shape.classes}, type), log_prob = new_tensor(x, {rows}, type);
  const Tensor state = new_tensor(x, {rows, shape.features}, ScalarType::Double);
  const Tensor dense_x = dense_rows(x);
  const auto run = type == ScalarType::Double ? forward<double> : forward<float>;
  run(shape, dense_x, couplings, means, rho, logits, dropout_of(seed, dropout), eps, z, logdet, class_log_prob,
      log_prob, state);
  return {z, logdet, class_log_prob, log_prob, state};
}

FlowHeadGradients flow_head_backward(std::optional<Tensor> grad_z, std::optional<Tensor> grad_logdet,
                                     std::optional<Tensor> grad_class_log_prob, std::optional<Tensor> grad_log_prob,
                                     const Tensor& state, const Tensor& class_log_prob, std::vector<Tensor> couplings,
                                     const Tensor& means, const Tensor& rho, const Tensor& logits,
                                     std::optional<Tensor> seed, double dropout, double eps, ScalarType dtype) {
  const auto run = means.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return run(shape_of(state, couplings, means), grad_z, grad_logdet, grad_class_log_prob, grad_log_prob, state,
             class_log_prob, couplings, means, rho, logits, dropout_of(seed, dropout), eps, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normatch, CPU, m) {
  m.impl("flow_head", TORCH_BOX(&flow_head));
  m.impl("flow_head_backward", TORCH_BOX(&flow_head_backward));
}

}  // namespace normatch
