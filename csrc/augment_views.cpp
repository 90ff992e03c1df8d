// Augmented views on the CPU, in two buffers of the image's size that stay in cache: one read of the image and one
// write of the normalized view.
#include "augment_views.h"

#include "cpu.h"

namespace normatch {
namespace {

constexpr int64_t kSlack = 64;  // around a picture or a row: vectors read and write past both ends

struct Scratch {
  explicit Scratch(const ViewPolicy& p)
      : memory(2 * (int64_t(p.height) * p.width * 3 + 2 * kSlack)),
        now(memory.data() + kSlack),
        next(now + memory.size() / 2),
        row(3 * p.width + 2 * kSlack),
        offsets(p.width + kSlack),
        sums(3 * p.width + kSlack),
        map(3 * 256) {}
  void turn() { std::swap(now, next); }

  std::vector<uint8_t> memory;
  uint8_t *now, *next;  // the picture as it stands, and where the next operation puts it
  std::vector<uint8_t> row;
  std::vector<int32_t> offsets;
  std::vector<uint16_t> sums;
  std::vector<uint8_t> map;
};

template <typename V>
using Narrow = typename VectorTypes<kLanes<V>>::Narrow;

// One level per lane of V, as 16-bit integers or as V, and back, truncated. In steps of a factor of two, since a direct
// conversion from 8 to 32 bits takes a dozen instructions per level.
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

// Constant rearrangements of a vector's bytes or 32-bit lanes: out[i] = v[m[i]].
template <typename B>
NM_HD B rearranged(B v, B m) {
#ifdef __clang__
  B out;
  for (unsigned i = 0; i < sizeof(B) / sizeof(v[0]); ++i) out[i] = v[m[i]];
  return out;
#else
  return __builtin_shuffle(v, m);
#endif
}

// L pixels as 32-bit integers: red, green << 8, blue << 16; the top byte is arbitrary. Loads and stores run L bytes
// past the end. Four pixels move between 12 and 16 bytes by whole words first, then within 16 bytes: one shuffle each.
template <int L>
struct Pixels {
  using Int = typename VectorTypes<L>::Int;
  typedef uint8_t Bytes __attribute__((vector_size(4 * L)));

  static NM_HD Int load(const uint8_t* p) {
    Int words;
    memcpy(&words, p, sizeof(words));
    words = rearranged(words, spread_words(std::make_integer_sequence<int, L>()));
    return (Int)rearranged((Bytes)words, spread_bytes(std::make_integer_sequence<int, 4 * L>()));
  }
  static NM_HD void store(uint8_t* p, Int pixels) {
    const Bytes bytes = rearranged((Bytes)pixels, close_bytes(std::make_integer_sequence<int, 4 * L>()));
    const Int words = rearranged((Int)bytes, close_words(std::make_integer_sequence<int, L>()));
    memcpy(p, &words, sizeof(words));
  }
  static NM_HD Int luma(Int pixel) {
    return ((pixel & 255) * 19595 + ((pixel >> 8) & 255) * 38470 + ((pixel >> 16) & 255) * 7471 + 0x8000) >> 16;
  }

