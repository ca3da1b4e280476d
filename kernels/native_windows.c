/* Weight gradients of convolutions; a part of native_lanes.c, compiled for each number of LANES. */

/* One register tile, ROWS x ACROSS coordinates of LANES examples, summed over count windows and added to its columns. */
INLINE void VARIANT(window_tile)(floats *sums, const floats *left, const floats *const right[ACROSS],
                                 const int32_t *windows, int64_t count, const uint32_t *table, int64_t row,
                                 int64_t copy_stride, uint32_t nnz, int64_t high, int64_t wide, const float *scale,
                                 int64_t scale_row) {
  floats g[ROWS][ACROSS];
  UNROLL for (int m = 0; m < ROWS; m++)
    UNROLL for (int n = 0; n < ACROSS; n++) g[m][n] = (floats){0};
  for (int64_t l = 0; l < count; l++, left += ROWS) {
    const int64_t at = windows[l];
    UNROLL for (int n = 0; n < ACROSS; n++) {
      const floats r = right[n][at];
      UNROLL for (int m = 0; m < ROWS; m++) g[m][n] += left[m] * r;
    }
  }
  if (high >= ROWS && wide >= ACROSS) {
    if (scale)
      UNROLL for (int m = 0; m < ROWS; m++)
        UNROLL for (int n = 0; n < ACROSS; n++) g[m][n] *= scale[m * scale_row + n];
    for (uint32_t copy = 0; copy < nnz; copy++, table += copy_stride)
      UNROLL for (int m = 0; m < ROWS; m++)
        UNROLL for (int n = 0; n < ACROSS; n++) VARIANT(add_vector)(sums, &g[m][n], table[m * row + n]);
    return;
  }
  floats edge[ROWS][ACROSS]; /* a copy, so that the tile above stays in registers */
  UNROLL for (int m = 0; m < ROWS; m++)
    UNROLL for (int n = 0; n < ACROSS; n++) edge[m][n] = g[m][n];
  if (scale)
    for (int m = 0; m < smaller(high, ROWS); m++)
      for (int n = 0; n < smaller(wide, ACROSS); n++) edge[m][n] *= scale[m * scale_row + n];
  for (uint32_t copy = 0; copy < nnz; copy++, table += copy_stride)
    for (int m = 0; m < smaller(high, ROWS); m++)
      for (int n = 0; n < smaller(wide, ACROSS); n++) VARIANT(add_vector)(sums, &edge[m][n], table[m * row + n]);
}

/* sums[k] = R vec(G[b]), G[b][o][c][j] = sum_l left[b][o][l] right[b][c][taps[j] + windows[l]], for up to LANES
 * examples b and the coordinates from start on, each times its entry of scale, unless that is null. Channels of right are interleaved once, strips of left against each lot
 * of them; no column of the convolution is ever made, as a tap and a window are no more than an offset into a channel.
 * work has room for left_work (at least ROWS l) and right_work (at least plane) vectors. */
static void VARIANT(sp_windows_lanes)(void *out, void *work, int64_t left_work, int64_t right_work, const float *left,
                                      int64_t left_b, int64_t left_o, const float *right, int64_t right_b,
                                      int64_t plane, const int32_t *taps, const int32_t *windows, int lanes, int64_t o,
                                      int64_t l, int64_t c, int64_t j, uint64_t start, const spec *of,
                                      const float *scale) {
  const uint32_t k = of->k, nnz = of->nnz;
  uint32_t table[WINDOW_TABLE];
  map maps[OUTER_COPIES];
  floats *const sums = out, *const panels = work, *const planes = panels + left_work;
  const int64_t strip = left_work / l / ROWS * ROWS, channels = smaller(c, right_work / plane);
  const int64_t across = WINDOW_TABLE / ROWS / nnz / ACROSS * ACROSS;
  const int64_t chunks = (l + WINDOW_STEPS - 1) / WINDOW_STEPS, depth = (l + chunks - 1) / chunks;
  for (uint32_t copy = 0; copy < nnz; copy++) maps[copy] = open_map(of, copy);
  memset(sums, 0, (size_t)k * sizeof *sums);
  for (int64_t c0 = 0; c0 < c; c0 += channels) {
    const int64_t taken = smaller(channels, c - c0);
    VARIANT(interleave)(planes, 1, 1, right + c0 * plane, right_b, lanes, taken * plane);
    for (int64_t o0 = 0; o0 < o; o0 += strip) {
      const int64_t height = smaller(strip, o - o0);
      for (int64_t r = 0; r < height; r++)
        VARIANT(interleave)(panels + r / ROWS * ROWS * l + r % ROWS, 1, ROWS, left + (o0 + r) * left_o, left_b, lanes, l);
      for (int64_t r = 0; r < height; r += ROWS) {
        const int64_t rows = smaller(ROWS, height - r);
        for (int64_t e0 = 0; e0 < taken * j; e0 += across) {
          const int64_t width = smaller(across, taken * j - e0);
          for (uint32_t copy = 0; copy < nnz; copy++)
            for (int64_t m = 0; m < rows; m++)
              VARIANT(fill)(&maps[copy], table + (copy * ROWS + m) * across,
                            start + (uint64_t)(((o0 + r + m) * c + c0) * j + e0), width);
          for (int64_t l0 = 0; l0 < l; l0 += depth)
            for (int64_t e = 0; e < width; e += ACROSS) {
              const floats *from[ACROSS];
              for (int64_t n = 0; n < ACROSS; n++) {
                const int64_t at = e0 + smaller(e + n, width - 1);
                from[n] = planes + at / j * plane + taps[at % j];
              }
              VARIANT(window_tile)(sums, panels + r * l + l0 * ROWS, from, windows + l0, smaller(depth, l - l0),
                                   table + e, across, ROWS * across, nnz, rows, width - e,
                                   scale ? scale + ((o0 + r) * c + c0) * j + e0 + e : scale, c * j);
            }
        }
      }
    }
  }
}
