// Affine coupling on the CPU, in one pass over the rows. Per element 3 values read and 1 written (forward, inverse) or
// 2 (backward, where dt is dx); about 45 FLOP, nearly all in exp and tanh.
#include "affine_coupling.h"

#include "cpu.h"

namespace normatch {
namespace {

// The sum over a row of element(column, scale, load, store). A stretch's tanhs are computed first: tanh and exp
// together are too long a dependency chain for the processor to overlap enough elements.
template <typename V, typename Acc, typename T, typename F>
NM_HD double for_scales(const T* s_raw, const Acc* gain, int64_t width, const F& element) {
  constexpr int64_t kStretch = 16 * kLanes<V>;
  alignas(64) Acc tanhs[kStretch];
  double total = 0;
  for (int64_t begin = 0; begin < width; begin += kStretch) {
    const int64_t end = std::min(begin + kStretch, width);
    for_columns<V>(begin, end, [&](int64_t j, const auto& load, const auto& store) NM_INLINE {
      store(tanhs + (j - begin), Math<V>::tanh(load(s_raw + j)));
    });
    V sum{};
    for_columns<V>(begin, end, [&](int64_t j, const auto& load, const auto& store) NM_INLINE {
      const V tanh_s = load(tanhs + (j - begin));
      sum += element(j, AffineScale<V>{tanh_s, load(gain + j) * tanh_s}, load, store);
    });
    total += exact_sum(sum);
  }
  return total;
}

// y of x and the log-determinants, or x of y (and no log-determinants: null).
template <bool kInverse>
Tensor map_rows(const Tensor& x, const Tensor& s_raw, const Tensor& t, const Tensor& gain, const Tensor* logdet) {
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor y = new_like(x);
  const Tensor dense_x = dense_rows(x), dense_s = dense_rows(s_raw), dense_t = dense_rows(t);
  const Tensor dense_gain = torch::stable::contiguous(gain);
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const auto in = read_rows<T>(dense_x), s = read_rows<T>(dense_s), shift = read_rows<T>(dense_t);
    const auto out = write_rows<T>(y);
    const Acc* g = dense_gain.const_data_ptr<Acc>();
    Acc* const sums = logdet ? logdet->mutable_data_ptr<Acc>() : nullptr;
    const bool streaming = should_stream(rows, width, out);
    parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
      vectorized<T>([&](auto lanes) NM_INLINE {
        using V = typename decltype(lanes)::type;
        for (int64_t i = begin; i < end; ++i) {
          const double sum = for_scales<V>(
              s[i], g, width, [&](int64_t j, AffineScale<V> scale, const auto& load, const auto& store) NM_INLINE {
                const V value = load(in[i] + j), move = load(shift[i] + j);
                store(out[i] + j,
                      kInverse ? affine_inverse(value, move, scale.s) : affine_forward(value, move, scale.s),
                      streaming);
                return scale.s;
              });
          if (sums) sums[i] = Acc(sum);
        }
      });
      if (streaming) stream_fence();
    });
  });
  return y;
}

// The gradients of x (or y), s_raw and gain. The gain's is summed in Acc over kBlock rows, in double over a chunk.
template <bool kInverse>
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& upstream, const Tensor* grad_logdet, const Tensor& y,
                                             const Tensor& s_raw, const Tensor& gain) {
  constexpr int64_t kBlock = 32;
  const int64_t rows = y.size(0), width = y.size(1);
  const Tensor grad_in = new_like(y), grad_s = new_like(y);
  const Tensor grad_gain = new_like(gain);
  const Tensor dense_upstream = dense_rows(upstream), dense_y = dense_rows(y), dense_s = dense_rows(s_raw);
  const Tensor dense_gain = torch::stable::contiguous(gain);
  const Chunks chunks(rows, std::max<int64_t>(kBlock, 16384 / std::max<int64_t>(1, width)), 256);
  std::vector<double> partial(chunks.count * width);
  dispatch(y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const auto up = read_rows<T>(dense_upstream), out = read_rows<T>(dense_y), s = read_rows<T>(dense_s);
    const auto din = write_rows<T>(grad_in), ds = write_rows<T>(grad_s);
    const Acc* const dlogdet = grad_logdet ? grad_logdet->const_data_ptr<Acc>() : nullptr;
    const int64_t dlogdet_stride = grad_logdet ? grad_logdet->stride(0) : 0;
    const Acc* g = dense_gain.const_data_ptr<Acc>();
    const bool streaming = should_stream(rows, width, din) && should_stream(rows, width, ds);
    torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t first_chunk, int64_t last_chunk) {
      std::vector<Acc> block(width);
      vectorized<T>([&](auto lanes) NM_INLINE {
        using V = typename decltype(lanes)::type;
        for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk)
          for (int64_t first = chunks.begin(chunk); first < chunks.end(chunk); first += kBlock) {
            std::fill(block.begin(), block.end(), Acc(0));
            for (int64_t i = first; i < std::min(first + kBlock, chunks.end(chunk)); ++i) {
              const V above = V{} + (dlogdet ? dlogdet[i * dlogdet_stride] : Acc(0));
              for_scales<V>(s[i], g, width,
                            [&](int64_t j, AffineScale<V> scale, const auto& load, const auto& store) NM_INLINE {
                              const V from = load(up[i] + j), value = load(out[i] + j), gain_j = load(g + j);
                              const auto grad = kInverse ? affine_inverse_backward(from, value, scale, gain_j)
                                                         : affine_backward(from, above, value, scale, gain_j);
                              store(din[i] + j, grad.input, streaming);
                              store(ds[i] + j, grad.s_raw, streaming);
                              store(&block[j], load(&block[j]) + grad.gain);
                              return V{};
                            });
            }
            for (int64_t j = 0; j < width; ++j) partial[chunk * width + j] += block[j];
          }
      });
      if (streaming) stream_fence();
    });
    sum_parts(partial, width, 1, chunks.count, width, grad_gain.mutable_data_ptr<Acc>());
  });
  return {grad_in, grad_s, grad_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normatch, CPU, m) {
  AffineCouplingOps<map_rows<false>, map_rows<true>, gradients<false>, gradients<true>>::implement(m);
}

}  // namespace normatch
