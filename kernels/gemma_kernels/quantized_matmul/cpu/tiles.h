// The products of tiles, for one set of instructions: matmul.c includes this file once for each.
//
// Before it defines NAME(x), the names' ending; ROWS, of activations taken at once; BIAS8, what
// `unpack` adds to 8-bit codes; FLOAT(x), the ending of the set whose float32 products it uses. If
// that is itself, also LANES, floats of a `vec`, and FLOAT_ROWS; and functions, these for all sets:
//   v8f from_half(const uint16_t*)     8 float16 numbers
//   v32 unpack(v32)                    signed codes as `dots` takes them
//   void dots(v8i acc[N], const v32 u[], const int8_t* x, int N, int quads, int bits)
//       adds products of 8 rows of codes, which are lanes, with 4 * quads of N rows of activations,
//       which are 32 apart
// and these for float32:
//   vec widen(const uint8_t*)          LANES signed bytes
//   vec nibbles(const uint8_t*, int high, const Product*)  what halves of LANES bytes stand for
//   vec quad(const float*)             4 floats, again and again
//   vec spread(v8f, int h)             floats h * LANES / 4 and on, each four times

// 8 factors of a group: float32, float16 or bfloat16.
INLINE v8f NAME(factors)(const Factors* f, long at) {
  if (f->type == XLA_FFI_DataType_F16) return NAME(from_half)((const uint16_t*)f->data + at);
  if (f->type == XLA_FFI_DataType_F32) return *(const v8f_at*)((const float*)f->data + at);
  return (v8f)(__builtin_convertvector(*(const v8h_at*)((const uint16_t*)f->data + at), v8i) << 16);
}

#ifdef FLOAT_ROWS
enum { NAME(VECTORS) = 32 / LANES };  // of a quad: 8 rows and 4 columns

// 4 columns of 8 rows, as codes stand for them before scale and offset.
INLINE void NAME(values)(const Product* p, const uint8_t* codes, int half, int q, const int bits, vec* w) {
  for (int h = 0; h < NAME(VECTORS); h++)
    w[h] = bits == 8 ? NAME(widen)(codes + (4 * half + q) * 32 + h * LANES)
                     : NAME(nibbles)(codes + q * 32 + h * LANES, half, p);
}

