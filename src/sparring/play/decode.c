/* Attention of one new token per row over the keys that the row has stored, each row over its own and no others.

   Compiled by native.py for a model's sizes: GROUPS key heads, SHARED query heads for each, WIDTH numbers a head, which
   are bfloat16 where HALF is defined and float32 elsewhere. Sums are float32. Keys are taken a block at a time with a
   running maximum (Milakov and Gimelshein 2018, arXiv 1805.02867), so nothing is as long as a row. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined __AVX512BW__ && defined __AVX512VL__
#include <immintrin.h>
#define MASKED /* reads some of a vector's numbers without a way through memory */
#endif

#define BLOCK 32
#define LANES (WIDTH % 16 ? 8 : 16)
#define PARTS ((WIDTH + LANES - 1) / LANES)
/* Heads that a thread takes together: two that write to one line of the cache would wait for each other. */
#define TAKEN (WIDTH * sizeof(number) % 64 ? GROUPS : 1)
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float four __attribute__((vector_size(16)));

#ifdef HALF
typedef uint16_t number;
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

static inline lanes widen(halves x) { return (lanes)(__builtin_convertvector(x, bits) << 16); }

static inline number narrow(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    if (x != x) return 0x7fc0; /* rounding could make an infinity of it, or a number */
    return (number)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
#else
typedef float number;
typedef lanes halves;

static inline lanes widen(lanes x) { return x; }

static inline number narrow(float x) { return x; }
#endif

/* The numbers from LANES · part on, zeros behind the last. */
static inline __attribute__((always_inline)) lanes load(const number *from, int part) {
    int left = WIDTH - part * LANES;
    halves x = {0};
    from += part * LANES;
    if (left >= LANES) memcpy(&x, from, LANES * sizeof *from);
#if LANES == 8 && defined MASKED
#ifdef HALF
    else x = (halves)_mm_maskz_loadu_epi16((1 << left) - 1, from);
#else
    else x = (halves)_mm256_maskz_loadu_ps((1 << left) - 1, from);
#endif
#else
    else memcpy(&x, from, left * sizeof *from);
#endif
    return widen(x);
}

/* Of an x that is not positive, good to two units in the last place: libm's is a call for each number. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    uint32_t word = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &word, 4);
    return p * power;
}

static inline float total(lanes x) {
    four part[LANES / 4];
    memcpy(part, &x, sizeof x);
    for (int n = LANES / 8; n; n /= 2)
        for (int i = 0; i < n; i++) part[i] += part[i + n];
    return (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
}

/* Hardware does not look ahead beyond a page, and a row's keys are a few pages. */
static inline void fetch(const number *from) {
    for (int at = 0; at < WIDTH * (int)sizeof(number); at += 64) __builtin_prefetch((const char *)from + at);
}

/* query [rows, GROUPS · SHARED, WIDTH]; key, value [rows, GROUPS, WIDTH] of the new tokens, which are stored first, at
   end[row] − 1; keys, values [rows, GROUPS, room, WIDTH], of which a row sees those from first[row] to end[row]. */
void decode(const number *query, const number *key, const number *value, number *keys, number *values, number *out,
            const int64_t *first, const int64_t *end, int64_t rows, int64_t room, float scale) {
#pragma omp parallel for schedule(dynamic, TAKEN)
    for (int64_t item = 0; item < rows * GROUPS; item++) {
        int64_t start = first[item / GROUPS], stop = end[item / GROUPS];
        number *k = keys + item * room * WIDTH, *v = values + item * room * WIDTH;
        memcpy(k + (stop - 1) * WIDTH, key + item * WIDTH, WIDTH * sizeof *k);
        memcpy(v + (stop - 1) * WIDTH, value + item * WIDTH, WIDTH * sizeof *v);
        lanes q[SHARED][PARTS], mixed[SHARED][PARTS];
        float weight[SHARED][BLOCK], top[SHARED], sum[SHARED];
        EACH(h, SHARED) {
            top[h] = -INFINITY, sum[h] = 0;
            EACH(i, PARTS) {
                q[h][i] = load(query + (item * SHARED + h) * WIDTH, i) * scale;
                mixed[h][i] = (lanes){0};
            }
        }
        for (int64_t from = start; from < stop; from += BLOCK) {
            int size = stop - from < BLOCK ? stop - from : BLOCK;
            for (int t = 0; t < size; t++) {
                lanes dot[SHARED];
                EACH(h, SHARED) dot[h] = (lanes){0};
                fetch(v + (from + t) * WIDTH);
                EACH(i, PARTS) {
                    lanes x = load(k + (from + t) * WIDTH, i);
                    EACH(h, SHARED) dot[h] += q[h][i] * x;
                }
                EACH(h, SHARED) weight[h][t] = total(dot[h]);
            }
            for (int h = 0; h < SHARED; h++) { /* unrolled, its loops over keys would not be made of vectors */
                float *w = weight[h], most = top[h], part = 0;
                for (int t = size; t < BLOCK; t++) w[t] = -INFINITY;
#pragma omp simd reduction(max : most)
                for (int t = 0; t < BLOCK; t++) most = w[t] > most ? w[t] : most;
                float kept = exponential(top[h] - most);
#pragma omp simd reduction(+ : part)
                for (int t = 0; t < BLOCK; t++) {
                    w[t] = t < size ? exponential(w[t] - most) : 0;
                    part += w[t];
                }
                sum[h] = sum[h] * kept + part;
                top[h] = most;
                EACH(i, PARTS) mixed[h][i] *= kept;
            }
            for (int t = 0; t < size; t++) {
                if (from + BLOCK + t < stop) fetch(k + (from + BLOCK + t) * WIDTH);
                EACH(i, PARTS) {
                    lanes x = load(v + (from + t) * WIDTH, i);
                    EACH(h, SHARED) mixed[h][i] += weight[h][t] * x;
                }
            }
        }
        for (int h = 0; h < SHARED; h++)
            for (int i = 0; i < WIDTH; i++)
                out[(item * SHARED + h) * WIDTH + i] = narrow(mixed[h][i / LANES][i % LANES] / sum[h]);
    }
}
