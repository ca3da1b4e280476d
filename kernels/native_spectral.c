/* Tensor sketches in the frequency domain; a part of native_lanes.c, compiled for each number of LANES.
 *
 * Let x be the left factor's sketch and y the right one's, and z = x + iy. The circular convolution x * y, which is the
 * sketch of their outer product, is half the imaginary part of z * z: so one complex transform a step serves both
 * factors, Z^2 is summed over the steps, and one inverse transform gives the sum. The order of the frequencies does not
 * matter to squares: the transform forward leaves them in the order of reversed digits, the inverse takes them so.
 * The smaller one of x and y would drown in the other one's rounding, hence both are first brought to one size by powers
 * of two whose product is one. z and the sum hold pairs (real, imaginary) of vectors.
 */

/* Four numbers a quarter of n apart, given as pairs a to d, after the first butterflies; w1 to w3 are the twiddles. */
#define SPLIT(z, z1, z2, z3, j, a, b, c, d)                                                                     \
  do {                                                                                                          \
    const float *const w1 = w + (j) * step, *const w2 = w1 + (j) * step, *const w3 = w2 + (j) * step;            \
    const floats sr = a[0] + c[0], si = a[1] + c[1], dr = a[0] - c[0], di = a[1] - c[1];                         \
    const floats tr = b[0] + d[0], ti = b[1] + d[1], er = b[0] - d[0], ei = b[1] - d[1];                         \
    const floats pr = dr + ei, pi = di - er, qr = sr - tr, qi = si - ti, rr = dr - ei, ri = di + er;             \
    z[j] = sr + tr, z[(j) + 1] = si + ti;                                                                        \
    z1[j] = pr * w1[0] - pi * w1[1], z1[(j) + 1] = pr * w1[1] + pi * w1[0];                                      \
    z2[j] = qr * w2[0] - qi * w2[1], z2[(j) + 1] = qr * w2[1] + qi * w2[0];                                      \
    z3[j] = rr * w3[0] - ri * w3[1], z3[(j) + 1] = rr * w3[1] + ri * w3[0];                                      \
  } while (0)

/* The first butterflies of n = 4 quarter numbers; step is k / n, and w[t] = exp(-2 pi i t / k). */
INLINE void VARIANT(split)(floats *z, int64_t quarter, int64_t step, const float *w) {
  floats *const z1 = z + 2 * quarter, *const z2 = z1 + 2 * quarter, *const z3 = z2 + 2 * quarter;
  for (int64_t j = 0; j < 2 * quarter; j += 2) {
    const floats a[2] = {z[j], z[j + 1]}, b[2] = {z1[j], z1[j + 1]};
    const floats c[2] = {z2[j], z2[j + 1]}, d[2] = {z3[j], z3[j + 1]};
    SPLIT(z, z1, z2, z3, j, a, b, c, d);
  }
}

/* One side of a step: its numbers with their signs, interleaved, nothing behind them, and which of them each column of
 * each block holds; `count` where none. */
typedef struct {
  const floats *x;
  const int32_t *inverse;
  int64_t blocks;
} VARIANT(side);

INLINE floats VARIANT(column)(const VARIANT(side) * of, int64_t c, int64_t k) {
  floats sum = of->x[of->inverse[c]];
  for (int64_t b = 1; b < of->blocks; b++) sum += of->x[of->inverse[b * k + c]];
  return sum;
}

/* The first butterflies of all k numbers, straight from the two sides. */
INLINE void VARIANT(split_sides)(floats *z, const VARIANT(side) * left, const VARIANT(side) * right, int64_t k,
                                 const float *w) {
  const int64_t quarter = k / 4, step = 1;
  floats *const z1 = z + 2 * quarter, *const z2 = z1 + 2 * quarter, *const z3 = z2 + 2 * quarter;
  for (int64_t c = 0; c < quarter; c++) {
    floats v[4][2];
    UNROLL for (int m = 0; m < 4; m++) {
      v[m][0] = VARIANT(column)(left, c + m * quarter, k);
      v[m][1] = VARIANT(column)(right, c + m * quarter, k);
    }
    SPLIT(z, z1, z2, z3, 2 * c, v[0], v[1], v[2], v[3]);
  }
}

