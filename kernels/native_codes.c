/* Rows in codes of a few bits: their rotation, encoding and unpacking; a part of native_lanes.c, compiled for each number
 * of LANES. The modules rotation.py and codes.py define them.
 */

/* The stages of strides 1 to CODES_NEAR / 2, of neighbours: CODES_NEAR of them at a time in each lane. */
static void VARIANT(near_stages)(float *x, int64_t size) {
  for (int64_t start = 0; start < size; start += CODES_NEAR * LANES) {
    float apart[CODES_NEAR][LANES];
    floats tile[CODES_NEAR];
    for (int l = 0; l < LANES; l++)
      UNROLL for (int j = 0; j < CODES_NEAR; j++) apart[j][l] = x[start + l * CODES_NEAR + j];
    memcpy(tile, apart, sizeof tile);
    UNROLL for (int stride = 1; stride < CODES_NEAR; stride *= 2)
      UNROLL for (int j = 0; j < CODES_NEAR; j++) {
        if (j & stride) continue;
        const floats a = tile[j], b = tile[j + stride];
        tile[j] = a + b, tile[j + stride] = a - b;
      }
    memcpy(apart, tile, sizeof tile);
    for (int l = 0; l < LANES; l++)
      UNROLL for (int j = 0; j < CODES_NEAR; j++) x[start + l * CODES_NEAR + j] = apart[j][l];
  }
}

/* One stage of stride numbers. */
INLINE void VARIANT(stage)(float *x, int64_t size, int64_t stride) {
  for (int64_t start = 0; start < size; start += 2 * stride) {
    int64_t i = start;
    for (; i + LANES <= start + stride; i += LANES) {
      const floats a = *(const floats_u *)(x + i), b = *(const floats_u *)(x + i + stride);
      *(floats_u *)(x + i) = a + b, *(floats_u *)(x + i + stride) = a - b;
    }
    for (; i < start + stride; i++) {
      const float a = x[i], b = x[i + stride];
      x[i] = a + b, x[i + stride] = a - b;
    }
  }
}

/* A Walsh-Hadamard matrix along 2^bit numbers, in place; the additions are those of rotation.py, in its order: the axis of
 * long strides first.
 */
static void VARIANT(hadamard)(float *x, int bit) {
  const int64_t size = (int64_t)1 << bit, inner = (int64_t)1 << (bit - bit / 2);
  const int near = inner >= CODES_NEAR && size >= CODES_NEAR * LANES;
  for (int axis = 0; axis < 2; axis++) {
    const int64_t end = axis ? inner : size;
    if (axis && near) VARIANT(near_stages)(x, size);
    for (int64_t stride = axis ? near ? CODES_NEAR : 1 : inner; stride < end; stride *= 2) VARIANT(stage)(x, size, stride);
  }
  const float root = (float)(1 / __builtin_sqrt((double)size));
  for (int64_t i = 0; i < size; i++) x[i] *= root;
}

/* Blocks of the powers of two in k, the largest first. */
static void VARIANT(hadamards)(float *x, int64_t k) {
  for (int bit = 62; bit >= 0; bit--)
    if (k >> bit & 1) {
      VARIANT(hadamard)(x, bit);
      x += (int64_t)1 << bit;
    }
}

/* out[r] = the rotation of rows[r], or of what is rotated back; order (k) is null where k is a power of two. Entry i of
 * what is between comes from order[i]. Out is contiguous, work has k numbers.
 */
static void VARIANT(sp_rotate)(float *out, float *work, const float *rows, int64_t row_stride, int64_t n, int64_t k,
                               const float *signs, const int64_t *order, int back) {
  for (int64_t r = 0; r < n; r++, out += k, rows += row_stride) {
    float *first = order ? work : out;
    for (int64_t i = 0; i < k; i++) first[i] = back ? rows[i] : rows[i] * signs[i];
    VARIANT(hadamards)(first, k);
    if (back)
      for (int64_t i = 0; i < k; i++) first[i] *= signs[i];
    if (!order) continue;
    for (int64_t i = 0; i < k; i++) out[i] = first[order[i]];
    if (!back)
      for (int64_t i = 0; i < k; i++) out[i] *= signs[i];
    VARIANT(hadamards)(out, k);
    if (back)
      for (int64_t i = 0; i < k; i++) out[i] *= signs[i];
  }
}

