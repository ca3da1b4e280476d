/* Tensor sketches in the frequency domain; a part of native_lanes.c, compiled for each number of LANES.
 *
 * Let x be the left factor's sketch and y the right one's, and z = x + iy. The circular convolution x * y, which is the
 * sketch of their outer product, is half the imaginary part of z * z: so one complex transform a step serves both
 * factors, Z^2 is summed over the steps, and one inverse transform gives the sum. The order of the frequencies does not
 * matter to squares: the transform forward leaves them in an order of its own, the inverse takes them so.
 * The smaller one of x and y would drown in the other one's rounding, hence both are first brought to one size by powers
 * of two whose product is one.
 */

/* The exponent, four times over, of a number between the norm of x and twice or so that: the norm is at most the root of
 * the largest entry times the sum. Zero where x is. */
INLINE int VARIANT(size_of)(const float *x, int64_t count) {
  floats most = {0}, total = {0};
  for (int64_t e = 0; e < count; e += LANES) {
    floats v = {0};
    if (e + LANES <= count)
      v = *(const floats_u *)(x + e);
    else
      memcpy(&v, x + e, (size_t)(count - e) * sizeof *x);
    v = (floats)((words)v & ~NEGATIVE);
    const words larger = (words)(v > most);
    most = (floats)(((words)v & larger) | ((words)most & ~larger));
    total += v;
  }
  float peak = 0, sum = 0;
  uint32_t bits[2];
  for (int l = 0; l < LANES; l++) peak = most[l] > peak ? most[l] : peak, sum += total[l];
  memcpy(bits, &peak, sizeof peak), memcpy(bits + 1, &sum, sizeof sum);
  return (int)(bits[0] >> 23) + (int)(bits[1] >> 23 & 255);
}