/* What undoes `split`, but for a factor of four. */
INLINE void VARIANT(join)(floats *z, int64_t quarter, int64_t step, const float *w) {
  floats *const z1 = z + 2 * quarter, *const z2 = z1 + 2 * quarter, *const z3 = z2 + 2 * quarter;
  for (int64_t j = 0; j < 2 * quarter; j += 2) {
    const float *const w1 = w + j * step, *const w2 = w1 + j * step, *const w3 = w2 + j * step;
    const floats ar = z1[j] * w1[0] + z1[j + 1] * w1[1], ai = z1[j + 1] * w1[0] - z1[j] * w1[1];
    const floats br = z2[j] * w2[0] + z2[j + 1] * w2[1], bi = z2[j + 1] * w2[0] - z2[j] * w2[1];
    const floats cr = z3[j] * w3[0] + z3[j + 1] * w3[1], ci = z3[j + 1] * w3[0] - z3[j] * w3[1];
    const floats sr = z[j] + br, si = z[j + 1] + bi, dr = z[j] - br, di = z[j + 1] - bi;
    const floats tr = ar + cr, ti = ai + ci, er = ar - cr, ei = ai - ci;
    z[j] = sr + tr, z[j + 1] = si + ti;
    z1[j] = dr - ei, z1[j + 1] = di + er;
    z2[j] = sr - tr, z2[j + 1] = si - ti;
    z3[j] = dr + ei, z3[j + 1] = di - er;
  }
}

INLINE void VARIANT(add_square_of)(floats *sum, floats re, floats im) {
  sum[0] += re * re - im * im;
  sum[1] += 2 * re * im;
}

/* The last butterflies, of four numbers or of two, whose squares are added to sum. */
INLINE void VARIANT(add_last)(const floats *z, floats *sum, int64_t n) {
  if (n == 2) {
    VARIANT(add_square_of)(sum, z[0] + z[2], z[1] + z[3]);
    VARIANT(add_square_of)(sum + 2, z[0] - z[2], z[1] - z[3]);
    return;
  }
  const floats sr = z[0] + z[4], si = z[1] + z[5], dr = z[0] - z[4], di = z[1] - z[5];
  const floats tr = z[2] + z[6], ti = z[3] + z[7], er = z[2] - z[6], ei = z[3] - z[7];
  VARIANT(add_square_of)(sum, sr + tr, si + ti);
  VARIANT(add_square_of)(sum + 2, dr + ei, di - er);
  VARIANT(add_square_of)(sum + 4, sr - tr, si - ti);
  VARIANT(add_square_of)(sum + 6, dr - ei, di + er);
}

INLINE void VARIANT(join_first)(floats *z, int64_t n) {
  if (n == 2) {
    const floats re = z[2], im = z[3];
    z[2] = z[0] - re, z[3] = z[1] - im;
    z[0] += re, z[1] += im;
    return;
  }
  const float unit[2] = {1, 0};
  VARIANT(join)(z, 1, 0, unit);
}

/* sum += (the transform of z)^2, for n numbers, 4 or more a power of two, the first butterflies of which are done; z is
 * overwritten. Depth first: a block stays in the first-level cache once it fits. */
static void VARIANT(add_squares_of_transform)(floats *z, floats *sum, int64_t n, int64_t step, const float *w) {
  const int64_t quarter = n / 4;
  for (int64_t b = 0; b < 8 * quarter; b += 2 * quarter)
    if (quarter > 4) {
      VARIANT(split)(z + b, quarter / 4, 4 * step, w);
      VARIANT(add_squares_of_transform)(z + b, sum + b, quarter, 4 * step, w);
    } else {
      VARIANT(add_last)(z + b, sum + b, quarter);
    }
}

/* k times the inverse transform, in place. */
static void VARIANT(invert)(floats *z, int64_t n, int64_t step, const float *w) {
  const int64_t quarter = n / 4;
  for (int64_t b = 0; b < 8 * quarter; b += 2 * quarter)
    if (quarter > 4)
      VARIANT(invert)(z + b, quarter, 4 * step, w);
    else
      VARIANT(join_first)(z + b, quarter);
  VARIANT(join)(z, quarter, step, w);
}

/* For each lane the exponent, four times over, of a number between the norm of x and twice or so that: the norm is at
 * most the root of the largest entry times the sum. Zero where all are. */
INLINE void VARIANT(sizes)(int exponent[LANES], const floats *x, int64_t count) {
  floats most = {0}, total = {0};
  for (int64_t e = 0; e < count; e++) {
    const floats size = (floats)((words)x[e] & ~NEGATIVE);
    const words larger = (words)(size > most);
    most = (floats)(((words)size & larger) | ((words)most & ~larger));
    total += size;
  }
  for (int l = 0; l < LANES; l++) exponent[l] = (int)(((words)most)[l] >> 23) + (int)(((words)total)[l] >> 23 & 255);
}

