// Augmented views on the CPU. A view is made in two buffers of the image's size, which stay in the core's
// cache; memory sees one read of the image and one write of the normalised view.
#include "augment_views.h"

#include "cpu.h"

namespace normatch {
namespace {

constexpr int64_t kSlack = 64;  // around a picture: pixels are moved by four bytes, vectors read past both ends

struct Scratch {
  explicit Scratch(const ViewPolicy& p)
      : memory(2 * (int64_t(p.height) * p.width * 3 + 2 * kSlack)),
        now(memory.data() + kSlack),
        next(now + memory.size() / 2),
        columns(p.width),
        map(3 * 256) {}
  void turn() { std::swap(now, next); }

  std::vector<uint8_t> memory;
  uint8_t *now, *next;  // the picture as it stands, and where the next operation puts it
  std::vector<int> columns;
  std::vector<uint8_t> map;
};

template <typename V>
using Narrow = typename VectorTypes<kLanes<V>>::Narrow;

// As many levels as V has lanes, as 16-bit numbers or as V, and back with the fraction cut off. Always in steps
// of a factor of two: a conversion from 8 to 32 bits in one becomes a dozen instructions a level.
template <typename V>
NM_HD Narrow<V> load_narrow(const uint8_t* p) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<V>)));
  Bytes bytes;
  memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Narrow<V>);
}

template <typename V>
NM_HD V widened(Narrow<V> levels) {
  return __builtin_convertvector(__builtin_convertvector(levels, typename VectorTypes<kLanes<V>>::Int), V);
}

template <typename V>
NM_HD V load_levels(const uint8_t* p) {
  return widened<V>(load_narrow<V>(p));
}

template <typename V>
NM_HD void store_levels(uint8_t* p, V v) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<V>)));
  const auto whole = __builtin_convertvector(v, typename VectorTypes<kLanes<V>>::Int);
  const auto narrow = __builtin_convertvector(whole, Narrow<V>);
  const Bytes bytes = __builtin_convertvector(narrow, Bytes);
  memcpy(p, &bytes, sizeof(bytes));
}

template <typename V>
NM_HD V cut_fraction(V v) {
  return __builtin_convertvector(__builtin_convertvector(v, typename VectorTypes<kLanes<V>>::Int), V);
}

template <typename V>
NM_HD V blend_levels(V from, V to, float factor) {
  const V mixed = from + factor * (to - from);
  const V floored = mixed < 0.0f ? V{} : mixed;
  return floored > 255.0f ? V{} + 255.0f : floored;
}

NM_HD void copy_pixel(uint8_t* out, const uint8_t* in) {
  uint32_t four;
  memcpy(&four, in, 4);
  memcpy(out, &four, 4);
}

// The crop (mirrored or not) of `in` into `out`, which has room for one byte more.
void crop(const ViewPolicy& p, const View& v, const uint8_t* in, Scratch& s, uint8_t* out) {
  const int h = p.height, w = p.width;
  const int64_t pitch = 3 * int64_t(w);
  // The stretch of columns that needs no reflecting is one copy.
  int first = 0, last = -1;
  for (int x = 0; x < w; ++x) {
    const int at = crop_source(v.col, x, w / 8, w, p.reflect);
    s.columns[x] = at < 0 ? -1 : 3 * (v.flip ? w - 1 - at : at);
    const int straight = v.col + x - w / 8;
    if (straight >= 0 && straight < w) {
      if (last < 0) first = x;
      last = x;
    }
  }
  for (int y = 0; y < h; ++y, out += pitch) {
    const int at = crop_source(v.row, y, h / 8, h, p.reflect);
    if (at < 0) {
      memset(out, 0, pitch);
      continue;
    }
    const uint8_t* row = in + at * pitch;
    const bool whole = !v.flip;
    const auto pixels = [&](int begin, int end) {
      for (int x = begin; x < end; ++x) {
        const int column = s.columns[x];
        uint8_t* to = out + 3 * x;
        if (column < 0) {
          to[0] = to[1] = to[2] = 0;
        } else {
          memcpy(to, row + column, 3);
        }
      }
    };
    if (whole) {
      pixels(0, first);
      memcpy(out + 3 * first, row + s.columns[first], 3 * (last + 1 - first));
      pixels(last + 1, w);
    } else if (at + 1 < h) {  // reads one byte of the next row
      for (int x = 0; x < w; ++x) {
        const int column = s.columns[x];
        if (column < 0) {
          memset(out + 3 * x, 0, 4);
        } else {
          copy_pixel(out + 3 * x, row + column);
        }
      }
    } else {
      pixels(0, w);
    }
  }
}

