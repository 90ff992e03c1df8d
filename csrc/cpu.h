// Vectors and threads for the CPU kernels. A kernel is written once over a vector type V and compiled for AVX-512, AVX2
// and the baseline; vectorized() runs the best one the machine supports. Vectors are the compiler's (vector_size), so
// the code does not depend on the auto-vectorizer. double is there for gradcheck only, with one lane.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "portable.h"
#include "tensors.h"

// On a lambda: inline it, so that it is compiled for the instruction set of its caller.
#define NM_INLINE __attribute__((always_inline))

namespace normatch {

// ---- vectors ------------------------------------------------------------------------------------------------------

template <int L>
struct VectorTypes {
  typedef float Float __attribute__((vector_size(4 * L)));
  typedef int32_t Int __attribute__((vector_size(4 * L)));
  typedef uint32_t Bits __attribute__((vector_size(4 * L)));
  typedef uint16_t Narrow __attribute__((vector_size(2 * L)));
};
template <int L>
using Vec = typename VectorTypes<L>::Float;

template <typename V>
constexpr int kLanes = sizeof(V) / sizeof(float);
template <>
inline constexpr int kLanes<double> = 1;

// exp, tanh and log to 1 or 2 ulp. The polynomials are minimax fits (Remez exchange in 40 digits, then rounded):
//   exp(r) = 1 + r + r^2 P(r) on |r| <= ln(2)/2, relative error 2^-28
//   log(1 + f) = f - f^2/2 + f^3 R(f) on sqrt(1/2) <= 1 + f <= sqrt(2), relative error 2^-27
template <int L>
struct VectorMath {
  using F = typename VectorTypes<L>::Float;
  using I = typename VectorTypes<L>::Int;

  static NM_HD F exp(F x) {
    x = x < -104.0f ? F{} - 104.0f : x;  // exp(-104) rounds to 0, exp(89) to infinity; NaN passes
    x = x > 89.0f ? F{} + 89.0f : x;
    I n;
    const F p = reduced(x, n);
#if defined(__x86_64__)
    if constexpr (L == 16) {  // one operation instead of eight; in assembly, as in stream()
      F scaled;
      asm("vscalefps %2, %1, %0" : "=v"(scaled) : "v"(1.0f + p), "v"(__builtin_convertvector(n, F)));
      return scaled;
    }
#endif
    const I half = n >> 1;  // two factors, because 2^n alone leaves the range before p * 2^n does
    return (1.0f + p) * power_of_two(half) * power_of_two(n - half);
  }

  // With e = exp(2|x|) - 1, which near 0 is known as exactly as x is: tanh|x| = e / (e + 2) = 1 - 2 / (e + 2), of which
  // the first is the more exact below 1/2, the second above.
  static NM_HD F tanh(F x) {
    F magnitude = (F)((I)x & 0x7fffffff);
    magnitude = magnitude > 10.0f ? F{} + 10.0f : magnitude;  // tanh(10) rounds to 1
    I n;
    const F p = reduced(magnitude + magnitude, n), scale = power_of_two(n);
    const F e = p * scale + (scale - 1.0f);
    const auto low = e < 2.0f;
    const F value = (low ? F{} : F{} + 1.0f) + (low ? e : F{} - 2.0f) / (e + 2.0f);
    return (F)((I)value | ((I)x & int32_t(0x80000000)));
  }

  // Of normal positive numbers; infinity and NaN pass.
  static NM_HD F log(F x) {
    const I exponent = ((I)x - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2)
    const F f = (F)((I)x - (exponent << 23)) - 1.0f;
    F r = f * -0.0763419769393f + 0.127613868048f;
    r = r * f - 0.131602047328f;
    r = r * f + 0.142017872989f;
    r = r * f - 0.166233584412f;
    r = r * f + 0.20001225602f;
    r = r * f - 0.25000820967f;
    r = r * f + 0.333333317226f;
    const F n = __builtin_convertvector(exponent, F);
    const F square = f * f;
    const F value = n * 0.693359375f + (f - (0.5f * square - square * f * r - n * -2.12194440055e-4f));
    return x < __builtin_inff() ? value : x;
  }