// float32: N rows of activations with 8 rows of the matrix. One row is multiplied with codes, and sums
// with their scale; for several, codes are widened once for all.
INLINE void NAME(float_tile)(const Product* p, long t, long m, const int N, const int bits) {
  enum { V = NAME(VECTORS) };
  const vec none = NAME(quad)(zeros);
  vec acc[FLOAT_ROWS][V], scale[V], offset[V];
  for (int n = 0; n < N; n++)
    for (int h = 0; h < V; h++) acc[n][h] = none;
  const uint8_t* codes = p->codes + t * p->blocks * bits * 32;
  long at = t * p->groups * 8;
  int left = p->group;
  for (long b = 0; b < p->blocks; b++, codes += bits * 32) {
    for (int k = 0; k < bits * 32; k += 64) __builtin_prefetch(codes + AHEAD + k);
    for (int half = 0; half < 2; half++) {
      const float* x = p->x + m * p->I + b * 32 + half * 16;
      v8f f = NAME(factors)(&p->scale, at);
      for (int h = 0; h < V; h++) scale[h] = NAME(spread)(f, h);
      if (p->offset.data) f = NAME(factors)(&p->offset, at);
      for (int h = 0; h < V; h++) offset[h] = p->offset.data ? NAME(spread)(f, h) : none;
      vec w[V], part[V], sum = none;
      for (int h = 0; h < V; h++) part[h] = none;
      for (int q = 0; q < 4; q++) {
        NAME(values)(p, codes, half, q, bits, w);
        if (N > 1)
          for (int h = 0; h < V; h++) w[h] = w[h] * scale[h] + offset[h];
        for (int n = 0; n < N; n++) {
          const vec v = NAME(quad)(x + n * p->I + 4 * q);
          vec* to = N == 1 ? part : acc[n];
          for (int h = 0; h < V; h++) to[h] += w[h] * v;
          sum += v;
        }
      }
      if (N == 1)
        for (int h = 0; h < V; h++) acc[0][h] += part[h] * scale[h];
      if (N == 1 && p->offset.data)
        for (int h = 0; h < V; h++) acc[0][h] += offset[h] * sum;
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

#endif

// Whole numbers: N rows of rounded activations with 8 rows of the matrix.
INLINE void NAME(int8_tile)(const Product* p, long t, long m, const int N, const int bits, const int parts) {
  v8f acc[ROWS];
  for (int n = 0; n < N; n++) acc[n] = (v8f){0};
  const uint8_t* codes = p->codes + t * p->blocks * bits * 32;
  const int8_t* x = p->rounded + m * p->I;
  const float *unit = p->units + m * p->blocks, *sum = p->sums + m * p->blocks * parts;
  const int* begin = p->begins + m * p->blocks * parts;
  const Factors scales = p->scale, offsets = p->offset;
  const long blocks = p->blocks;
  long at = t * p->groups * 8;
  int left = p->group;
  for (long b = 0; b < blocks; b++) {
    v32 u[8];
    if (N == 1)
      for (int k = 0; k < bits * 32; k += 64) __builtin_prefetch(codes + AHEAD + k);
    for (int q = 0; q < bits; q++) u[q] = *(const v32_at*)(codes + q * 32);
    for (int q = 0; q < bits; q++) {
      if (bits == 8) {
        u[q] = NAME(unpack)(u[q]);
      } else {
        u[4 + q] = (v32)((v16u)u[q] >> 4) & 15;
        u[q] = u[q] & 15;
      }
    }
    for (int part = 0; part < parts; part++) {
      const v8f scale = NAME(factors)(&scales, at);
      v8i dot[ROWS];
      for (int n = 0; n < N; n++) dot[n] = (v8i){0} + begin[n * parts + part];
      NAME(dots)(dot, u + 4 * part, x + 16 * part, N, 8 / parts, bits);
      for (int n = 0; n < N; n++) acc[n] += (scale * unit[n]) * __builtin_convertvector(dot[n], v8f);
      if (offsets.data) {
        const v8f offset = NAME(factors)(&offsets, at);
        for (int n = 0; n < N; n++) acc[n] += offset * sum[n * parts + part];
      }
      if ((left -= 32 / parts) == 0) left = p->group, at += 8;
    }
    codes += bits * 32, x += N * 32, unit += N, sum += N * parts, begin += N * parts;
  }
  for (int n = 0; n < N; n++) *(v8f_at*)(p->y + (m + n) * p->O + t * 8) = acc[n];
}

INLINE void NAME(tile)(const Product* p, long t, long m, const int N, const int int8) {
#ifdef FLOAT_ROWS
  const int F = N < FLOAT_ROWS ? N : FLOAT_ROWS;
  for (int n = 0; n < N && !int8; n += F)
    if (p->bits == 8) NAME(float_tile)(p, t, m + n, F, 8);
    else NAME(float_tile)(p, t, m + n, F, 4);
#endif
  if (!int8) return;
  if (p->parts == 2) return p->bits == 8 ? NAME(int8_tile)(p, t, m, N, 8, 2) : NAME(int8_tile)(p, t, m, N, 4, 2);
  p->bits == 8 ? NAME(int8_tile)(p, t, m, N, 8, 1) : NAME(int8_tile)(p, t, m, N, 4, 1);
}

// How many rows are taken at once where `left` are left.
INLINE int NAME(rows)(long left) { return left >= ROWS ? ROWS : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// A block of rows for all of some tiles, so that both stay in caches.
INLINE void NAME(products)(const Product* p, long first, long end, const int int8) {
  for (long m0 = 0; m0 < p->R; m0 += BLOCK) {
    const long m1 = m0 + BLOCK < p->R ? m0 + BLOCK : p->R;
    for (long t = first; t < end; t++)
      for (long m = m0, n; m < m1; m += n) {
        n = NAME(rows)(m1 - m);
        if (n == ROWS) NAME(tile)(p, t, m, ROWS, int8);
        else if (n == 4) NAME(tile)(p, t, m, 4, int8);
        else if (n == 2) NAME(tile)(p, t, m, 2, int8);
        else NAME(tile)(p, t, m, 1, int8);
      }
  }
}

#ifdef FLOAT_ROWS
static void NAME(float_products)(const Product* p, long first, long end) { NAME(products)(p, first, end, 0); }
#endif
static void NAME(int8_products)(const Product* p, long first, long end) { NAME(products)(p, first, end, 1); }

// Activations as int8, with a unit per 32, max |x| / 127. Rows that are taken together lie block by
// block, so that a product reads on and on.
static void NAME(round_row)(const Product* p, long row) {
  const v8f magic = (v8f){0} + 12582912.f;  // 1.5 * 2 ** 23: what is added to it is rounded, ties to even
  const int bias = p->bits == 8 ? BIAS8 : p->bias;
  long m = row - row % BLOCK;  // the first of those that are taken together with this one
  const long end = m + BLOCK < p->R ? m + BLOCK : p->R;
  int N = NAME(rows)(end - m);
  while (m + N <= row) m += N, N = NAME(rows)(end - m);
  for (long b = 0; b < p->blocks; b++) {
    const long k = m * p->blocks + b * N + row - m;
    v8f x[4];
    v8i top = {0};
    for (int i = 0; i < 4; i++) {
      x[i] = *(const v8f_at*)(p->x + row * p->I + b * 32 + i * 8);
      const v8i size = (v8i)x[i] & 0x7fffffff, more = size > top;  // as whole numbers: NaN is the largest
      top = (size & more) | (top & ~more);
    }
    int bits = 0;
    for (int i = 0; i < 8; i++) bits = top[i] > bits ? top[i] : bits;
    float unit;
    memcpy(&unit, &bits, sizeof unit);
    p->units[k] = unit /= 127.f;
    v8i sums[2] = {{0}, {0}};
    for (int i = 0; i < 4; i++) {
      const v8i codes = (v8i)(x[i] / (unit == 0.f ? 1.f : unit) + magic) - (v8i)magic;
      *(v8c_at*)(p->rounded + k * 32 + i * 8) = __builtin_convertvector(codes, v8c);
      sums[p->parts == 2 ? i / 2 : 0] += codes;
    }
    for (int part = 0; part < p->parts; part++) {
      int sum = 0;
      for (int r = 0; r < 8; r++) sum += sums[part][r];
      p->sums[k * p->parts + part] = unit * sum;
      p->begins[k * p->parts + part] = -bias * sum;
    }
  }
}

static const Instructions NAME(instructions) = {FLOAT(float_products), NAME(int8_products), NAME(round_row)};

#undef NAME
#undef FLOAT
#undef ROWS
#undef BIAS8
#undef FLOAT_ROWS
#undef LANES
#undef vec