// in has kSlack readable bytes behind it, out as many writable ones.
void transform(const Affine& a, int h, int w, const uint8_t* in, uint8_t* out) {
  const int64_t pitch = 3 * int64_t(w);
  for (int y = 0; y < h; ++y, out += pitch) {
    const int x_row = a.a2 + y * a.a1, y_row = a.a5 + y * a.a4;
    const auto inside = [&](int x) {
      return unsigned((x_row + x * a.a0) >> 16) < unsigned(w) && unsigned((y_row + x * a.a3) >> 16) < unsigned(h);
    };
    int begin = 0, end = w;  // what is read lies on a line, so the pixels inside are consecutive
    while (begin < w && !inside(begin)) ++begin;
    while (end > begin && !inside(end - 1)) --end;
    memset(out, 0, 3 * begin);
    if (a.a0 == 65536 && a.a3 == 0) {
      if (end > begin)
        memcpy(out + 3 * begin, in + (y_row >> 16) * pitch + 3 * ((x_row >> 16) + begin), 3 * (end - begin));
    } else {
      for (int x = begin; x < end; ++x)
        copy_pixel(out + 3 * x, in + ((y_row + x * a.a3) >> 16) * pitch + 3 * int64_t((x_row + x * a.a0) >> 16));
    }
    memset(out + 3 * end, 0, 3 * (w - end));
  }
}

int64_t sum_of_luma(const uint8_t* image, int64_t pixels);

void count_levels(const uint8_t* image, int64_t pixels, int counts[3][256]) {
  memset(counts, 0, 3 * 256 * sizeof(int));
  for (int64_t i = 0; i < pixels; ++i)
    for (int c = 0; c < 3; ++c) ++counts[c][image[3 * i + c]];
}

// Level -> new level, for the operations that need nothing else than the channel's histogram or the mean.
void level_map(int op, float value, const uint8_t* image, int64_t pixels, uint8_t* map) {
  if (op == kAutoContrast || op == kEqualize) {
    int counts[3][256];
    count_levels(image, pixels, counts);
    for (int c = 0; c < 3; ++c) {
      int lo = 0, hi = 255;
      while (counts[c][lo] == 0) ++lo;
      while (counts[c][hi] == 0) --hi;
      if (op == kAutoContrast) {
        for (int v = 0; v < 256; ++v) map[256 * c + v] = autocontrasted(v, lo, hi);
        continue;
      }
      const int step = hi > lo ? int((pixels - counts[c][hi]) / 255) : 0;
      for (int v = 0, under = 0; v < 256; under += counts[c][v++]) map[256 * c + v] = equalized(v, under, step);
    }
    return;
  }
  int gray = 0;
  if (op == kContrast) {
    gray = mean_gray(sum_of_luma(image, pixels), pixels);
  }
  for (int v = 0; v < 256; ++v) {
    map[v] = op == kPosterize  ? posterized(v, value)
             : op == kSolarize ? solarized(v, value)
                               : blend(gray, v, value);  // Brightness: towards black
  }
  memcpy(map + 256, map, 256);
  memcpy(map + 512, map, 256);
}

void map_levels(uint8_t* image, int64_t pixels, const uint8_t* map) {
  for (int64_t i = 0; i < pixels; ++i) {
    image[3 * i] = map[image[3 * i]];
    image[3 * i + 1] = map[256 + image[3 * i + 1]];
    image[3 * i + 2] = map[512 + image[3 * i + 2]];
  }
}