 private:
  // exp(x) = (1 + result) * 2^n. The polynomial by squares, a shorter chain of operations than Horner's.
  static NM_HD F reduced(F x, I& n) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const F shifted = x * 1.44269504089f + kRound;
    n = (I)shifted - 0x4b400000;
    const F k = shifted - kRound;
    const F r = (x - k * 0.693359375f) - k * -2.12194440055e-4f;  // ln 2 in two parts, the first exact in products
    const F square = r * r;
    const F low = r * 0.166665201078f + 0.499999934125f;
    const F high = square * 0.00138144670593f + (r * 0.00836878041118f + 0.0416683942109f);
    return r + square * (square * high + low);
  }

  static NM_HD F power_of_two(I n) { return (F)((n + 127) << 23); }
};
template <>
struct Math<Vec<4>> : VectorMath<4> {};
template <>
struct Math<Vec<8>> : VectorMath<8> {};
template <>
struct Math<Vec<16>> : VectorMath<16> {};

template <typename V, typename T>
NM_HD V load(const T* p) {
  if constexpr (std::is_same_v<V, double>) {
    return *p;
  } else if constexpr (std::is_floating_point_v<T>) {
    V v;
    memcpy(&v, p, sizeof(V));
    return v;
  } else {
    using Types = VectorTypes<kLanes<V>>;
    using Bits = typename Types::Bits;
    typename Types::Narrow narrow;
    memcpy(&narrow, p, sizeof(narrow));
    const Bits bits = __builtin_convertvector(narrow, Bits);
    if constexpr (std::is_same_v<T, BFloat16>) {
      return (V)(bits << 16);
    } else {
      const Bits magnitude = bits & 0x7fffu;
      const V normal = (V)((magnitude << 13) + (112u << 23));
      const V special = (V)((magnitude << 13) | 0x7f800000u);
      const V subnormal = __builtin_convertvector((typename Types::Int)magnitude, V) * 0x1p-24f;
      const V value = magnitude < 0x400u ? subnormal : (magnitude >= 0x7c00u ? special : normal);
      return (V)((Bits)value | ((bits & 0x8000u) << 16));
    }
  }
}

// What store() writes for v: values of T, side by side.
template <typename T, typename V>
NM_HD auto as_stored(V v) {
  if constexpr (std::is_floating_point_v<T>) {
    return v;
  } else {
    using Types = VectorTypes<kLanes<V>>;
    using Bits = typename Types::Bits;
    const Bits bits = (Bits)v;
    const Bits magnitude = bits & 0x7fffffffu;
    Bits out;
    if constexpr (std::is_same_v<T, BFloat16>) {  // round to nearest even
      out = magnitude > 0x7f800000u ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    } else {
      const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
      const Bits subnormal = (Bits)((V)magnitude + 0.5f) - 0x3f000000u;  // the addition rounds to multiples of 2^-24
      out = magnitude < 0x38800000u ? subnormal : normal;
      out = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : out;
      out = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : out;
      out |= (bits >> 16) & 0x8000u;
    }
    return __builtin_convertvector(out, typename Types::Narrow);
  }
}

template <typename V, typename T>
NM_HD void store(T* p, V v) {
  const auto stored = as_stored<T>(v);
  memcpy(static_cast<void*>(p), &stored, sizeof(stored));
}

