// The flow head's forward pass on the CPU, see flow_head_cpu.h.
#include "affine_coupling.h"
#include "flow_head_cpu.h"

namespace normatch {

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

template <typename Acc>
__attribute__((noinline)) void run_network(const Shape& shape, const CouplingLayout& at, const Acc* p,
                                           const Dropout& dropout, int64_t row, int64_t j, const Acc* kept,
                                           Activations<Acc>& tile) {
  vectorized<Acc>([&](auto lanes) NM_INLINE {
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

template decltype(run_network<float>) run_network<float>;
template decltype(run_network<double>) run_network<double>;

namespace {

void write_state(const Shape& shape, const double* tile, const Tensor& tensor, int64_t first, int64_t rows) {
  const auto to = write_rows<double>(tensor);
  for (int64_t r = 0; r < rows; ++r)
    for (int half = 0; half < 2; ++half)
      std::copy_n(tile + r * shape.row + shape.offset(half), shape.half(half),
                  to[first + r] + half_begin(half, shape.features));
}

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
FlowHeadResults forward(const Shape& shape, const Tensor& x, const std::vector<Tensor>& parameters, const Tensor& means,
                        const Tensor& rho, const Tensor& logits, const Dropout& dropout, double eps) {
  const FlowHeadResults results = flow_head_results(x, means);
  const auto& [z, logdet, class_log_prob, log_prob, saved] = results;
  Network<Acc> network(shape, parameters, false);
  const MixtureClasses<Acc> mixture(rho, logits, eps, shape.features);
  const Tensor dense_means = dense_rows(means);
  const auto mu = read_rows<Acc>(dense_means);
  const int64_t kp = shape.classes_pad, rows = x.size(0);
  Scratch<Acc> centers(shape.features * kp);
  std::fill_n(centers.data(), shape.features * kp, Acc(0));
  for (int64_t k = 0; k < shape.classes; ++k)
    for (int64_t d = 0; d < shape.features; ++d) centers[d * kp + k] = mu[k][d];
  Acc* const out_logdet = logdet.template mutable_data_ptr<Acc>();
  Acc* const out_classes = class_log_prob.template mutable_data_ptr<Acc>();
  Acc* const out_log_prob = log_prob.template mutable_data_ptr<Acc>();

  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  torch::stable::parallel_for(0, tiles, 1, [&, &out_z = z, &out_state = saved](int64_t begin, int64_t end) {
    Activations<Acc> tile(shape);
    State<Acc> state(shape);
    Scratch<Acc> scores_memory(kTileRows * kp);
    Acc* const scores = scores_memory.data();
    double sums[kTileRows];
    vectorized<Acc>([&](auto lanes) NM_INLINE {
      using V = typename decltype(lanes)::type;
      for (int64_t first = begin * kTileRows; first < std::min(end * kTileRows, rows); first += kTileRows) {
        const int64_t here = std::min(kTileRows, rows - first);
        read_tile<V>(shape, x, first, here, state.rounded.data());
        std::copy_n(state.rounded.data(), kTileRows * shape.row, state.exact.data());
        std::fill_n(sums, kTileRows, 0.0);
        for (int64_t j = 0; j < shape.couplings; ++j) {
          const CouplingLayout& at = network.layout(j);
          const Acc* const p = network[j];
          const int kept = j % 2, changed = 1 - kept;
          const int64_t width = shape.half_pad[changed];
          run_network(shape, at, p, dropout, first, j, state.rounded.data() + shape.offset(kept), tile);
          for (int64_t r = 0; r < kTileRows; ++r) {
            const Acc* const affine = &tile.affine[r * 3 * width];
            const int64_t begin_changed = r * shape.row + shape.offset(changed);
            sums[r] += blocked_sum<V>(width, [&](int64_t d, const auto&, const auto&) NM_INLINE {
              using D = Doubles<V>;
              double* const exact = state.exact.data() + begin_changed + d;
              const auto y = (load<typename D::type>(exact) + D::of(load<V>(affine + width + d))) *
                             D::of(load<V>(affine + 2 * width + d));
              store(exact, y);
              store<V>(state.rounded.data() + begin_changed + d, D::rounded(y));
              return load<V>(p + at.gain + d) * load<V>(affine + d);
            });
          }
        }
        write_tile<V>(shape, state.rounded.data(), out_z, first, here);
        write_state(shape, state.exact.data(), out_state, first, here);

        constexpr int R = kLanes<V> == 16 ? 8 : 4;
        for (int64_t r = 0; r < kTileRows; r += R) {
          int64_t k = 0;
          for (; k + 2 * kLanes<V> <= kp; k += 2 * kLanes<V>)
            distances<V, R, 2>(shape, state.rounded.data() + r * shape.row, centers.data() + k, scores + r * kp + k);
          for (; k < kp; k += kLanes<V>)
            distances<V, R, 1>(shape, state.rounded.data() + r * shape.row, centers.data() + k, scores + r * kp + k);
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
  return results;
}

FlowHeadResults flow_head(const Tensor& x, std::vector<Tensor> couplings, const Tensor& means, const Tensor& rho,
                          const Tensor& logits, std::optional<Tensor> seed, double dropout, double eps) {
  const auto run = accumulation_type(x) == ScalarType::Double ? forward<double> : forward<float>;
  return run(shape_of(x, couplings, means), dense_rows(x), couplings, means, rho, logits, dropout_of(seed, dropout),
             eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normatch, CPU, m) {
  m.impl("flow_head", TORCH_BOX(&flow_head));
}

}  // namespace normatch