// The luma of every level's pixel, where the levels of the three channels alternate: the level itself and its four
// neighbours, weighted by where in the pixel it stands. All sums are below 2^24, hence exact in float32.
template <typename V>
struct Luma {
  explicit NM_INLINE Luma(bool first_channel_only) {
    for (int i = 0; i < 3 * kLanes<V>; ++i)
      for (int tap = 0; tap < 5; ++tap) {
        const int channel = i % 3 + tap - 2;  // of the level this tap reads
        const bool counts = channel >= 0 && channel < 3 && !(first_channel_only && i % 3);
        weight[tap][i] = !counts ? 0.0f : channel == 0 ? 19595.0f : channel == 1 ? 38470.0f : 7471.0f;
      }
  }
  // j: position in a run of three vectors
  NM_INLINE V at(const uint8_t* p, int j) const {
    V sum = V{} + 32768.0f;
    for (int tap = 0; tap < 5; ++tap) sum += load_levels<V>(p + tap - 2) * load<V>(weight[tap] + j);
    return cut_fraction(sum * 0x1p-16f);
  }
  float weight[5][3 * kLanes<V>];
};

int64_t sum_of_luma(const uint8_t* image, int64_t pixels) {
  int64_t total = 0;
  vectorised<float>([&](auto lanes) NM_INLINE {
    using V = typename decltype(lanes)::type;
    constexpr int64_t kRun = 3 * kLanes<V>;
    const Luma<V> luma_of(true);
    int64_t i = 0;
    for (; i + kRun <= 3 * pixels; i += kRun) {
      V sum{};
      for (int j = 0; j < kRun; j += kLanes<V>) sum += luma_of.at(image + i + j, j);
      total += int64_t(horizontal_sum(sum));
    }
    for (; i < 3 * pixels; i += 3) total += luma(image[i], image[i + 1], image[i + 2]);
  });
  return total;
}

void color(const uint8_t* in, int64_t pixels, float factor, uint8_t* out) {
  vectorised<float>([&](auto lanes) NM_INLINE {
    using V = typename decltype(lanes)::type;
    constexpr int64_t kRun = 3 * kLanes<V>;
    const Luma<V> luma_of(false);
    int64_t i = 0;
    for (; i + kRun <= 3 * pixels; i += kRun)
      for (int j = 0; j < kRun; j += kLanes<V>)
        store_levels<V>(out + i + j, blend_levels<V>(luma_of.at(in + i + j, j), load_levels<V>(in + i + j), factor));
    for (; i < 3 * pixels; i += 3) {
      const int gray = luma(in[i], in[i + 1], in[i + 2]);
      for (int c = 0; c < 3; ++c) out[i + c] = blend(gray, in[i + c], factor);
    }
  });
}

void sharpness(const uint8_t* in, int h, int w, float factor, uint8_t* out) {
  const int64_t pitch = 3 * int64_t(w);
  memcpy(out, in, h * pitch);
  if (h < 3 || w < 3) return;  // all border, which is kept
  vectorised<float>([&](auto lanes) NM_INLINE {
    using V = typename decltype(lanes)::type;
    for (int y = 1; y < h - 1; ++y) {
      const uint8_t* middle = in + y * pitch;
      uint8_t* to = out + y * pitch;
      int64_t i = 3;
      for (; i + kLanes<V> <= pitch - 3; i += kLanes<V>) {
        const auto level = load_narrow<V>(middle + i);
        auto sum = level * uint16_t(4);
        for (int64_t row = -pitch; row <= pitch; row += pitch)
          for (int column = -3; column <= 3; column += 3) sum += load_narrow<V>(middle + i + row + column);
        // smoothed() in float32: sums are below 4,096, and no other multiple of 1/26 is near a whole number
        const V smooth = cut_fraction((2.0f * widened<V>(sum) + 13.0f) * (1.0f / 26.0f) + 0.01f);
        store_levels<V>(to + i, blend_levels<V>(smooth, widened<V>(level), factor));
      }
      for (; i < pitch - 3; ++i) {
        int sum = 4 * middle[i];
        for (int64_t row = -pitch; row <= pitch; row += pitch)
          for (int column = -3; column <= 3; column += 3) sum += middle[i + row + column];
        to[i] = blend(smoothed(sum), middle[i], factor);
      }
    }
  });
}