INLINE float VARIANT(power_of_two)(int exponent) {
  const uint32_t bits = (uint32_t)(127 + exponent) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

/* Where each entry of a side belongs among the pairs of vectors, `part` 1 for imaginary ones, with its sign. */
INLINE void VARIANT(places)(uint32_t *to, const uint32_t *table, int64_t count, uint32_t part) {
  for (int64_t e = 0; e < count; e++) {
    const uint32_t column = table[e] & ~NEGATIVE;
    to[e] = (column + column / LANES * LANES + part * LANES) | (table[e] & NEGATIVE);
  }
}

/* Puts the entries of one block in their places, or adds them there. */
INLINE void VARIANT(put)(float *to, const float *x, const uint32_t *at, int64_t count, float scale, int add) {
  enum { RUN = 16 };
  for (int64_t e = 0; e < count; e += RUN) {
    float value[RUN];
    const int64_t run = smaller(RUN, count - e);
    if (run == RUN)
      UNROLL for (int h = 0; h < RUN; h += LANES)
        *(words_u *)(value + h) =
            (words)(*(const floats_u *)(x + e + h) * scale) ^ (*(const words_u *)(at + e + h) & NEGATIVE);
    else
      for (int64_t h = 0; h < run; h++) value[h] = at[e + h] & NEGATIVE ? -(x[e + h] * scale) : x[e + h] * scale;
    if (add)
      for (int64_t h = 0; h < run; h++) to[at[e + h] & ~NEGATIVE] += value[h];
    else if (run == RUN)
      UNROLL for (int h = 0; h < RUN; h++) to[at[e + h] & ~NEGATIVE] = value[h];
    else
      for (int64_t h = 0; h < run; h++) to[at[e + h] & ~NEGATIVE] = value[h];
  }
}

/* The sketch of one side: a first block writes all that the others add to. */
INLINE void VARIANT(put_side)(float *to, const float *x, const uint32_t *at, int64_t count, int64_t k, float scale) {
  VARIANT(put)(to, x, at, smaller(count, k), scale, 0);
  for (int64_t e = k; e < count; e += k) VARIANT(put)(to, x + e, at + e, smaller(count - e, k), scale, 1);
}

/* What a call sums over its steps: `given`, z and sum have k pairs of numbers; all but the places of entries stay zero
 * in `given`. */
typedef struct {
  VARIANT(plan) plan;
  float *given;
  floats *z, *sum;
  uint32_t *left, *right;
  int64_t o, i;
} VARIANT(spectrum);

/* Where a call's work space holds all but the sums; `rest` is what follows. */
INLINE VARIANT(spectrum) VARIANT(open_spectrum)(float *work, int64_t o, int64_t i, const spec *of, const float *w,
                                                float **rest) {
  const int64_t k = of->k;
  uint32_t *const left = (uint32_t *)(work + 4 * k);
  const VARIANT(spectrum) s = {VARIANT(open_plan)(w, k), work, (floats *)(work + 2 * k), 0, left, left + o, o, i};
  memset(work, 0, (size_t)(2 * k) * sizeof *work);
  VARIANT(places)(s.left, of->left, o, 0);
  VARIANT(places)(s.right, of->right, i, 1);
  *rest = work + 4 * k + o + i;
  return s;
}

/* Turns to the sums of example b; fresh ones hold nothing yet. */
INLINE void VARIANT(turn_to)(VARIANT(spectrum) * s, float *sums, int64_t b, int fresh) {
  s->sum = (floats *)(sums + b * 2 * s->plan.k);
  if (fresh) memset(s->sum, 0, (size_t)(2 * s->plan.k) * sizeof *sums);
}

/* Adds one step's factors x and y. */
INLINE void VARIANT(add_step)(const VARIANT(spectrum) * s, const float *x, const float *y) {
  const int64_t k = s->plan.k;
  const int x_size = VARIANT(size_of)(x, s->o), y_size = VARIANT(size_of)(y, s->i);
  const int far = (y_size - x_size) / 4, shift = far < -126 ? -126 : far > 126 ? 126 : far;
  const int there = x_size && y_size;
  VARIANT(put_side)(s->given, x, s->left, s->o, k, there ? VARIANT(power_of_two)(shift) : 0);
  VARIANT(put_side)(s->given, y, s->right, s->i, k, there ? VARIANT(power_of_two)(-shift) : 0);
  VARIANT(add_squares_of_transform)(&s->plan, (const floats *)s->given, s->z, s->sum, k);
}

/* sums[b] += the transform of R vec(sum_t left[b][t] (x) right[b][t]) for the examples b in [first, last), of a tensor
 * map over k columns, a power of two from 256 on. An example's sums are 2 k numbers; fresh ones are overwritten. work has
 * room for 4 k + o + i numbers; w is of sp_spectral_table. */
static void VARIANT(sp_spectral_outer)(float *sums, float *work, int fresh, const float *left, int64_t left_b,
                                       int64_t left_t, const float *right, int64_t right_b, int64_t right_t,
                                       int64_t first, int64_t last, int64_t steps, int64_t o, int64_t i, const spec *of,
                                       const float *w) {
  float *rest;
  VARIANT(spectrum) s = VARIANT(open_spectrum)(work, o, i, of, w, &rest);
  for (int64_t b = first; b < last; b++) {
    VARIANT(turn_to)(&s, sums, b, fresh);
    for (int64_t t = 0; t < steps; t++)
      VARIANT(add_step)(&s, left + b * left_b + t * left_t, right + b * right_b + t * right_t);
  }
}

/* The same for the windows [begin, end) of l windows of a convolution, as sp_windows_lanes, column e of its gradient
 * times scale[e] unless that is null; work has room for c j more numbers, and for end - begin times o, rounded up to
 * whole vectors. */
static void VARIANT(sp_spectral_windows)(float *sums, float *work, int fresh, const float *left, int64_t left_b,
                                         int64_t l, const float *right, int64_t right_b, int64_t plane,
                                         const int32_t *taps, const int32_t *windows, int64_t first, int64_t last,
                                         int64_t o, int64_t begin, int64_t end, int64_t c, int64_t j,
                                         const float *scale, const spec *of, const float *w) {
  const int64_t across = (o + LANES - 1) / LANES;
  floats *const panel = (floats *)work; /* of all windows, their numbers beside each other */
  float *y;
  VARIANT(spectrum) s = VARIANT(open_spectrum)(work + across * LANES * (end - begin), o, c * j, of, w, &y);
  for (int64_t b = first; b < last; b++) {
    VARIANT(turn_to)(&s, sums, b, fresh);
    for (int64_t r = 0; r < o; r += LANES)
      VARIANT(interleave)(panel + r / LANES, 1, across, left + b * left_b + r * l + begin, l,
                          (int)smaller(LANES, o - r), end - begin);
    for (int64_t t = begin; t < end; t++) {
      const float *at = right + b * right_b + windows[t];
      for (int64_t channel = 0; channel < c; channel++, at += plane)
        for (int64_t tap = 0; tap < j; tap++) y[channel * j + tap] = at[taps[tap]];
      if (scale)
        for (int64_t e = 0; e < c * j; e++) y[e] *= scale[e];
      VARIANT(add_step)(&s, (const float *)(panel + (t - begin) * across), y);
    }
  }
}

/* out[b] += half the imaginary part of the inverse transform of the sums of the examples b in [first, last), as above,
 * and of `number` more products, all of one k. Given sums are overwritten. Without them (null) the products' own are held
 * for TOGETHER examples at a time, in the second-level cache; work has room for 2 k TOGETHER numbers and for those of the
 * largest product. */
static void VARIANT(sp_finish)(float *out, int64_t out_stride, float *sums, float *work, const product *products,
                               int64_t number, int64_t first, int64_t last, int64_t k, const float *w) {
  const VARIANT(plan) p = VARIANT(open_plan)(w, k);
  const float scale = 0.5f / (float)k;
  for (int64_t begin = first; begin < last; begin += TOGETHER) {
    const int64_t there = smaller(TOGETHER, last - begin);
    float *const held = sums ? sums + begin * 2 * k : work;
    for (int64_t n = 0; n < number; n++) {
      const product *const x = products + n;
      VARIANT(sp_spectral_outer)(held, work + 2 * k * TOGETHER, !sums && n == 0, x->left + begin * x->left_b, x->left_b,
                                 x->left_t, x->right + begin * x->right_b, x->right_b, x->right_t, 0, there, x->steps,
                                 x->o, x->i, &x->of, w);
    }
    for (int64_t b = 0; b < there; b++)
      VARIANT(add_inverse)(&p, out + (begin + b) * out_stride, (floats *)(held + b * 2 * k), scale);
  }
}
