/* Transforms of k complex points, k a power of two; a part of native_lanes.c, compiled for each number of LANES.
 *
 * One example at a time, so that what is transformed stays in the nearest caches. z and the sums hold pairs (real,
 * imaginary) of vectors, of LANES neighbouring points each. Levels of butterflies over vectors cut the points into
 * blocks of 8 to 32; LANES blocks are then transposed, so that each has a lane, and transformed together.
 */

#define SHORTEST (LANES > 8 ? LANES : 8) /* points of the blocks that are transposed, or twice as many */

/* Four points a quarter of a block apart, given as pairs a to d, after its first butterflies; w holds three twiddles. */
#define SPLIT(z0, z1, z2, z3, a, b, c, d, w)                                                                    \
  do {                                                                                                          \
    const floats sr = a[0] + c[0], si = a[1] + c[1], dr = a[0] - c[0], di = a[1] - c[1];                         \
    const floats tr = b[0] + d[0], ti = b[1] + d[1], er = b[0] - d[0], ei = b[1] - d[1];                         \
    const floats pr = dr + ei, pi = di - er, qr = sr - tr, qi = si - ti, rr = dr - ei, ri = di + er;             \
    (z0)[0] = sr + tr, (z0)[1] = si + ti;                                                                        \
    (z1)[0] = pr * (w)[0] - pi * (w)[1], (z1)[1] = pr * (w)[1] + pi * (w)[0];                                    \
    (z2)[0] = qr * (w)[2] - qi * (w)[3], (z2)[1] = qr * (w)[3] + qi * (w)[2];                                    \
    (z3)[0] = rr * (w)[4] - ri * (w)[5], (z3)[1] = rr * (w)[5] + ri * (w)[4];                                    \
  } while (0)

/* What undoes it, in place, but for a factor of four. */
#define JOIN_FOUR(z0, z1, z2, z3, w)                                                                            \
  do {                                                                                                          \
    const floats ar = (z1)[0] * (w)[0] + (z1)[1] * (w)[1], ai = (z1)[1] * (w)[0] - (z1)[0] * (w)[1];             \
    const floats br = (z2)[0] * (w)[2] + (z2)[1] * (w)[3], bi = (z2)[1] * (w)[2] - (z2)[0] * (w)[3];             \
    const floats cr = (z3)[0] * (w)[4] + (z3)[1] * (w)[5], ci = (z3)[1] * (w)[4] - (z3)[0] * (w)[5];             \
    const floats sr = (z0)[0] + br, si = (z0)[1] + bi, dr = (z0)[0] - br, di = (z0)[1] - bi;                     \
    const floats tr = ar + cr, ti = ai + ci, er = ar - cr, ei = ai - ci;                                         \
    (z0)[0] = sr + tr, (z0)[1] = si + ti;                                                                        \
    (z1)[0] = dr - ei, (z1)[1] = di + er;                                                                        \
    (z2)[0] = sr - tr, (z2)[1] = si - ti;                                                                        \
    (z3)[0] = dr + ei, (z3)[1] = di - er;                                                                        \
  } while (0)

/* Points of the blocks that are transposed. */
INLINE int64_t VARIANT(shortest)(int64_t k) {
  while (k >= 4 * SHORTEST) k /= 4;
  return k;
}

/* The twiddles in the order in which they are used, 2 k numbers, from w[t] = exp(-2 pi i t / k): of each level of n
 * points from 2 (k - n) on, three pairs of vectors for LANES points of a quarter; then those of the short blocks. */
static void VARIANT(sp_spectral_table)(float *to, const float *w, int64_t k) {
  const int64_t m = VARIANT(shortest)(k);
  for (int64_t n = k; n > m; n /= 4)
    for (int64_t j = 0; j < n / 4; j += LANES)
      for (int64_t r = 1; r < 4; r++, to += 2 * LANES)
        for (int64_t l = 0; l < LANES; l++) {
          const float *const from = w + 2 * r * (j + l) * (k / n);
          to[l] = from[0], to[LANES + l] = from[1];
        }
  for (int64_t t = 0; t < m; t++) to[2 * t] = w[2 * t * (k / m)], to[2 * t + 1] = w[2 * t * (k / m) + 1];
}

/* A transform's tables. */
typedef struct {
  const float *w;
  int64_t k, m; /* points, and those of the short blocks */
} VARIANT(plan);

INLINE VARIANT(plan) VARIANT(open_plan)(const float *w, int64_t k) {
  const VARIANT(plan) p = {w, k, VARIANT(shortest)(k)};
  return p;
}

INLINE const floats *VARIANT(level_of)(const VARIANT(plan) * p, int64_t n) {
  return (const floats *)(p->w + 2 * (p->k - n));
}

