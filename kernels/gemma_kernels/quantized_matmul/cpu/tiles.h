// The products of a tile, for one set of instructions: matmul.c includes this file once for each.
//
// Before it defines NAME(x), the names' ending; LANES, floats of a vector; ROWS, of activations taken
// at once; BIAS8, what `unpack` adds to 8-bit codes; and
//   v8f from_half(const uint16_t*)     8 float16 numbers
//   vec widen(const uint8_t*)          LANES signed bytes
//   vec nibbles(const uint8_t*, int high, const float values[16])  what halves of LANES bytes stand for
//   vec quad(const float*)             4 floats, again and again
//   vec spread(v8f, int h)             floats h * LANES / 4 and on, each four times
//   v32 unpack(v32), signed codes as `dots` takes them, and
//   v8i dots(v8i, const v32 u[], const int8_t* x, int quads, int bits)
//       adds products of 8 rows of codes with 4 * quads activations: rows are lanes.

enum { NAME(VECTORS) = 32 / LANES };  // of a quad: 8 rows and 4 columns

// 8 factors of a group: float32, float16 or bfloat16.
INLINE v8f NAME(factors)(const Factors* f, long at) {
  v8f out;
  if (f->type == XLA_FFI_DataType_F16) return NAME(from_half)((const uint16_t*)f->data + at);
  if (f->type == XLA_FFI_DataType_F32) {
    memcpy(&out, (const float*)f->data + at, sizeof out);
    return out;
  }
  v8i bits = {0};
  for (int r = 0; r < 8; r++) bits[r] = ((const uint16_t*)f->data)[at + r] << 16;
  memcpy(&out, &bits, sizeof out);
  return out;
}

// float32: N rows of activations with 8 rows of the matrix, which are widened once for all N.
INLINE void NAME(float_tile)(const Product* p, long t, long m, const int N, const int bits) {
  enum { V = NAME(VECTORS) };
  vec acc[N][V];
  for (int n = 0; n < N; n++)
    for (int h = 0; h < V; h++) acc[n][h] = NAME(quad)(zeros);
  const uint8_t* codes = p->codes + t * p->blocks * bits * 32;
  long at = t * p->groups * 8;
  int left = p->group;
  vec scale[V], offset[V];
  for (long b = 0; b < p->blocks; b++, codes += bits * 32) {
    for (int k = 0; k < bits * 32; k += 64) __builtin_prefetch(codes + AHEAD + k);
    for (int half = 0; half < 2; half++) {
      v8f f = NAME(factors)(&p->scale, at);
      for (int h = 0; h < V; h++) scale[h] = NAME(spread)(f, h);
      if (p->offset.data) f = NAME(factors)(&p->offset, at);
      for (int h = 0; h < V; h++) offset[h] = p->offset.data ? NAME(spread)(f, h) : NAME(quad)(zeros);
      for (int q = 0; q < 4; q++) {
        const float* x = p->x + m * p->I + b * 32 + half * 16 + q * 4;
        vec w[V];
        for (int h = 0; h < V; h++) {
          w[h] = bits == 8 ? NAME(widen)(codes + (4 * half + q) * 32 + h * LANES)
                           : NAME(nibbles)(codes + q * 32 + h * LANES, half, p->values);
          w[h] = w[h] * scale[h] + offset[h];
        }
        for (int n = 0; n < N; n++) {
          vec v = NAME(quad)(x + n * p->I);
          for (int h = 0; h < V; h++) acc[n][h] += w[h] * v;
        }
      }
      if ((left -= 16) == 0) left = p->group, at += 8;
    }
  }
  for (int n = 0; n < N; n++) {
    float sums[32];
    memcpy(sums, acc[n], sizeof sums);
    for (int r = 0; r < 8; r++)
      p->y[(m + n) * p->O + t * 8 + r] = (sums[4 * r] + sums[4 * r + 1]) + (sums[4 * r + 2] + sums[4 * r + 3]);
  }
}