 private:
  template <int... I>
  static NM_HD Int spread_words(std::integer_sequence<int, I...>) {
    return Int{(I / 4 * 3 + I % 4)...};
  }
  template <int... I>
  static NM_HD Bytes spread_bytes(std::integer_sequence<int, I...>) {
    return Bytes{uint8_t(I / 16 * 16 + I % 16 / 4 * 3 + I % 4)...};
  }
  template <int... I>
  static NM_HD Bytes close_bytes(std::integer_sequence<int, I...>) {
    return Bytes{uint8_t(I / 16 * 16 + (I % 16 < 12 ? I % 16 / 3 * 4 + I % 16 % 3 : 3))...};
  }
  template <int... I>
  static NM_HD Int close_words(std::integer_sequence<int, I...>) {
    return Int{(I < 3 * L / 4 ? I / 3 * 4 + I % 3 : I)...};
  }
};

// Reverses the `width` pixels before `end`. Reads and writes up to 16 bytes too far.
void mirror(const uint8_t* end, int width, uint8_t* out) {
  vectorized<uint8_t>([&](auto) NM_INLINE {
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    const Bytes mirrored = {13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, 0};
    for (int x = 0; x < width; x += 5, end -= 15, out += 15) {
      Bytes five;
      memcpy(&five, end - 16, 16);
      five = rearranged(five, mirrored);
      memcpy(out, &five, 16);
    }
  });
}

// The crop (mirrored or not) of `in` into `out`. A mirrored crop is the mirror image of the crop from the other side.
void crop(const ViewPolicy& p, const View& v, const uint8_t* in, Scratch& s, uint8_t* out) {
  const int h = p.height, w = p.width, pad = w / 8;
  const int64_t pitch = 3 * int64_t(w);
  const int col = v.flip ? 2 * pad - v.col : v.col;
  const int first = std::max(0, pad - col), last = std::min(w, w + pad - col);  // what needs no reflecting is one copy
  for (int y = 0; y < h; ++y, out += pitch) {
    const int at = crop_source(v.row, y, h / 8, h, p.reflect);
    if (at < 0) {
      memset(out, 0, pitch);
      continue;
    }
    const uint8_t* row = in + at * pitch;
    uint8_t* to = v.flip ? s.row.data() + kSlack : out;
    const auto pixels = [&](int begin, int end) {
      for (int x = begin; x < end; ++x) {
        const int column = crop_source(col, x, pad, w, p.reflect);
        if (column < 0) {
          memset(to + 3 * x, 0, 3);
        } else {
          memcpy(to + 3 * x, row + 3 * column, 3);
        }
      }
    };
    pixels(0, first);
    memcpy(to + 3 * first, row + 3 * (col + first - pad), 3 * (last - first));
    pixels(last, w);
    if (v.flip) mirror(to + pitch, w, out);
  }
}

// in has kSlack readable bytes behind it, out as many writable ones.
void transform(const Affine& a, int h, int w, const uint8_t* in, Scratch& s, uint8_t* out) {
  const int pitch = 3 * w;
  int32_t* offsets = s.offsets.data();
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
      vectorized<int32_t>([&](auto lanes) NM_INLINE {
        using Int = typename VectorTypes<kLanes<typename decltype(lanes)::type>>::Int;
        constexpr int kWidth = kLanes<typename decltype(lanes)::type>;
        Int x;
        for (int i = 0; i < kWidth; ++i) x[i] = i;
        for (int i = begin; i < end; i += kWidth) {
          const Int at = ((y_row + (x + i) * a.a3) >> 16) * pitch + ((x_row + (x + i) * a.a0) >> 16) * 3;
          memcpy(offsets + i, &at, sizeof(at));
        }
      });
      for (int x = begin; x < end; ++x) memcpy(out + 3 * x, in + offsets[x], 4);
    }
    memset(out + 3 * end, 0, 3 * (w - end));
  }
}

// Odd pixels have separate counters: neighbors are often equal, and one increment would wait for the other.
void count_levels(const uint8_t* image, int64_t pixels, int counts[3][256]) {
  int odd[3][256] = {};
  memset(counts, 0, 3 * 256 * sizeof(int));
  int64_t i = 0;
  for (; i + 2 <= pixels; i += 2, image += 6)
    for (int c = 0; c < 3; ++c) {
      ++counts[c][image[c]];
      ++odd[c][image[3 + c]];
    }
  for (int c = 0; c < 3; ++c) {
    if (i < pixels) ++counts[c][image[c]];
    for (int v = 0; v < 256; ++v) counts[c][v] += odd[c][v];
  }
}

void lowest_and_highest(const uint8_t* image, int64_t levels, int lo[3], int hi[3]) {
  constexpr int kRun = 96;  // a multiple of three, in which a loop of bytes is a few vectors
  uint8_t least[kRun], most[kRun];
  for (int j = 0; j < kRun; ++j) least[j] = most[j] = image[j % 3];
  int64_t i = 0;
  const auto take = [&](int j) NM_INLINE {
    const uint8_t v = image[i + j];
    least[j] = v < least[j] ? v : least[j];
    most[j] = v > most[j] ? v : most[j];
  };
  for (; i + kRun <= levels; i += kRun)
    for (int j = 0; j < kRun; ++j) take(j);
  for (int j = 0; i + j < levels; ++j) take(j);
  for (int c = 0; c < 3; ++c) {
    lo[c] = least[c];
    hi[c] = most[c];
    for (int j = c; j < kRun; j += 3) {
      lo[c] = std::min<int>(lo[c], least[j]);
      hi[c] = std::max<int>(hi[c], most[j]);
    }
  }
}

