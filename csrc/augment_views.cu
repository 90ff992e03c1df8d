// Augmented views on the GPU, one block per view. The picture and its successor are in shared memory (in a workspace if
// too large), so global memory sees one read of the image and one write of the normalized view: per pixel 3 bytes in
// and 6 (bf16) or 12 (fp32) out. Thread 0 draws the view. All sums are of integers, hence the same in any order.
#include "augment_views.h"

#include <algorithm>

#include "cuda.h"

namespace normatch {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSharedLimit = 96 * 1024;

// What a block shares besides the pictures.
struct Shared {
  View view;
  Affine affine;
  int counts[3][256];
  uint8_t map[3][256];
  int luma_sum;
};

__device__ void crop_pass(const ViewPolicy& p, const View& v, const uint8_t* in, uint8_t* out) {
  const int w = p.width, pixels = p.height * w;
  for (int i = threadIdx.x; i < pixels; i += kThreads) {
    const int y = crop_source(v.row, i / w, p.height / 8, p.height, p.reflect);
    const int x = crop_source(v.col, i % w, w / 8, w, p.reflect);
    const bool outside = x < 0 || y < 0;
    const uint8_t* from = in + 3 * (int64_t(outside ? 0 : y) * w + (outside ? 0 : v.flip ? w - 1 - x : x));
    for (int c = 0; c < 3; ++c) out[3 * i + c] = outside ? uint8_t(0) : from[c];
  }
}

__device__ void affine_pass(const Affine& a, int h, int w, const uint8_t* in, uint8_t* out) {
  for (int i = threadIdx.x; i < h * w; i += kThreads) {
    const int x = i % w, y = i / w;
    const int from_x = (a.a2 + y * a.a1 + x * a.a0) >> 16, from_y = (a.a5 + y * a.a4 + x * a.a3) >> 16;
    const bool inside = unsigned(from_x) < unsigned(w) && unsigned(from_y) < unsigned(h);
    const uint8_t* from = in + 3 * (inside ? from_y * w + from_x : 0);
    for (int c = 0; c < 3; ++c) out[3 * i + c] = inside ? from[c] : uint8_t(0);
  }
}

__device__ void color_pass(int pixels, float factor, uint8_t* image) {
  for (int i = threadIdx.x; i < pixels; i += kThreads) {
    uint8_t* p = image + 3 * i;
    const int gray = luma(p[0], p[1], p[2]);
    for (int c = 0; c < 3; ++c) p[c] = blend(gray, p[c], factor);
  }
}

__device__ void sharpness_pass(int h, int w, float factor, const uint8_t* in, uint8_t* out) {
  const int pitch = 3 * w;
  for (int i = threadIdx.x; i < h * pitch; i += kThreads) {
    const int x = i % pitch, y = i / pitch;
    const bool border = y == 0 || y == h - 1 || x < 3 || x >= pitch - 3;
    int sum = 4 * in[i];
    if (!border)
      for (int row = -pitch; row <= pitch; row += pitch)
        for (int column = -3; column <= 3; column += 3) sum += in[i + row + column];
    out[i] = border ? in[i] : blend(smoothed(sum), in[i], factor);
  }
}

// Fills s.map with the new level of each level, for the operations that map a channel's levels on their own.
__device__ void level_map(int op, float value, int pixels, const uint8_t* image, Shared& s) {
  if (op == kAutoContrast || op == kEqualize) {
    for (int i = threadIdx.x; i < 3 * 256; i += kThreads) s.counts[i / 256][i % 256] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * pixels; i += kThreads) atomicAdd(&s.counts[i % 3][image[i]], 1);
    __syncthreads();
    // A warp a channel, eight levels a lane.
    const int channel = threadIdx.x / kLanesOfWarp, lane = threadIdx.x % kLanesOfWarp;
    if (channel < 3) {
      constexpr int kEach = 256 / kLanesOfWarp;
      int counts[kEach], sum = 0, lo = 255, hi = 0;
      for (int i = 0; i < kEach; ++i) {
        const int level = lane * kEach + i;
        counts[i] = s.counts[channel][level];
        sum += counts[i];
        if (counts[i]) {
          hi = level;
          if (lo == 255) lo = level;
        }
      }
      for (int offset = kLanesOfWarp / 2; offset > 0; offset /= 2) {
        lo = min(lo, __shfl_xor_sync(kFullWarp, lo, offset));
        hi = max(hi, __shfl_xor_sync(kFullWarp, hi, offset));
      }
      int before = sum;  // inclusive sum over the lanes, then exclusive
      for (int offset = 1; offset < kLanesOfWarp; offset *= 2) {
        const int lower = __shfl_up_sync(kFullWarp, before, offset);
        if (lane >= offset) before += lower;
      }
      before -= sum;
      const int step = hi > lo ? (pixels - s.counts[channel][hi]) / 255 : 0;
      for (int i = 0; i < kEach; ++i) {
        const int level = lane * kEach + i;
        s.map[channel][level] = op == kEqualize ? equalized(level, before, step) : autocontrasted(level, lo, hi);
        before += counts[i];
      }
    }
  } else {
    int gray = 0;
    if (op == kContrast) {
      if (threadIdx.x == 0) s.luma_sum = 0;
      __syncthreads();
      int sum = 0;
      for (int i = threadIdx.x; i < pixels; i += kThreads)
        sum += luma(image[3 * i], image[3 * i + 1], image[3 * i + 2]);
      sum = lanes_sum<kLanesOfWarp>(sum);
      if (threadIdx.x % kLanesOfWarp == 0) atomicAdd(&s.luma_sum, sum);
      __syncthreads();
      gray = mean_gray(s.luma_sum, pixels);
    }
    for (int v = threadIdx.x; v < 256; v += kThreads) {
      const uint8_t level = op == kPosterize  ? posterized(v, value)
                            : op == kSolarize ? solarized(v, value)
                                              : blend(gray, v, value);  // Brightness: towards black
      for (int c = 0; c < 3; ++c) s.map[c][v] = level;
    }
  }
  __syncthreads();
}

