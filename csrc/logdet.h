// Log-determinant of an elementwise scale: the sum of log|scale| per sample. The backends share when to cut a row.
#pragma once

#include "portable.h"

namespace normatch {

constexpr int64_t kLogdetLongRow = 1 << 16;

// Pieces per row, so that a few very long rows still fill the machine; depends on the sizes alone.
inline int64_t logdet_pieces(int64_t rows, int64_t width) {
  if (width < kLogdetLongRow || rows >= 1024) return 1;
  const int64_t wanted = 1024 / (rows > 0 ? rows : 1);
  const int64_t possible = width / (kLogdetLongRow / 4);
  return wanted < possible ? wanted : possible;
}

}  // namespace normatch