// store() bypassing the caches, for results too large to stay there: it saves reading the line first, a quarter of a
// coupling's traffic. p must be aligned to the vector; call stream_fence() at the end. In assembly, since the
// compiler's builtins belong to one instruction set.
template <typename V, typename T>
NM_HD void stream(T* p, V v) {
  const auto stored = as_stored<T>(v);
#if defined(__x86_64__)
  using Stored = decltype(as_stored<T>(v));
  if constexpr (sizeof(Stored) == 64 || sizeof(Stored) == 32) {
    asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<Stored*>(p)) : "v"(stored));
    return;
  } else if constexpr (sizeof(Stored) == 16) {
    asm("movntps %1, %0" : "=m"(*reinterpret_cast<Stored*>(p)) : "x"(stored));
    return;
  }
#endif
  memcpy(static_cast<void*>(p), &stored, sizeof(stored));
}

inline void stream_fence() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#endif
}

int64_t last_level_cache();  // bytes

// The first n < kLanes<V> values; the other lanes are zero.
template <typename V, typename T>
NM_HD V load_first(const T* p, int64_t n) {
  alignas(64) unsigned char buffer[kLanes<V> * sizeof(T)] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load<V>(reinterpret_cast<const T*>(buffer));
}

template <typename V, typename T>
NM_HD void store_first(T* p, V v, int64_t n) {
  alignas(64) unsigned char buffer[kLanes<V> * sizeof(T)];
  store<V>(reinterpret_cast<T*>(buffer), v);
  memcpy(p, buffer, n * sizeof(T));
}

// Calls f(column, load, store) over [begin, end) in whole vectors and one partial vector at the end, where f may call
// load(pointer) and store(pointer, value), or store(pointer, value, true) to stream.
template <typename V, typename F>
NM_HD void for_columns(int64_t begin, int64_t end, const F& f) {
  int64_t j = begin;
  for (; j + kLanes<V> <= end; j += kLanes<V>)
    f(
        j, [](const auto* p) NM_INLINE { return load<V>(p); },
        [](auto* p, V v, bool streaming = false) NM_INLINE { streaming ? stream<V>(p, v) : store<V>(p, v); });
  if (j < end) {
    const int64_t n = end - j;
    f(
        j, [n](const auto* p) NM_INLINE { return load_first<V>(p, n); },
        [n](auto* p, V v, bool = false) NM_INLINE { store_first<V>(p, v, n); });
  }
}

// The sum of the lanes of a vector of Size bytes, halves upon halves.
template <int Size, typename V>
NM_HD auto halves_sum(V v) {
  using Lane = std::decay_t<decltype(v[0])>;
  if constexpr (Size == 2 * sizeof(Lane)) {
    return Lane(v[0] + v[1]);
  } else {
    typedef Lane Half __attribute__((vector_size(Size / 2)));
    Half low, high;
    memcpy(&low, &v, sizeof(low));
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return halves_sum<Size / 2>(low + high);
  }
}

template <typename V>
NM_HD auto horizontal_sum(V v) {
  if constexpr (std::is_same_v<V, double>)
    return v;
  else
    return halves_sum<sizeof(V)>(v);
}

// Of every block of B lanes, the halves' sum: a's in the lower half of the block, b's in the upper.
template <int B, typename V, int... Lane>
NM_HD V fold_blocks(V a, V b, std::integer_sequence<int, Lane...>) {
  constexpr int L = sizeof...(Lane);
  return __builtin_shufflevector(a, b, (Lane % B < B / 2 ? Lane : L + Lane - B / 2)...) +
         __builtin_shufflevector(a, b, (Lane % B < B / 2 ? Lane + B / 2 : L + Lane)...);
}