// Applies the operations and the cutout to `now`, with `next` as the other buffer; both are swapped as needed.
__device__ void operate(const ViewPolicy& p, Shared& s, uint8_t*& now, uint8_t*& next) {
  const int h = p.height, w = p.width, pixels = h * w;
  const View& v = s.view;
  for (int i = 0; i < v.num_ops; ++i) {
    const int op = v.op[i];
    if (is_geometric(op)) {
      if (threadIdx.x == 0) s.affine = affine_of(op, v.value[i], h, w);
      __syncthreads();
      affine_pass(s.affine, h, w, now, next);
    } else if (op == kSharpness) {
      sharpness_pass(h, w, v.value[i], now, next);
    } else if (op == kColor) {
      color_pass(pixels, v.value[i], now);
    } else {
      level_map(op, v.value[i], pixels, now, s);
      for (int j = threadIdx.x; j < 3 * pixels; j += kThreads) now[j] = s.map[j % 3][now[j]];
    }
    if (is_geometric(op) || op == kSharpness) {
      uint8_t* const made = next;
      next = now;
      now = made;
    }
    __syncthreads();
  }
  const int width = v.box.x1 - v.box.x0 + 1, area = width > 0 ? width * max(v.box.y1 - v.box.y0 + 1, 0) : 0;
  for (int i = threadIdx.x; i < area; i += kThreads) {
    uint8_t* pixel = now + 3 * ((v.box.y0 + i / width) * w + v.box.x0 + i % width);
    for (int c = 0; c < 3; ++c) pixel[c] = p.fill[c];
  }
  __syncthreads();
}

template <typename T>
__device__ __forceinline__ T finished(uint8_t v, float scale, float shift) {
  if constexpr (sizeof(T) == 1) {
    return v;
  } else {
    return T(normalized(v, scale, shift));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    augment_views_kernel(ViewPolicy p, uint64_t seed, const uint8_t* images, int64_t rows, const int64_t* draws,
                         int64_t count, uint8_t* workspace, T* out) {
  NM_DYNAMIC_SHARED(uint8_t, pictures);
  __shared__ Shared s;
  const int64_t size = 3 * int64_t(p.height) * p.width;
  for (int64_t n = blockIdx.x; n < count; n += gridDim.x) {
    uint8_t* now = workspace ? workspace + 2 * size * blockIdx.x : pictures;
    uint8_t* next = now + size;
    const int64_t row = draws[4 * n];
    const bool strong = draws[4 * n + 3] == kStrongView;
    if (threadIdx.x == 0)
      s.view = draw_view(p, seed, uint32_t(draws[4 * n + 1]), uint32_t(draws[4 * n + 2]), uint32_t(draws[4 * n + 3]));
    __syncthreads();
    // The host cannot see rows that lie on the device: one that is not there reads as the first image.
    const uint8_t* image = images + size * (row >= 0 && row < rows ? row : 0);
    if (strong && p.ops_first) {
      for (int64_t i = threadIdx.x; i < size; i += kThreads) now[i] = image[i];
      __syncthreads();
      operate(p, s, now, next);
      crop_pass(p, s.view, now, next);
      now = next;
      __syncthreads();
    } else {
      crop_pass(p, s.view, image, now);
      __syncthreads();
      if (strong) operate(p, s, now, next);
    }
    T* to = out + n * size;
    constexpr int kSize = Pack<T>::kSize;
    const bool whole = size % kSize == 0;  // `out` itself is aligned: it is a fresh tensor
    for (int64_t i = whole ? kSize * int64_t(threadIdx.x) : size; i < size; i += kSize * kThreads) {
      Pack<T> pack;
      for (int j = 0; j < kSize; ++j) {
        const int c = int((i + j) % 3);
        pack.values[j] = finished<T>(now[i + j], p.scale[c], p.shift[c]);
      }
      *reinterpret_cast<Pack<T>*>(to + i) = pack;
    }
    for (int64_t i = whole ? size : threadIdx.x; i < size; i += kThreads)
      to[i] = finished<T>(now[i], p.scale[i % 3], p.shift[i % 3]);
    __syncthreads();  // the pictures are read before the next view overwrites them
  }
}

struct Views {
  template <typename T>
  static void make(const ViewPolicy& p, uint64_t seed, const Tensor& images, const Tensor& draws, const Tensor& out) {
    const int64_t count = draws.size(0), pictures = 2 * 3 * int64_t(p.height) * p.width;
    if (count == 0) return;
    const bool fits = pictures <= kSharedLimit;
    const int64_t blocks = std::min<int64_t>(count, fits ? 1 << 20 : 1024);
    const Tensor workspace = new_tensor(images, {fits ? 0 : blocks * pictures}, ScalarType::Byte);
    launch(augment_views_kernel<T>, dim3(unsigned(blocks)), dim3(kThreads), fits ? size_t(pictures) : 0, images, p,
           seed, images.const_data_ptr<uint8_t>(), images.size(0), draws.const_data_ptr<int64_t>(), count,
           fits ? nullptr : workspace.mutable_data_ptr<uint8_t>(), out.mutable_data_ptr<T>());
  }
};

}  // namespace

NM_CUDA_LIBRARY(m) {
  m.impl("augment_views", TORCH_BOX(&augment_views<Views>));
}

}  // namespace normatch