// Level -> new level of each channel, for the operations that need its histogram. Only levels that occur are mapped.
void level_map(int op, const uint8_t* image, int64_t pixels, uint8_t* map) {
  if (op == kAutoContrast) {
    int lo[3], hi[3];
    lowest_and_highest(image, 3 * pixels, lo, hi);
    for (int c = 0; c < 3; ++c)
      for (int v = lo[c]; v <= hi[c]; ++v) map[256 * c + v] = autocontrasted(v, lo[c], hi[c]);
  } else {
    int counts[3][256];
    count_levels(image, pixels, counts);
    for (int c = 0; c < 3; ++c) {
      int hi = 255;
      while (counts[c][hi] == 0) --hi;
      const int step = int((pixels - counts[c][hi]) / 255);  // 0 too where there is one level only
      for (int v = 0, under = 0; v <= hi; under += counts[c][v++]) map[256 * c + v] = equalized(v, under, step);
    }
  }
}

void map_levels(uint8_t* image, int64_t pixels, const uint8_t* map) {
  for (int64_t i = 0; i < pixels; ++i) {
    image[3 * i] = map[image[3 * i]];
    image[3 * i + 1] = map[256 + image[3 * i + 1]];
    image[3 * i + 2] = map[512 + image[3 * i + 2]];
  }
}

// Blends every level with one gray: black for brightness, the mean for contrast.
void blend_with(int gray, const uint8_t* in, int64_t levels, float factor, uint8_t* out) {
  vectorized<float>([&](auto lanes) NM_INLINE {
    using V = typename decltype(lanes)::type;
    const V back = V{} + float(gray);
    int64_t i = 0;
    for (; i + kLanes<V> <= levels; i += kLanes<V>)
      store_levels<V>(out + i, blend_levels<V>(back, load_levels<V>(in + i), factor));
    for (; i < levels; ++i) out[i] = blend(gray, in[i], factor);
  });
}

int64_t sum_of_luma(const uint8_t* image, int64_t pixels) {
  int64_t total = 0;
  vectorized<float>([&](auto lanes) NM_INLINE {
    constexpr int kWidth = kLanes<typename decltype(lanes)::type>;
    using P = Pixels<kWidth>;
    typename P::Int sum{};  // at most 2,048^2 / 4 pixels of 255 a lane
    int64_t i = 0;
    for (; i + kWidth <= pixels; i += kWidth) sum += P::luma(P::load(image + 3 * i));
    for (int lane = 0; lane < kWidth; ++lane) total += sum[lane];
    for (; i < pixels; ++i) total += luma(image[3 * i], image[3 * i + 1], image[3 * i + 2]);
  });
  return total;
}

void color(const uint8_t* in, int64_t pixels, float factor, uint8_t* out) {
  vectorized<float>([&](auto lanes) NM_INLINE {
    using V = typename decltype(lanes)::type;
    using P = Pixels<kLanes<V>>;
    using Int = typename P::Int;
    // Whole vectors to the end: the excess lies in the slack.
    for (int64_t i = 0; i < pixels; i += kLanes<V>) {
      const Int pixel = P::load(in + 3 * i);
      const V gray = __builtin_convertvector(P::luma(pixel), V);
      Int made{};
      for (int c = 0; c < 3; ++c) {
        const V level = __builtin_convertvector((pixel >> (8 * c)) & 255, V);
        made |= __builtin_convertvector(blend_levels<V>(gray, level, factor), Int) << (8 * c);
      }
      P::store(out + 3 * i, made);
    }
  });
}