/* The first butterflies of n points. */
INLINE void VARIANT(split_level)(floats *to, const floats *from, int64_t n, const floats *w) {
  const int64_t quarter = n / 2 / LANES;
  for (int64_t j = 0; j < quarter; j += 2, w += 6, from += 2, to += 2) {
    const floats a[2] = {from[0], from[1]}, b[2] = {from[quarter], from[quarter + 1]};
    const floats c[2] = {from[2 * quarter], from[2 * quarter + 1]}, d[2] = {from[3 * quarter], from[3 * quarter + 1]};
    SPLIT(to, to + quarter, to + 2 * quarter, to + 3 * quarter, a, b, c, d, w);
  }
}

INLINE void VARIANT(join_level)(floats *z, int64_t n, const floats *w) {
  const int64_t quarter = n / 2 / LANES;
  for (int64_t j = 0; j < quarter; j += 2, w += 6, z += 2)
    JOIN_FOUR(z, z + quarter, z + 2 * quarter, z + 3 * quarter, w);
}

/* The same where each lane has n = 4 quarter points of its own; w[t] = exp(-2 pi i t / (n step)). */
INLINE void VARIANT(split_short)(floats *z, int64_t quarter, int64_t step, const float *w) {
  floats *const z1 = z + 2 * quarter, *const z2 = z1 + 2 * quarter, *const z3 = z2 + 2 * quarter;
  for (int64_t j = 0; j < 2 * quarter; j += 2) {
    const float *const w1 = w + j * step, *const w2 = w1 + j * step, *const w3 = w2 + j * step;
    const float twiddles[6] = {w1[0], w1[1], w2[0], w2[1], w3[0], w3[1]};
    const floats a[2] = {z[j], z[j + 1]}, b[2] = {z1[j], z1[j + 1]};
    const floats c[2] = {z2[j], z2[j + 1]}, d[2] = {z3[j], z3[j + 1]};
    SPLIT(z + j, z1 + j, z2 + j, z3 + j, a, b, c, d, twiddles);
  }
}

INLINE void VARIANT(join_short)(floats *z, int64_t quarter, int64_t step, const float *w) {
  floats *const z1 = z + 2 * quarter, *const z2 = z1 + 2 * quarter, *const z3 = z2 + 2 * quarter;
  for (int64_t j = 0; j < 2 * quarter; j += 2) {
    const float *const w1 = w + j * step, *const w2 = w1 + j * step, *const w3 = w2 + j * step;
    const float twiddles[6] = {w1[0], w1[1], w2[0], w2[1], w3[0], w3[1]};
    JOIN_FOUR(z + j, z1 + j, z2 + j, z3 + j, twiddles);
  }
}

INLINE void VARIANT(add_square_of)(floats *sum, floats re, floats im) {
  sum[0] += re * re - im * im;
  sum[1] += 2 * re * im;
}

/* The last butterflies, of four points or of two, whose squares are added to sum. */
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
  VARIANT(join_short)(z, 1, 0, unit);
}

/* Turns LANES blocks of m points, one after the other, into m pairs of vectors, with a lane for each; or back. */
INLINE void VARIANT(turn_blocks)(floats *to, const floats *from, int64_t m, int back) {
  const int64_t across = m / LANES;
  for (int64_t c = 0; c < across; c++)
    for (int part = 0; part < 2; part++) {
      floats v[LANES];
      UNROLL for (int l = 0; l < LANES; l++) v[l] = from[2 * (back ? c * LANES + l : l * across + c) + part];
      VARIANT(transpose)(v);
      UNROLL for (int l = 0; l < LANES; l++) to[2 * (back ? l * across + c : c * LANES + l) + part] = v[l];
    }
}

/* sum += (the transform of each of LANES blocks of m points)^2. */
INLINE void VARIANT(add_squares_of_blocks)(const floats *z, floats *sum, int64_t m, const float *w) {
  floats turned[4 * SHORTEST];
  VARIANT(turn_blocks)(turned, z, m, 0);
  VARIANT(split_short)(turned, m / 4, 1, w);
  if (m == 32)
    for (int64_t b = 0; b < 64; b += 16) VARIANT(split_short)(turned + b, 2, 4, w);
  const int64_t last = m == 32 ? 2 : m / 4;
  for (int64_t b = 0; b < 2 * m; b += 2 * last) VARIANT(add_last)(turned + b, sum + b, last);
}