// Whole numbers: activations rounded as `round_row` does. `parts` of a tile have scales of their own.
INLINE void NAME(int8_tile)(const Product* p, long t, long m, const int N, const int bits, const int parts) {
  v8f acc[N];
  for (int n = 0; n < N; n++) acc[n] = (v8f){0};
  const uint8_t* codes = p->codes + t * p->blocks * bits * 32;
  long at = t * p->groups * 8;
  int left = p->group;
  const int bias = bits == 8 ? BIAS8 : p->bias;
  for (long b = 0; b < p->blocks; b++, codes += bits * 32) {
    v32 u[8];
    if (N == 1)
      for (int k = 0; k < bits * 32; k += 64) __builtin_prefetch(codes + AHEAD + k);
    for (int q = 0; q < bits; q++) memcpy(&u[q], codes + q * 32, 32);
    if (bits == 8)
      for (int q = 0; q < 8; q++) u[q] = NAME(unpack)(u[q]);
    else
      for (int q = 0; q < 4; q++) {
        u[4 + q] = (v32)((v16u)u[q] >> 4) & 15;
        u[q] = u[q] & 15;
      }
    for (int part = 0; part < parts; part++) {
      v8f scale = NAME(factors)(&p->scale, at), offset = {0};
      if (p->offset.data) offset = NAME(factors)(&p->offset, at);
      for (int n = 0; n < N; n++) {
        const long k = (m + n) * p->blocks + b;
        const int sum = parts == 2 ? p->sums[2 * k + part] : p->sums[2 * k] + p->sums[2 * k + 1];
        const float unit = p->units[k];
        v8i dot = (v8i){0} - bias * sum;
        dot = NAME(dots)(dot, u + 4 * part, p->rounded + k * 32 + 16 * part, 8 / parts, bits);
        acc[n] += (scale * unit) * __builtin_convertvector(dot, v8f);
        if (p->offset.data) acc[n] += offset * (unit * sum);
      }
      if ((left -= 32 / parts) == 0) left = p->group, at += 8;
    }
  }
  for (int n = 0; n < N; n++) memcpy(p->y + (m + n) * p->O + t * 8, &acc[n], sizeof acc[n]);
}

INLINE void NAME(tile)(const Product* p, long t, long m, const int N) {
  if (!p->int8) return p->bits == 8 ? NAME(float_tile)(p, t, m, N, 8) : NAME(float_tile)(p, t, m, N, 4);
  if (p->group % 32) return p->bits == 8 ? NAME(int8_tile)(p, t, m, N, 8, 2) : NAME(int8_tile)(p, t, m, N, 4, 2);
  return p->bits == 8 ? NAME(int8_tile)(p, t, m, N, 8, 1) : NAME(int8_tile)(p, t, m, N, 4, 1);
}

// A block of rows for all of some tiles, so that both stay in caches.
static void NAME(products)(const Product* p, long t0, long t1) {
  for (long m0 = 0; m0 < p->R; m0 += BLOCK) {
    const long m1 = m0 + BLOCK < p->R ? m0 + BLOCK : p->R;
    for (long t = t0; t < t1; t++) {
      long m = m0;
      for (; m + ROWS <= m1; m += ROWS) NAME(tile)(p, t, m, ROWS);
      if (ROWS > 4 && m + 4 <= m1) NAME(tile)(p, t, m, 4), m += 4;
      if (m + 2 <= m1) NAME(tile)(p, t, m, 2), m += 2;
      if (m < m1) NAME(tile)(p, t, m, 1);
    }
  }
}

// Activations of a row as int8, with a unit per 32 (max |x| / 127) and a sum per 16.
static void NAME(round_row)(const Product* p, long m) {
  const v8f magic = (v8f){0} + 12582912.f;  // 1.5 * 2 ** 23: what is added to it is rounded, ties to even
  for (long b = 0; b < p->blocks; b++) {
    const long k = m * p->blocks + b;
    v8f x[4];
    v8i top = {0};
    memcpy(x, p->x + k * 32, sizeof x);
    for (int i = 0; i < 4; i++) {
      const v8i size = (v8i)x[i] & 0x7fffffff, more = size > top;  // as whole numbers: NaN is the largest
      top = (size & more) | (top & ~more);
    }
    int bits = 0;
    for (int i = 0; i < 8; i++) bits = top[i] > bits ? top[i] : bits;
    float unit;
    memcpy(&unit, &bits, sizeof unit);
    p->units[k] = unit /= 127.f;
    for (int i = 0; i < 4; i++) {
      const v8i codes = (v8i)(x[i] / (unit == 0.f ? 1.f : unit) + magic) - (v8i)magic;
      const v8c narrow = __builtin_convertvector(codes, v8c);
      memcpy(p->rounded + k * 32 + i * 8, &narrow, sizeof narrow);
      int sum = 0;
      for (int r = 0; r < 8; r++) sum += codes[r];
      p->sums[2 * k + i / 2] = i % 2 ? p->sums[2 * k + i / 2] + sum : sum;
    }
  }
}

static const Instructions NAME(instructions) = {NAME(products), NAME(round_row)};