// Applies the operations and the cutout to s.now.
void operate(const ViewPolicy& p, const View& v, Scratch& s) {
  const int h = p.height, w = p.width;
  const int64_t pixels = int64_t(h) * w;
  for (int i = 0; i < v.num_ops; ++i) {
    const int op = v.op[i];
    if (is_geometric(op)) {
      transform(affine_of(op, v.value[i], h, w), h, w, s.now, s.next);
      s.turn();
    } else if (op == kSharpness) {
      sharpness(s.now, h, w, v.value[i], s.next);
      s.turn();
    } else if (op == kColor) {
      color(s.now, pixels, v.value[i], s.next);
      s.turn();
    } else {
      level_map(op, v.value[i], s.now, pixels, s.map.data());
      map_levels(s.now, pixels, s.map.data());
    }
  }
  for (int y = v.box.y0; y <= v.box.y1; ++y)
    for (int x = v.box.x0; x <= v.box.x1; ++x) memcpy(s.now + 3 * (int64_t(y) * w + x), p.fill, 3);
}

template <typename T>
void write(const ViewPolicy& p, const uint8_t* in, T* out) {
  const int64_t length = 3 * int64_t(p.height) * p.width;
  if constexpr (std::is_same_v<T, uint8_t>) {
    memcpy(out, in, length);
  } else {
    vectorised<T>([&](auto lanes) NM_INLINE {
      using V = typename decltype(lanes)::type;
      constexpr int kWidth = kLanes<V>;
      float scale[3 * kWidth], shift[3 * kWidth];  // of three vectors in a row the channels repeat
      for (int i = 0; i < 3 * kWidth; ++i) {
        scale[i] = p.scale[i % 3];
        shift[i] = p.shift[i % 3];
      }
      int64_t i = 0;
      for (; i + 3 * kWidth <= length; i += 3 * kWidth) {
        for (int j = 0; j < 3 * kWidth; j += kWidth) {
          store<V>(out + i + j, load_levels<V>(in + i + j) * load<V>(scale + j) - load<V>(shift + j));
        }
      }
      for (; i < length; ++i) out[i] = T(normalized(in[i], p.scale[i % 3], p.shift[i % 3]));
    });
  }
}

template <typename T>
void make_views(const ViewPolicy& p, uint64_t seed, const uint8_t* images, int64_t rows, const int64_t* draws,
                int64_t count, T* out) {
  const int64_t size = 3 * int64_t(p.height) * p.width;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, 16384 / size), [&](int64_t begin, int64_t end) {
    Scratch s(p);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t* draw = draws + 4 * n;
      if (n + 1 < end && draw[4] >= 0 && draw[4] < rows)
        for (int64_t i = 0; i < std::min<int64_t>(size, 4096); i += 64) __builtin_prefetch(images + draw[4] * size + i);
      STD_TORCH_CHECK(draw[0] >= 0 && draw[0] < rows, "augment_views: there is no such image");
      const uint8_t* image = images + draw[0] * size;
      const View v = draw_view(p, seed, uint32_t(draw[1]), uint32_t(draw[2]), uint32_t(draw[3]));
      if (p.ops_first && draw[3] == kStrongView) {
        memcpy(s.now, image, size);
        operate(p, v, s);
        crop(p, v, s.now, s, s.next);
        s.turn();
      } else {
        crop(p, v, image, s, s.now);
        operate(p, v, s);
      }
      write(p, s.now, out + n * size);
    }
  });
}

Tensor augment_views(const Tensor& images, const Tensor& draws, int64_t seed, std::vector<int64_t> rules,
                     std::vector<double> values, std::vector<double> scale, std::vector<double> shift,
                     ScalarType dtype) {
  const int64_t count = draws.size(0), height = images.size(1), width = images.size(2);
  const ViewPolicy p = decode_policy(rules, values, scale, shift, height, width);
  const Tensor out = new_tensor(images, {count, height, width, 3}, dtype);
  const uint8_t* from = images.const_data_ptr<uint8_t>();
  const int64_t* lines = draws.const_data_ptr<int64_t>();
  if (dtype == ScalarType::Byte) {
    make_views(p, uint64_t(seed), from, images.size(0), lines, count, out.mutable_data_ptr<uint8_t>());
  } else {
    dispatch(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr (!std::is_same_v<T, double>)
        make_views(p, uint64_t(seed), from, images.size(0), lines, count, out.mutable_data_ptr<T>());
    });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normatch, CPU, m) {
  m.impl("augment_views", TORCH_BOX(&augment_views));
}

}  // namespace normatch
