// Log-determinant of an elementwise scale: the sum of log|scale| over everything but the sample. There is no
// maths per element; what both backends share is the size from which a row is worth cutting in pieces.
#pragma once

#include "portable.h"

namespace normatch {

constexpr int64_t kLogdetLongRow = 1 << 16;

// Pieces that a row is summed in, so that a few very long rows still fill the machine. From the sizes alone.
inline int64_t logdet_pieces(int64_t rows, int64_t width) {
  if (width < kLogdetLongRow || rows >= 1024) return 1;
  const int64_t wanted = 1024 / (rows > 0 ? rows : 1);
  const int64_t possible = width / (kLogdetLongRow / 4);
  return wanted < possible ? wanted : possible;
}

}  // namespace normatch