INLINE void VARIANT(invert_blocks)(floats *sum, int64_t m, const float *w) {
  floats turned[4 * SHORTEST];
  memcpy(turned, sum, (size_t)(2 * m) * sizeof *sum);
  const int64_t last = m == 32 ? 2 : m / 4;
  for (int64_t b = 0; b < 2 * m; b += 2 * last) VARIANT(join_first)(turned + b, last);
  if (m == 32)
    for (int64_t b = 0; b < 64; b += 16) VARIANT(join_short)(turned + b, 2, 4, w);
  VARIANT(join_short)(turned, m / 4, 1, w);
  VARIANT(turn_blocks)(sum, turned, m, 1);
}

/* sum += (the transform of n of the points)^2, by way of z; from may be z. Depth first, until a block is so short that it
 * stays in the first-level cache whatever the order. */
static void VARIANT(add_squares_of_transform)(const VARIANT(plan) * p, const floats *from, floats *z, floats *sum,
                                              int64_t n) {
  const float *const ends = p->w + 2 * (p->k - p->m);
  if (n > NEAR) {
    const int64_t quarter = n / 2 / LANES;
    VARIANT(split_level)(z, from, n, VARIANT(level_of)(p, n));
    for (int64_t b = 0; b < 4 * quarter; b += quarter)
      VARIANT(add_squares_of_transform)(p, z + b, z + b, sum + b, n / 4);
    return;
  }
  for (int64_t size = n; size > p->m; size /= 4)
    for (int64_t b = 0; b < 2 * n / LANES; b += 2 * size / LANES)
      VARIANT(split_level)(z + b, size == n ? from : z + b, size, VARIANT(level_of)(p, size));
  for (int64_t b = 0; b < 2 * n / LANES; b += 2 * p->m)
    if (p->m == SHORTEST)
      VARIANT(add_squares_of_blocks)(z + b, sum + b, SHORTEST, ends);
    else
      VARIANT(add_squares_of_blocks)(z + b, sum + b, 2 * SHORTEST, ends);
}

/* k times the inverse transform, in place. */
static void VARIANT(invert)(const VARIANT(plan) * p, floats *sum, int64_t n) {
  const float *const ends = p->w + 2 * (p->k - p->m);
  if (n > NEAR) {
    const int64_t quarter = n / 2 / LANES;
    for (int64_t b = 0; b < 4 * quarter; b += quarter) VARIANT(invert)(p, sum + b, n / 4);
    VARIANT(join_level)(sum, n, VARIANT(level_of)(p, n));
    return;
  }
  for (int64_t b = 0; b < 2 * n / LANES; b += 2 * p->m)
    if (p->m == SHORTEST)
      VARIANT(invert_blocks)(sum + b, SHORTEST, ends);
    else
      VARIANT(invert_blocks)(sum + b, 2 * SHORTEST, ends);
  for (int64_t size = 4 * p->m; size <= n; size *= 4)
    for (int64_t b = 0; b < 2 * n / LANES; b += 2 * size / LANES)
      VARIANT(join_level)(sum + b, size, VARIANT(level_of)(p, size));
}

/* out += scale times the imaginary part of k times the inverse transform; sum is overwritten. The last butterflies of more
 * than NEAR points make imaginary parts alone. */
static void VARIANT(add_inverse)(const VARIANT(plan) * p, float *out, floats *sum, float scale) {
  const int64_t k = p->k, quarter = k / 2 / LANES;
  if (k <= NEAR) {
    VARIANT(invert)(p, sum, k);
    for (int64_t c = 0; c < k / LANES; c++) *(floats_u *)(out + c * LANES) += sum[2 * c + 1] * scale;
    return;
  }
  for (int64_t b = 0; b < 4 * quarter; b += quarter) VARIANT(invert)(p, sum + b, k / 4);
  const floats *w = VARIANT(level_of)(p, k), *z0 = sum, *z1 = z0 + quarter, *z2 = z1 + quarter, *z3 = z2 + quarter;
  for (int64_t j = 0; j < quarter; j += 2, w += 6, out += LANES) {
    const floats ar = z1[j] * w[0] + z1[j + 1] * w[1], ai = z1[j + 1] * w[0] - z1[j] * w[1];
    const floats bi = z2[j + 1] * w[2] - z2[j] * w[3];
    const floats cr = z3[j] * w[4] + z3[j + 1] * w[5], ci = z3[j + 1] * w[4] - z3[j] * w[5];
    const floats si = z0[j + 1] + bi, di = z0[j + 1] - bi, ti = ai + ci, er = ar - cr;
    *(floats_u *)out += (si + ti) * scale;
    *(floats_u *)(out + k / 4) += (di + er) * scale;
    *(floats_u *)(out + k / 2) += (si - ti) * scale;
    *(floats_u *)(out + k / 2 + k / 4) += (di - er) * scale;
  }
}

#undef SPLIT
#undef JOIN_FOUR
#undef SHORTEST
