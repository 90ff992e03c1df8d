// The flow head's backward pass on the CPU, see flow_head_cpu.h.
#include "affine_coupling.h"
#include "flow_head_cpu.h"
#include "limits.h"

namespace normatch {
namespace {

template <typename Acc>
void read_state(const Shape& shape, const Tensor& tensor, int64_t first, int64_t rows, const State<Acc>& state) {
  const auto from = read_rows<double>(tensor);
  std::fill_n(state.exact.data(), kTileRows * shape.row, 0.0);
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int half = 0; half < 2; ++half)
      std::copy_n(from[first + std::min(r, rows - 1)] + half_begin(half, shape.features), shape.half(half),
                  state.exact.data() + r * shape.row + shape.offset(half));
  std::copy_n(state.exact.data(), kTileRows * shape.row, state.rounded.data());
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
  const Acc* const in = state.rounded.data() + shape.offset(kept);
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
      const V y = load<V>(state.rounded.data() + here), grad_y = load<V>(grad_out + r * shape.row + d);
      const auto terms = affine_gradients(V(grad_y * factor), V(grad_y * y + grad_logdet[r]), tanh_s, gain);
      const auto x = load<typename D::type>(state.exact.data() + here) / D::of(factor) - D::of(t);
      store(state.exact.data() + here, x);
      store<V>(state.rounded.data() + here, D::rounded(x));
      store<V>(grad_out + r * shape.row + d, terms.input);
      store<V>(grad_affine + r * 2 * width + d, terms.s_raw);
      store<V>(grad_affine + r * 2 * width + width + d, terms.input);
      gain_sum += terms.gain;
      s_sum += terms.s_raw;
      t_sum += terms.input;
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
        tensors.push_back(new_like(parameters[j * kCouplingTensors + i]));
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
    grad_means = new_like(means);
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
      vectorized<Acc>([&](auto lanes) NM_INLINE {
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

// The gradients of the results, and the class log-probabilities.
template <typename Acc>
struct Incoming {
  Upstream<Acc> z, logdet, class_log_prob, log_prob, scores;
};

// The means as mixture_backward reads them.
template <typename Acc>
Scratch<Acc> packed_means(const Shape& shape, const Tensor& means) {
  const Tensor dense = dense_rows(means);
  const auto mu = read_rows<Acc>(dense);
  Scratch<Acc> packed(shape.row * shape.classes);
  std::fill_n(packed.data(), shape.row * shape.classes, Acc(0));
  for (int64_t k = 0; k < shape.classes; ++k)
    for (int half = 0; half < 2; ++half)
      for (int64_t d = 0; d < shape.half(half); ++d) {
        const int64_t at = shape.offset(half) + d;
        packed[(at / kPad * shape.classes + k) * kPad + at % kPad] = mu[k][half_begin(half, shape.features) + d];
      }
  return packed;
}

// The gradients of a tile's scores, to weights (see mixture_backward), scatter and total, and those of its
// log-determinants. row: scratch, [classes_pad]
template <typename V, typename Acc>
NM_HD void score_gradients(const Shape& shape, const Incoming<Acc>& from, const MixtureClasses<Acc>& mixture,
                           int64_t first, int64_t rows, Acc* row, Acc* weights, Acc* logdet_grads, double* scatter,
                           double* total) {
  const int64_t classes = shape.classes, kp = shape.classes_pad;
  std::fill_n(weights, kTileRows * classes, Acc(0));
  std::fill_n(logdet_grads, kTileRows, Acc(0));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = first + r;
    const Acc of_log_prob = from.log_prob[i];
    const Acc* const scores = from.scores.data + i * classes;
    logdet_grads[r] = from.logdet[i] + of_log_prob;
    std::fill_n(row, kp, -std::numeric_limits<Acc>::infinity());
    std::copy_n(scores, classes, row);
    if (from.log_prob.data) {
      Acc top;
      const Acc norm = Acc(logsumexp<V>(row, kp, &top) - double(top));
      for (int64_t k = 0; k < kp; k += kLanes<V>)
        store<V>(row + k, Math<V>::exp(load<V>(row + k) - top - norm) * of_log_prob);
    } else {
      std::fill_n(row, kp, Acc(0));
    }
    for (int64_t k = 0; k < classes; ++k) {
      const Acc g = row[k] + from.class_log_prob[i * classes + k];
      weights[k * kTileRows + r] = g * mixture.precision[k];
      total[k] += g;
      scatter[k] += 2.0 * g * (double(mixture.offset[k]) - double(scores[k]));
    }
  }
}

template <typename Acc>
FlowHeadGradients backward(const Shape& shape, const std::optional<Tensor>& grad_z,
                           const std::optional<Tensor>& grad_logdet, const std::optional<Tensor>& grad_class_log_prob,
                           const std::optional<Tensor>& grad_log_prob, const Tensor& saved,
                           const Tensor& class_log_prob, const std::vector<Tensor>& parameters, const Tensor& means,
                           const Tensor& rho, const Tensor& logits, const Dropout& dropout, double eps,
                           ScalarType type) {
  const Network<Acc> network(shape, parameters, true);
  const MixtureClasses<Acc> mixture(rho, logits, eps, shape.features);
  Gradients<Acc> gradients(shape, parameters, means);
  const int64_t rows = saved.size(0), classes = shape.classes;
  const Tensor dense_state = dense_rows(saved), grad_x = new_tensor(saved, {rows, shape.features}, type);
  const Incoming<Acc> from{Upstream<Acc>(grad_z), Upstream<Acc>(grad_logdet), Upstream<Acc>(grad_class_log_prob),
                           Upstream<Acc>(grad_log_prob), Upstream<Acc>(class_log_prob)};
  const Scratch<Acc> centers = packed_means<Acc>(shape, means);

  // Each chunk has its own sums of the parameters' gradients: as many as the workspace allows, at least 4.
  const Chunks chunks(rows, gradients.size > 100000 ? 4 * kTileRows : 2 * kTileRows,
                      std::clamp<int64_t>(kWorkspace / gradients.size, 4, 64));
  const Scratch<Acc> partial(chunks.count * gradients.size);
  std::vector<double> scatter(chunks.count * classes), total(chunks.count * classes);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    Activations<Acc> tile(shape);
    const State<Acc> state(shape);
    const Scratch<Acc> grad_memory(kTileRows * shape.row), weights(kTileRows * classes), row(shape.classes_pad),
        grad_hidden(kTileRows * shape.hidden_pad),
        grad_affine(kTileRows * 2 * std::max(shape.half_pad[0], shape.half_pad[1]));
    Acc* const grad = grad_memory.data();
    Acc logdet_grads[kTileRows];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      Acc* const sums = partial.data() + chunk * gradients.size;
      std::fill_n(sums, gradients.size, Acc(0));
      vectorized<Acc>([&](auto lanes) NM_INLINE {
        using V = typename decltype(lanes)::type;
        for (int64_t first = chunks.begin(chunk); first < chunks.end(chunk); first += kTileRows) {
          const int64_t here = std::min(kTileRows, chunks.end(chunk) - first);
          read_state(shape, dense_state, first, here, state);
          std::fill_n(grad, kTileRows * shape.row, Acc(0));
          if (from.z.data) read_tile<V>(shape, from.z.dense, first, here, grad);
          std::fill(grad + here * shape.row, grad + kTileRows * shape.row, Acc(0));
          score_gradients<V>(shape, from, mixture, first, here, row.data(), weights.data(), logdet_grads,
                             &scatter[chunk * classes], &total[chunk * classes]);
          mixture_backward<V>(shape, weights.data(), state.rounded.data(), centers.data(), grad,
                              sums + gradients.starts[shape.couplings]);
          for (int64_t j = shape.couplings - 1; j >= 0; --j)
            coupling_backward<V>(shape, network.layout(j), network[j], dropout, first, j, logdet_grads, state, grad,
                                 sums + gradients.starts[j], tile, grad_affine.data(), grad_hidden.data());
          write_tile<V>(shape, grad, grad_x, first, here);
        }
      });
    }
  });
  gradients.sum(partial.data(), chunks.count);
  const Tensor grad_rho = new_like(rho), grad_logits = new_like(logits);
  mixture.parameter_gradients(scatter, total, std::vector<double>(classes, 1.0), grad_rho.mutable_data_ptr<Acc>(),
                              grad_logits.mutable_data_ptr<Acc>());
  return {grad_x, std::move(gradients.tensors), gradients.grad_means, grad_rho, grad_logits};
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
  m.impl("flow_head_backward", TORCH_BOX(&flow_head_backward));
}

}  // namespace normatch