// Lane i is the sum of the lanes of v[i]; fewer operations than a horizontal_sum for each.
template <typename V, int B = kLanes<V>>
NM_HD V lanes_sums(V* v) {
  if constexpr (B == 1) {
    return v[0];
  } else {
    for (int i = 0; i < B / 2; ++i)
      v[i] = fold_blocks<B>(v[i], v[i + B / 2], std::make_integer_sequence<int, kLanes<V>>{});
    return lanes_sums<V, B / 2>(v);
  }
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

// The sum of the lanes in double: what they lose by cancelling is not lost twice.
template <typename V>
NM_HD double exact_sum(V v) {
  return horizontal_sum(Doubles<V>::of(v));
}

// The sum over [0, width) of f(column, load, store), a vector of terms: blocks in float, their sums in double.
template <typename V, typename F>
NM_HD double blocked_sum(int64_t width, const F& f) {
  constexpr int64_t kBlock = 16 * kLanes<V>;
  double total = 0;
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    V sum{};
    for_columns<V>(begin, std::min(begin + kBlock, width),
                   [&](int64_t j, const auto& load, const auto& store) NM_INLINE { sum += f(j, load, store); });
    total += exact_sum(sum);
  }
  return total;
}

// Widths are filled up with zeros to whole vectors of any instruction set.
constexpr int64_t kPad = 16;
inline int64_t padded(int64_t width) {
  return (width + kPad - 1) / kPad * kPad;
}

// ---- instruction sets ---------------------------------------------------------------------------------------------

enum class Capability { kBaseline, kAvx2, kAvx512 };
Capability cpu_capability();  // the best this machine has; PyTorch's ATEN_CPU_CAPABILITY lowers it

template <typename V>
struct Lanes {
  using type = V;
};

#if defined(__x86_64__)
template <typename F>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))) void run_avx512(const F& f) {
  f(Lanes<Vec<16>>{});
}
template <typename F>
__attribute__((target("avx2,fma,f16c,bmi2"))) void run_avx2(const F& f) {
  f(Lanes<Vec<8>>{});
}
#endif

// Calls f(Lanes<V>{}) with the widest V for values of type T. f must be an always_inline lambda, so that it is compiled
// for the instruction set of the function above that calls it.
template <typename T, typename F>
void vectorized(const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(Lanes<double>{});
  } else {
#if defined(__x86_64__)
    switch (cpu_capability()) {
      case Capability::kAvx512:
        return run_avx512(f);
      case Capability::kAvx2:
        return run_avx2(f);
      case Capability::kBaseline:
        break;
    }
#endif
    f(Lanes<Vec<4>>{});
  }
}

// ---- tensors and threads ------------------------------------------------------------------------------------------

// Whether to stream the rows a kernel writes: too many for any cache, and aligned for every vector.
template <typename T>
bool should_stream(int64_t rows, int64_t width, Rows<T> out) {
  return rows * width * int64_t(sizeof(T)) > last_level_cache() / 2 &&
         reinterpret_cast<uintptr_t>(out.data) % 64 == 0 && out.stride * sizeof(T) % 64 == 0;
}

// f(begin, end) over [0, rows) on as many threads as the work pays for.
template <typename F>
void parallel_rows(int64_t rows, int64_t work_per_row, const F& f) {
  constexpr int64_t kWork = 16384;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kWork / std::max<int64_t>(1, work_per_row)), f);
}

// out[i] = the sum over the parts, in order, of partial[i * stride + part * part_stride].
template <typename Acc>
void sum_parts(const std::vector<double>& partial, int64_t outputs, int64_t stride, int64_t parts, int64_t part_stride,
               Acc* out) {
  for (int64_t i = 0; i < outputs; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += partial[i * stride + part * part_stride];
    out[i] = Acc(sum);
  }
}

// Sums over rows: one thread sums each chunk, then the chunks are summed in order. The chunks depend on the sizes
// alone, not on the number of threads, so every run gives the same bits.
struct Chunks {
  int64_t total, rows, count;
  Chunks(int64_t total, int64_t at_least, int64_t at_most)
      : total(total),
        rows(std::max<int64_t>(at_least, (total + at_most - 1) / at_most)),
        count((total + rows - 1) / rows) {}
  int64_t begin(int64_t chunk) const { return chunk * rows; }
  int64_t end(int64_t chunk) const { return std::min(total, (chunk + 1) * rows); }
};

}  // namespace normatch