void sharpness(const uint8_t* in, int h, int w, float factor, Scratch& s, uint8_t* out) {
  const int pitch = 3 * w;
  memcpy(out, in, pitch);          // the border is kept
  uint16_t* sums = s.sums.data();  // of three levels above each other
  vectorized<float>([&](auto lanes) NM_INLINE {
    using V = typename decltype(lanes)::type;
    using Sums = Narrow<V>;
    constexpr int kWidth = kLanes<V>;
    for (int y = 1; y < h - 1; ++y) {
      const uint8_t* middle = in + int64_t(y) * pitch;
      uint8_t* to = out + int64_t(y) * pitch;
      for (int i = 0; i < pitch; i += kWidth) {
        const Sums sum =
            load_narrow<V>(middle - pitch + i) + load_narrow<V>(middle + i) + load_narrow<V>(middle + pitch + i);
        memcpy(sums + i, &sum, sizeof(sum));
      }
      for (int i = 3; i < pitch - 3; i += kWidth) {
        const Sums level = load_narrow<V>(middle + i);
        Sums left, here, right;
        memcpy(&left, sums + i - 3, sizeof(left));
        memcpy(&here, sums + i, sizeof(here));
        memcpy(&right, sums + i + 3, sizeof(right));
        // smoothed() in float32: sums are below 4,096, and no other multiple of 1/26 is near a whole number
        const V sum = widened<V>(left + here + right + level * uint16_t(4));
        const V smooth = cut_fraction((2.0f * sum + 13.0f) * (1.0f / 26.0f) + 0.01f);
        store_levels<V>(to + i, blend_levels<V>(smooth, widened<V>(level), factor));
      }
      memcpy(to, middle, 3);
      memcpy(to + pitch - 3, middle + pitch - 3, 3);
    }
  });
  memcpy(out + int64_t(h - 1) * pitch, in + int64_t(h - 1) * pitch, pitch);  // last: vectors wrote too far
}

// Applies the operations and the cutout to s.now.
void operate(const ViewPolicy& p, const View& v, Scratch& s) {
  const int h = p.height, w = p.width;
  const int64_t pixels = int64_t(h) * w, levels = 3 * pixels;
  for (int i = 0; i < v.num_ops; ++i) {
    const int op = v.op[i];
    const float value = v.value[i];
    uint8_t* const now = s.now;
    if (is_geometric(op)) {
      transform(affine_of(op, value, h, w), h, w, now, s, s.next);
      s.turn();
    } else if (op == kSharpness) {
      sharpness(now, h, w, value, s, s.next);
      s.turn();
    } else if (op == kColor) {
      color(now, pixels, value, s.next);
      s.turn();
    } else if (op == kBrightness || op == kContrast) {
      const int gray = op == kContrast ? mean_gray(sum_of_luma(now, pixels), pixels) : 0;
      blend_with(gray, now, levels, value, now);
    } else if (op == kPosterize) {
      for (int64_t j = 0; j < levels; ++j) now[j] = posterized(now[j], value);
    } else if (op == kSolarize) {
      for (int64_t j = 0; j < levels; ++j) now[j] = solarized(now[j], value);
    } else {
      level_map(op, now, pixels, s.map.data());
      map_levels(now, pixels, s.map.data());
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
    vectorized<T>([&](auto lanes) NM_INLINE {
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

struct Views {
  template <typename T>
  static void make(const ViewPolicy& p, uint64_t seed, const Tensor& all_images, const Tensor& all_draws,
                   const Tensor& all_views) {
    const int64_t size = 3 * int64_t(p.height) * p.width, rows = all_images.size(0), count = all_draws.size(0);
    const uint8_t* const images = all_images.const_data_ptr<uint8_t>();
    const int64_t* const draws = all_draws.const_data_ptr<int64_t>();
    T* const out = all_views.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, 16384 / size), [&](int64_t begin, int64_t end) {
      Scratch s(p);
      for (int64_t n = begin; n < end; ++n) {
        const int64_t* draw = draws + 4 * n;
        if (n + 1 < end && draw[4] >= 0 && draw[4] < rows)
          for (int64_t i = 0; i < std::min<int64_t>(size, 4096); i += 64)
            __builtin_prefetch(images + draw[4] * size + i);
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
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normatch, CPU, m) {
  m.impl("augment_views", TORCH_BOX(&augment_views<Views>));
}

}  // namespace normatch
