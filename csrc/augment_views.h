// Augmented views of uint8 images, for both backends. (seed, visit, sample, view) determine a view through
// Philox4x32-10 and integer or separately rounded arithmetic, exactly as in normatch/augment, and its pixels are
// Pillow's. Hence no fused multiply-adds: device code rounds explicitly, host code is built with -ffp-contract=off.
#pragma once

#include <vector>

#include "limits.h"
#include "philox.h"
#include "tensors.h"

namespace normatch {

// Indices into OPS of normatch/augment/policy.py.
enum AugmentOp : int {
  kAutoContrast,
  kBrightness,
  kColor,
  kContrast,
  kEqualize,
  kIdentity,
  kPosterize,
  kRotate,
  kSharpness,
  kShearX,
  kShearY,
  kSolarize,
  kTranslateX,
  kTranslateY,
  kAugmentOps,
};

constexpr int kStrongView = 2;  // View.UNLABELED_STRONG: the only kind with operations and a cutout

// A policy and the image size, passed to kernels by value.
struct ViewPolicy {
  int height, width, num_ops, levels, pool_size, cutout_pixels;
  bool random_sign, reflect, ops_first, cutout_downwards, flip;
  uint8_t fill[3];
  uint8_t pool[kAugmentOps];
  float probability, cutout_fraction;
  float table[kAugmentOps][kMaxLevels];  // value of op at level index; or lo, hi
  float scale[3], shift[3];              // normalized = value * scale - shift
};

struct Box {
  int x0, y0, x1, y1;  // ends included; empty where x1 < x0
};

struct View {
  int row, col;  // of the crop in the padded image
  bool flip;
  int num_ops;  // those that are applied, in order
  int op[kMaxViewOps];
  float value[kMaxViewOps];
  Box box;
};

// ---- arithmetic with explicit rounding
template <typename V>
NM_HD V times(V a, V b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(V) == 4)
    return __fmul_rn(a, b);
  else
    return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
template <typename V>
NM_HD V plus(V a, V b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(V) == 4)
    return __fadd_rn(a, b);
  else
    return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

// ---- random words
NM_HD int below(uint32_t word, int n) {
  return int((uint64_t(word) * uint32_t(n)) >> 32);
}
NM_HD float unit(uint32_t word) {
  return times(float(word >> 8), 0x1p-24f);
}
NM_HD bool coin(uint32_t word) {
  return word >> 31;
}

NM_HD bool is_geometric(int op) {
  return op == kRotate || op == kShearX || op == kShearY || op == kTranslateX || op == kTranslateY;
}

// One axis of the published cutout: shifted at the near edge, cut at the far one, both ends counted.
NM_HD void cutout_ends(float center, float side, int size, int& first, int& last) {
  const float begin = truncf(fmaxf(plus(center, -times(side, 0.5f)), 0.0f));
  const float end = truncf(fminf(plus(begin, side), float(size)));
  first = int(begin);
  last = side > 0 ? int(fminf(end, float(size - 1))) : -1;
}

// draw_parameters of normatch/augment/draws.py for one view; operations that are not applied are left out.
NM_HD View draw_view(const ViewPolicy& p, uint64_t seed, uint32_t sample, uint32_t visit, uint32_t view) {
  View v;
  const Words weak = philox(0, view, sample, visit, seed);
  v.flip = coin(weak.w[0]) && p.flip;
  v.row = below(weak.w[1], 2 * (p.height / 8) + 1);
  v.col = below(weak.w[2], 2 * (p.width / 8) + 1);
  v.num_ops = 0;
  v.box = {0, 0, -1, -1};
  if (view != kStrongView) return v;

  const Words cutout = philox(1, view, sample, visit, seed);
  const float width = float(p.width), height = float(p.height);
  const float side =
      p.cutout_pixels ? float(p.cutout_pixels) : times(times(unit(cutout.w[0]), p.cutout_fraction), width);
  const float ux = unit(cutout.w[1]), uy = unit(cutout.w[2]);
  const float cx = p.cutout_downwards ? plus(width, times(ux, 1 - width)) : times(ux, width);
  const float cy = p.cutout_downwards ? plus(height, times(uy, 1 - height)) : times(uy, height);
  cutout_ends(cx, side, p.width, v.box.x0, v.box.x1);
  cutout_ends(cy, side, p.height, v.box.y0, v.box.y1);

  for (int i = 0; i < p.num_ops; ++i) {
    const Words words = philox(2 + i, view, sample, visit, seed);
    if (!(unit(words.w[2]) < p.probability)) continue;
    const int op = p.pool[below(words.w[0], p.pool_size)];
    if (op == kIdentity) continue;
    float value;
    if (p.levels) {
      value = p.table[op][below(words.w[1], p.levels - 1)];
    } else {
      const float lo = p.table[op][0], hi = p.table[op][1];
      value = plus(lo, times(unit(words.w[1]), hi - lo));
    }
    if (p.random_sign && is_geometric(op) && coin(words.w[3])) value = -value;
    v.op[v.num_ops] = op;
    v.value[v.num_ops++] = value;
  }
  return v;
}

// ---- geometry: output (x, y) reads (a0 x + a1 y + a2, a3 x + a4 y + a5) >> 16, outside is 0
struct Affine {
  int a0, a1, a2, a3, a4, a5;
};

NM_HD int fixed(double v) {
  return int(floor(plus(times(v, 65536.0), 0.5)));
}
NM_HD double rounded15(double v) {
  return rint(times(v, 1e15)) / 1e15;
}

NM_HD Affine affine_of(int op, float value, int height, int width) {
  Affine a = {65536, 0, 32768, 0, 65536, 32768};
  const double v = double(value);
  if (op == kTranslateX) {
    a.a2 += int(floor(plus(v, 0.5))) * 65536;
  } else if (op == kTranslateY) {
    a.a5 += int(floor(plus(v, 0.5))) * 65536;
  } else if (op == kShearX) {
    a.a1 = fixed(v);
    a.a2 = fixed(plus(0.5, times(v, 0.5)));
  } else if (op == kShearY) {
    a.a3 = fixed(v);
    a.a5 = fixed(plus(times(v, 0.5), 0.5));
  } else {
    // As Pillow does it: the angle in [0, 360), the matrix to 15 decimals, about the image's center.
    double degrees = fmod(v, 360.0);
    if (degrees < 0) degrees = plus(degrees, 360.0);
    const double angle = -times(degrees, 3.14159265358979323846 / 180.0);
    const double c = rounded15(cos(angle)), s = rounded15(sin(angle)), minus_s = rounded15(-sin(angle));
    const double cx = width / 2.0, cy = height / 2.0;
    const double tx = plus(plus(times(c, -cx), times(s, -cy)), cx);
    const double ty = plus(plus(times(minus_s, -cx), times(c, -cy)), cy);
    a.a0 = fixed(c);
    a.a1 = fixed(s);
    a.a2 = fixed(plus(plus(tx, times(c, 0.5)), times(s, 0.5)));
    a.a3 = fixed(minus_s);
    a.a4 = fixed(c);
    a.a5 = fixed(plus(plus(ty, times(minus_s, 0.5)), times(c, 0.5)));
  }
  return a;
}

// Column (or row) i of a crop that starts at `start` in the image padded by `pad`: where it is read, -1 for zero.
NM_HD int crop_source(int start, int i, int pad, int size, bool reflect) {
  int at = start + i - pad;
  if (reflect) {
    at = at < 0 ? -at : at;
    return at >= size ? 2 * (size - 1) - at : at;
  }
  return at < 0 || at >= size ? -1 : at;
}

// ---- pixels
NM_HD int luma(int r, int g, int b) {
  return (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16;
}

NM_HD uint8_t blend(int from, int to, float factor) {
  const float mixed = plus(float(from), times(factor, float(to - from)));
  return uint8_t(fminf(fmaxf(mixed, 0.0f), 255.0f));
}

// The mean of 3x3 pixels with weight 5 in the middle, halves up; `sum` holds the nine plus four times the middle.
NM_HD int smoothed(int sum) {
  return (2 * sum + 13) / 26;
}

NM_HD int mean_gray(int64_t luma_sum, int64_t pixels) {
  return int(plus(double(luma_sum) / double(pixels), 0.5));
}

// The operations that map each level of a channel on its own, v in 0..255.
NM_HD uint8_t posterized(int v, float bits) {
  return uint8_t(v & (256 - (1 << (8 - int(bits)))));
}
NM_HD uint8_t solarized(int v, float threshold) {
  return uint8_t(v < int(ceilf(threshold)) ? v : 255 - v);
}

NM_HD uint8_t autocontrasted(int v, int lo, int hi) {
  if (hi <= lo) return uint8_t(v);
  const double scale = 255.0 / (hi - lo);
  const double level = plus(times(double(v), scale), times(double(-lo), scale));
  return uint8_t(level < 0 ? 0.0 : level > 255 ? 255.0 : level);
}

// below: pixels under level v; step: pixels per output level, 0 to keep the channel. Pillow's integer division
// (step / 2 + below) / step by the reciprocal; adding half a pixel keeps the quotient off the integers.
NM_HD uint8_t equalized(int v, int below, int step) {
  if (step == 0) return uint8_t(v);
  const int level = int(times(double(step / 2 + below) + 0.5, 1.0 / step));
  return uint8_t(level < 255 ? level : 255);
}

NM_HD float normalized(int v, float scale, float shift) {
  return plus(times(float(v), scale), -shift);
}

// Reads the lists from encode_policy in normatch/augment/policy.py.
inline ViewPolicy decode_policy(const std::vector<int64_t>& rules, const std::vector<double>& values,
                                const std::vector<double>& scale, const std::vector<double>& shift, int64_t height,
                                int64_t width) {
  ViewPolicy p = {};
  p.height = int(height);
  p.width = int(width);
  p.num_ops = int(rules[0]);
  p.levels = int(rules[1]);
  p.random_sign = rules[2];
  p.reflect = rules[3];
  p.ops_first = rules[4];
  p.cutout_pixels = int(rules[5]);
  p.cutout_downwards = rules[6];
  p.flip = rules[7];
  for (int c = 0; c < 3; ++c) p.fill[c] = uint8_t(rules[8 + c]);
  p.pool_size = int(rules.size()) - 11;
  const int columns = p.levels ? p.levels - 1 : 2;
  STD_TORCH_CHECK(p.num_ops <= kMaxViewOps && p.pool_size <= kAugmentOps && columns <= kMaxLevels &&
                      int(values.size()) == 2 + kAugmentOps * columns && height <= kMaxImageSide &&
                      width <= kMaxImageSide && scale.size() == 3 && shift.size() == 3,
                  "augment_views: not a policy");
  for (int i = 0; i < p.pool_size; ++i) p.pool[i] = uint8_t(rules[11 + i]);
  p.probability = float(values[0]);
  p.cutout_fraction = float(values[1]);
  for (int op = 0; op < kAugmentOps; ++op)
    for (int i = 0; i < columns; ++i) p.table[op][i] = float(values[2 + op * columns + i]);
  for (int c = 0; c < 3; ++c) {
    p.scale[c] = float(scale[c]);
    p.shift[c] = float(shift[c]);
  }
  return p;
}

// A backend's op; Views::make<T> fills `out`.
template <typename Views>
Tensor augment_views(const Tensor& images, const Tensor& draws, int64_t seed, std::vector<int64_t> rules,
                     std::vector<double> values, std::vector<double> scale, std::vector<double> shift,
                     ScalarType dtype) {
  const ViewPolicy p = decode_policy(rules, values, scale, shift, images.size(1), images.size(2));
  const Tensor out = new_tensor(images, {draws.size(0), images.size(1), images.size(2), 3}, dtype);
  if (dtype == ScalarType::Byte) {
    Views::template make<uint8_t>(p, uint64_t(seed), images, draws, out);
  } else {
    dispatch(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr (!std::is_same_v<T, double>) Views::template make<T>(p, uint64_t(seed), images, draws, out);
    });
  }
  return out;
}

}  // namespace normatch