/* Codes of the levels nearest to rows[r] / rms, packed, with the rows' lengths and their products with the levels. Edges
 * are the 2^bits - 1 middles between levels.
 */
static void VARIANT(sp_encode)(uint8_t *out, int64_t out_stride, double *length, double *along, const float *rows,
                               int64_t row_stride, int64_t n, int64_t k, int bits, const float *edges,
                               const float *levels) {
  const int count = 1 << bits, per = 8 / bits;
  for (int64_t r = 0; r < n; r++, out += out_stride, rows += row_stride) {
    double sum[CODES_LANES] = {0}, product[CODES_LANES] = {0};
    int64_t at = 0;
    for (; at + CODES_LANES <= k; at += CODES_LANES)
      for (int l = 0; l < CODES_LANES; l++) sum[l] += (double)rows[at + l] * rows[at + l];
    for (; at < k; at++) sum[0] += (double)rows[at] * rows[at];
    double squares = 0, total = 0;
    for (int l = 0; l < CODES_LANES; l++) squares += sum[l];
    length[r] = __builtin_sqrt(squares);
    const float rms = (float)(length[r] / __builtin_sqrt((double)k)), divisor = rms > 0 ? rms : __builtin_inff();
    for (int64_t c = 0; c < k; c += CODES_CHUNK) {
      const int64_t some = smaller(k - c, CODES_CHUNK);
      int32_t code[CODES_CHUNK] = {0};
      float unit[CODES_CHUNK] = {0};
      for (int64_t i = 0; i < some; i++) unit[i] = rows[c + i] / divisor;
      for (int e = 0; e < count - 1; e++)
        for (int64_t i = 0; i < CODES_CHUNK; i++) code[i] += unit[i] >= edges[e];
      float level[CODES_CHUNK];
      for (int64_t i = 0; i < some; i++) level[i] = rows[c + i] * levels[code[i]];
      for (int64_t i = some; i < CODES_CHUNK; i++) level[i] = 0, code[i] = 0;
      for (int64_t i = 0; i < CODES_CHUNK; i += CODES_LANES)
        for (int l = 0; l < CODES_LANES; l++) product[l] += (double)level[i + l];
      for (int64_t b = 0; b < (some + per - 1) / per; b++) {
        int byte = 0;
        for (int j = 0; j < per; j++) byte |= code[b * per + j] << (bits * j);
        out[c / per + b] = (uint8_t)byte;
      }
    }
    for (int l = 0; l < CODES_LANES; l++) total += product[l];
    along[r] = total;
  }
}

/* The levels of packed codes: table (256, 8 / bits) says what each byte holds. */
INLINE void VARIANT(unpack)(float *out, const uint8_t *codes, int64_t k, const int per, const float *table) {
  int64_t b = 0;
  for (; (b + 1) * per <= k; b++) memcpy(out + b * per, table + codes[b] * per, (size_t)per * sizeof *out);
  if (b * per < k) memcpy(out + b * per, table + codes[b] * per, (size_t)(k - b * per) * sizeof *out);
}

static void VARIANT(sp_unpack)(float *out, int64_t out_stride, const uint8_t *codes, int64_t code_stride, int64_t n,
                               int64_t k, int bits, const float *table) {
  for (int64_t r = 0; r < n; r++, out += out_stride, codes += code_stride) {
    if (bits == 4)
      VARIANT(unpack)(out, codes, k, 2, table);
    else if (bits == 2)
      VARIANT(unpack)(out, codes, k, 4, table);
    else
      VARIANT(unpack)(out, codes, k, 8, table);
  }
}