/* Powers of two whose product is one and which bring x and y to one size; zeros where x or y is zero. */
INLINE void VARIANT(balance)(floats *of_x, floats *of_y, const floats *x, int64_t o, const floats *y, int64_t i) {
  int x_size[LANES], y_size[LANES];
  words a, b;
  VARIANT(sizes)(x_size, x, o);
  VARIANT(sizes)(y_size, y, i);
  for (int l = 0; l < LANES; l++) {
    const int far = (y_size[l] - x_size[l]) / 4, shift = far < -126 ? -126 : far > 126 ? 126 : far;
    const int there = x_size[l] && y_size[l];
    a[l] = there ? (uint32_t)(127 + shift) << 23 : 0;
    b[l] = there ? (uint32_t)(127 - shift) << 23 : 0;
  }
  *of_x = (floats)a, *of_y = (floats)b;
}

/* Which of count entries each of k columns holds, for every block of them. */
INLINE void VARIANT(invert_table)(int32_t *inverse, const uint32_t *table, int64_t count, int64_t k) {
  for (int64_t start = 0; start < count; start += k, inverse += k) {
    for (int64_t c = 0; c < k; c++) inverse[c] = (int32_t)count;
    for (int64_t e = start; e < smaller(count, start + k); e++) inverse[table[e] & ~NEGATIVE] = (int32_t)e;
  }
}

INLINE void VARIANT(sign_and_scale)(floats *x, int64_t count, floats scale, const uint32_t *table) {
  for (int64_t e = 0; e < count; e++) x[e] = (floats)((words)(x[e] * scale) ^ ((words){0} + (table[e] & NEGATIVE)));
  x[count] = (floats){0};
}

/* What a call sums over its steps: z and sum have k pairs of vectors, the inverse tables whole blocks of entries. */
typedef struct {
  const spec *of;
  const float *w;
  floats *z, *sum;
  int32_t *left, *right;
  int64_t o, i;
} VARIANT(spectrum);

/* Where a call's work space holds all but the sums; `rest` is what follows. */
INLINE VARIANT(spectrum) VARIANT(open_spectrum)(void *work, int64_t o, int64_t i, const spec *of, const float *w,
                                                floats **rest) {
  const int64_t k = of->k, left = (o + k - 1) / k * k, right = (i + k - 1) / k * k;
  VARIANT(spectrum) s = {of, w, work, 0, 0, 0, o, i};
  s.left = (int32_t *)(s.z + 2 * k), s.right = s.left + left;
  *rest = s.z + 2 * k + (left + right + LANES - 1) / LANES;
  VARIANT(invert_table)(s.left, of->left, o, k);
  VARIANT(invert_table)(s.right, of->right, i, k);
  return s;
}

/* Turns to the sums of the group of examples that begins with b; fresh ones hold nothing yet. */
INLINE void VARIANT(turn_to)(VARIANT(spectrum) * s, void *sums, int64_t b, int fresh) {
  const int64_t size = 2 * (int64_t)s->of->k;
  s->sum = (floats *)sums + b / LANES * size;
  if (fresh) memset(s->sum, 0, (size_t)size * sizeof *s->sum);
}

/* Adds one step's factors x and y, given interleaved with room for one vector more; they are overwritten. */
INLINE void VARIANT(add_step)(const VARIANT(spectrum) * s, floats *x, floats *y) {
  const int64_t k = s->of->k;
  floats scale[2];
  VARIANT(balance)(scale, scale + 1, x, s->o, y, s->i);
  VARIANT(sign_and_scale)(x, s->o, scale[0], s->of->left);
  VARIANT(sign_and_scale)(y, s->i, scale[1], s->of->right);
  const VARIANT(side) left = {x, s->left, (s->o + k - 1) / k}, right = {y, s->right, (s->i + k - 1) / k};
  VARIANT(split_sides)(s->z, &left, &right, k, s->w);
  VARIANT(add_squares_of_transform)(s->z, s->sum, k, 1, s->w);
}

/* sums[group] += the transform of R vec(sum_t left[b][t] (x) right[b][t]) for the examples b in [first, last), of which
 * LANES make a group and first begins one, of a tensor map over k columns, a power of two from 8 on. A group's sums are
 * 2 k vectors; fresh ones are overwritten. work has room for 2 k + o + i + 3 vectors, and for a number for each entry of
 * the whole blocks of k that o and i fill. */
