// Affine coupling on the CPU: one pass over the rows each way. Values moved per element: forward and inverse
// 3 read, 1 written; backward 3 read, 2 written (dt is dx). About 45 FLOP an element, nearly all in exp and
// tanh.
#include "affine_coupling.h"

#include <tuple>

#include "cpu.h"

namespace normatch {
namespace {

// The gain's gradient sums over rows: in registers' type over kBlock rows, these into a double for each
// chunk.
constexpr int64_t kBlock = 32;

Chunks chunks_of(int64_t rows, int64_t width) {
  return Chunks(rows, std::max<int64_t>(kBlock, 16384 / std::max<int64_t>(1, width)), 256);
}

// element(row, column, load, store, gain) -> this element's term of the gain's gradient.
template <typename V, typename Acc, typename F>
NM_HD void sum_over_rows(const Chunks& chunks, int64_t chunk, int64_t width, const Acc* gain, double* sums,
                         const F& element) {
  std::vector<Acc> block(width);
  std::fill_n(sums, width, 0.0);
  for (int64_t first = chunks.begin(chunk); first < chunks.end(chunk); first += kBlock) {
    std::fill(block.begin(), block.end(), Acc(0));
    for (int64_t i = first; i < std::min(first + kBlock, chunks.end(chunk)); ++i)
      for_columns<V>(0, width, [&](int64_t j, const auto& load, const auto& store) NM_INLINE {
        store(&block[j], load(&block[j]) + element(i, j, load, store, load(gain + j)));
      });
    for (int64_t j = 0; j < width; ++j) sums[j] += block[j];
  }
}

// Runs chunk(c, sums) for every chunk and adds up the sums, in order.
template <typename Acc, typename F>
Tensor gain_gradient(const Tensor& gain, const Chunks& chunks, int64_t width, const F& chunk) {
  std::vector<double> partial(chunks.count * width);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) chunk(c, partial.data() + c * width);
  });
  Tensor grad = new_tensor(gain, {width}, gain.scalar_type());
  Acc* out = grad.mutable_data_ptr<Acc>();
  for (int64_t j = 0; j < width; ++j) {
    double sum = 0;
    for (int64_t c = 0; c < chunks.count; ++c) sum += partial[c * width + j];
    out[j] = Acc(sum);
  }
  return grad;
}

std::tuple<Tensor, Tensor> affine_coupling(const Tensor& x, const Tensor& s_raw, const Tensor& t, const Tensor& gain) {
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor y = new_tensor(x, {rows, width}, x.scalar_type());
  const Tensor logdet = new_tensor(x, {rows}, accumulation_type(x));
  const Tensor dense_x = dense_rows(x), dense_s = dense_rows(s_raw), dense_t = dense_rows(t);
  const Tensor dense_gain = torch::stable::contiguous(gain);
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const auto in = read_rows<T>(dense_x), s = read_rows<T>(dense_s), shift = read_rows<T>(dense_t);
    const auto out = write_rows<T>(y);
    const Acc* g = dense_gain.const_data_ptr<Acc>();
    Acc* sums = logdet.mutable_data_ptr<Acc>();
    parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
      vectorised<T>([&](auto lanes) NM_INLINE {
        using V = typename decltype(lanes)::type;
        for (int64_t i = begin; i < end; ++i)
          sums[i] = blocked_sum<V>(width, [&](int64_t j, const auto& load, const auto& store) NM_INLINE {
            const V log_scale = affine_scale(load(s[i] + j), load(g + j)).s;
            store(out[i] + j, affine_forward(load(in[i] + j), load(shift[i] + j), log_scale));
            return log_scale;
          });
      });
    });
  });
  return {y, logdet};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward(const Tensor& grad_y, const Tensor& grad_logdet,
                                                            const Tensor& y, const Tensor& s_raw, const Tensor& gain) {
  const int64_t rows = y.size(0), width = y.size(1);
  const Tensor grad_x = new_tensor(y, {rows, width}, y.scalar_type());
  const Tensor grad_s = new_tensor(y, {rows, width}, y.scalar_type());
  const Tensor dense_grad = dense_rows(grad_y), dense_y = dense_rows(y), dense_s = dense_rows(s_raw);
  const Tensor dense_gain = torch::stable::contiguous(gain);
  const Chunks chunks = chunks_of(rows, width);
  Tensor grad_gain;
  dispatch(y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const auto dy = read_rows<T>(dense_grad), out = read_rows<T>(dense_y), s = read_rows<T>(dense_s);
    const auto dx = write_rows<T>(grad_x), ds = write_rows<T>(grad_s);
    const Rows<const Acc> dlogdet{grad_logdet.const_data_ptr<Acc>(), grad_logdet.stride(0)};
    const Acc* g = dense_gain.const_data_ptr<Acc>();
    grad_gain = gain_gradient<Acc>(dense_gain, chunks, width, [&](int64_t chunk, double* sums) {
      vectorised<T>([&](auto lanes) NM_INLINE {
        using V = typename decltype(lanes)::type;
        sum_over_rows<V>(chunks, chunk, width, g, sums,
                         [&](int64_t i, int64_t j, const auto& load, const auto& store, V gain_j) NM_INLINE {
                           const auto grad = affine_backward(load(dy[i] + j), V{} + *dlogdet[i], load(out[i] + j),
                                                             load(s[i] + j), gain_j);
                           store(dx[i] + j, grad.input);
                           store(ds[i] + j, grad.s_raw);
                           return grad.gain;
                         });
      });
    });
  });
  return {grad_x, grad_s, grad_gain};
}