static void VARIANT(sp_spectral_outer)(void *sums, void *work, int fresh, const float *left, int64_t left_b,
                                       int64_t left_t, const float *right, int64_t right_b, int64_t right_t,
                                       int64_t first, int64_t last, int64_t steps, int64_t o, int64_t i, const spec *of,
                                       const float *w) {
  floats *x;
  VARIANT(spectrum) s = VARIANT(open_spectrum)(work, o, i, of, w, &x);
  floats *const y = x + o + 1;
  for (int64_t b = first; b < last; b += LANES) {
    const int lanes = (int)smaller(LANES, last - b);
    VARIANT(turn_to)(&s, sums, b, fresh);
    for (int64_t t = 0; t < steps; t++) {
      VARIANT(interleave)(x, 1, 1, left + b * left_b + t * left_t, left_b, lanes, o);
      VARIANT(interleave)(y, 1, 1, right + b * right_b + t * right_t, right_b, lanes, i);
      VARIANT(add_step)(&s, x, y);
    }
  }
}

/* The same for the windows [begin, end) of l windows of a convolution, as sp_windows_lanes; work has room for
 * o (end - begin) + c plane vectors more. */
static void VARIANT(sp_spectral_windows)(void *sums, void *work, int fresh, const float *left, int64_t left_b,
                                         int64_t l, const float *right, int64_t right_b, int64_t plane,
                                         const int32_t *taps, const int32_t *windows, int64_t first, int64_t last,
                                         int64_t o, int64_t begin, int64_t end, int64_t c, int64_t j, const spec *of,
                                         const float *w) {
  floats *x;
  VARIANT(spectrum) s = VARIANT(open_spectrum)(work, o, c * j, of, w, &x);
  floats *const y = x + o + 1, *const panel = y + c * j + 1, *const planes = panel + o * (end - begin);
  for (int64_t b = first; b < last; b += LANES) {
    const int lanes = (int)smaller(LANES, last - b);
    VARIANT(turn_to)(&s, sums, b, fresh);
    for (int64_t r = 0; r < o; r++)
      VARIANT(interleave)(panel + r, 1, o, left + b * left_b + r * l + begin, left_b, lanes, end - begin);
    VARIANT(interleave)(planes, 1, 1, right + b * right_b, right_b, lanes, c * plane);
    for (int64_t t = begin; t < end; t++) {
      memcpy(x, panel + (t - begin) * o, (size_t)o * sizeof *x);
      for (int64_t channel = 0; channel < c; channel++)
        for (int64_t tap = 0; tap < j; tap++) y[channel * j + tap] = planes[channel * plane + taps[tap] + windows[t]];
      VARIANT(add_step)(&s, x, y);
    }
  }
}

/* out[b] += half the imaginary part of the inverse transform of the sums of the examples b in [first, last), as above,
 * which are overwritten, unless they are null; and count numbers rows[b], each with its entry of a table. work has room
 * for k + PIECE vectors. */
static void VARIANT(sp_finish)(float *out, int64_t out_stride, void *sums, void *work, const float *rows,
                               int64_t row_stride, const uint32_t *table, int64_t count, int64_t first, int64_t last,
                               int64_t k, const float *w) {
  floats *const piece = work;
  const float scale = 0.5f / (float)k;
  for (int64_t b = first; b < last; b += LANES) {
    const int lanes = (int)smaller(LANES, last - b);
    floats *const sum = sums ? (floats *)sums + b / LANES * 2 * k : piece + PIECE;
    if (sums) {
      VARIANT(invert)(sum, k, 1, w);
      for (int64_t c = 0; c < k; c++) sum[c] = sum[2 * c + 1] * scale;
    } else {
      memset(sum, 0, (size_t)k * sizeof *sum);
    }
    for (int64_t p = 0; p < count; p += PIECE) {
      const int64_t width = smaller(PIECE, count - p);
      VARIANT(interleave)(piece, 1, 1, rows + b * row_stride + p, row_stride, lanes, width);
      for (int64_t x = 0; x < width; x++) VARIANT(add_vector)(sum, &piece[x], table[p + x]);
    }
    VARIANT(sp_gather_lanes)(out + b * out_stride, out_stride, sum, 1, lanes, k, 1);
  }
}

#undef SPLIT