Tensor affine_coupling_inverse(const Tensor& y, const Tensor& s_raw, const Tensor& t, const Tensor& gain) {
  const int64_t rows = y.size(0), width = y.size(1);
  const Tensor x = new_tensor(y, {rows, width}, y.scalar_type());
  const Tensor dense_y = dense_rows(y), dense_s = dense_rows(s_raw), dense_t = dense_rows(t);
  const Tensor dense_gain = torch::stable::contiguous(gain);
  dispatch(y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const auto in = read_rows<T>(dense_y), s = read_rows<T>(dense_s), shift = read_rows<T>(dense_t);
    const auto out = write_rows<T>(x);
    const Acc* g = dense_gain.const_data_ptr<Acc>();
    parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
      vectorised<T>([&](auto lanes) NM_INLINE {
        using V = typename decltype(lanes)::type;
        for (int64_t i = begin; i < end; ++i)
          for_columns<V>(0, width, [&](int64_t j, const auto& load, const auto& store) NM_INLINE {
            const V log_scale = affine_scale(load(s[i] + j), load(g + j)).s;
            store(out[i] + j, affine_inverse(load(in[i] + j), load(shift[i] + j), log_scale));
          });
      });
    });
  });
  return x;
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_inverse_backward(const Tensor& grad_x, const Tensor& y,
                                                                    const Tensor& s_raw, const Tensor& gain) {
  const int64_t rows = y.size(0), width = y.size(1);
  const Tensor grad_y = new_tensor(y, {rows, width}, y.scalar_type());
  const Tensor grad_s = new_tensor(y, {rows, width}, y.scalar_type());
  const Tensor dense_grad = dense_rows(grad_x), dense_y = dense_rows(y), dense_s = dense_rows(s_raw);
  const Tensor dense_gain = torch::stable::contiguous(gain);
  const Chunks chunks = chunks_of(rows, width);
  Tensor grad_gain;
  dispatch(y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const auto dx = read_rows<T>(dense_grad), in = read_rows<T>(dense_y), s = read_rows<T>(dense_s);
    const auto dy = write_rows<T>(grad_y), ds = write_rows<T>(grad_s);
    const Acc* g = dense_gain.const_data_ptr<Acc>();
    grad_gain = gain_gradient<Acc>(dense_gain, chunks, width, [&](int64_t chunk, double* sums) {
      vectorised<T>([&](auto lanes) NM_INLINE {
        using V = typename decltype(lanes)::type;
        sum_over_rows<V>(chunks, chunk, width, g, sums,
                         [&](int64_t i, int64_t j, const auto& load, const auto& store, V gain_j) NM_INLINE {
                           const auto grad =
                               affine_inverse_backward(load(dx[i] + j), load(in[i] + j), load(s[i] + j), gain_j);
                           store(dy[i] + j, grad.input);
                           store(ds[i] + j, grad.s_raw);
                           return grad.gain;
                         });
      });
    });
  });
  return {grad_y, grad_s, grad_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normatch, CPU, m) {
  m.impl("affine_coupling", TORCH_BOX(&affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&affine_coupling_backward));
  m.impl("affine_coupling_inverse", TORCH_BOX(&affine_coupling_inverse));
  m.impl("affine_coupling_inverse_backward", TORCH_BOX(&affine_coupling_inverse_backward));
}

}  // namespace normatch
