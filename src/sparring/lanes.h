/* Vectors of sixteen floats, and numbers that are bfloat16 where HALF is defined and float32 elsewhere. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined __AVX512BW__ && defined __AVX512VL__
#define MASKED /* reads and writes some of a vector's numbers, without a way through memory */
#endif

#define LOG2E 1.44269504f
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

#ifdef HALF
typedef uint16_t number;
INLINE float widen(number x) {
    uint32_t word = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &word, 4);
    return wide;
}
#else
typedef float number;
INLINE float widen(number x) { return x; }
#endif

/* To bfloat16, as words. */
INLINE words halved(lanes x) {
    words word = (words)x, odd = (word >> 16) & 1, known = (words)(x == x);
    /* Rounding could make an infinity of what is no number */
    return (known & ((word + 0x7fff + odd) >> 16)) | (~known & 0x7fc0);
}

INLINE lanes load(const float *from) {
    lanes x;
    memcpy(&x, from, 64);
    return x;
}

/* Sixteen numbers, or `count` and zeros. */
INLINE lanes some(const float *from, int count) {
    if (count >= 16) return load(from);
#ifdef MASKED
    return (lanes)_mm512_maskz_loadu_ps((1 << count) - 1, from);
#else
    lanes x = {0};
    memcpy(&x, from, count * sizeof *from);
    return x;
#endif
}

/* Sixteen of x, or `count`. */
INLINE void put(lanes x, float *to, int count) {
    if (count >= 16) {
        memcpy(to, &x, 64);
        return;
    }
#ifdef MASKED
    _mm512_mask_storeu_ps(to, (1 << count) - 1, (__m512)x);
#else
    memcpy(to, &x, count * sizeof *to);
#endif
}

#ifdef HALF
/* The same as what the package's C reads and writes: `number`s. */
INLINE lanes wide(const number *from, int count) {
    halves x = {0};
    if (count >= 16) memcpy(&x, from, 32);
#ifdef MASKED
    else x = (halves)_mm256_maskz_loadu_epi16((1 << count) - 1, from);
#else
    else memcpy(&x, from, count * sizeof *from);
#endif
    return (lanes)(__builtin_convertvector(x, words) << 16);
}

INLINE void narrow(lanes x, number *to, int count) {
#ifdef __AVX512BF16__
    __m256bh made = _mm512_cvtneps_pbh((__m512)x);
#else
    halves made = __builtin_convertvector(halved(x), halves);
#endif
    if (count >= 16) {
        memcpy(to, &made, 32);
        return;
    }
#ifdef MASKED
    _mm256_mask_storeu_epi16(to, (1 << count) - 1, (__m256i)made);
#else
    memcpy(to, &made, count * sizeof *to);
#endif
}
#else
#define wide some
#define narrow put
#endif

INLINE float total(lanes x) {
    float sum = 0;
    EACH(i, 16) sum += x[i];
    return sum;
}

INLINE lanes choose(ints which, lanes yes, lanes no) { return (lanes)((which & (ints)yes) | (~which & (ints)no)); }

/* 2^x of an x of 126 at most, good to two units in the last place; 0 below 2^-126, which keeps sums from slow numbers. */
INLINE lanes power(lanes x) {
#ifdef __AVX512F__
    lanes n = (lanes)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT), r = x - n;
#else
    lanes kept = choose(x < -126.0f, (lanes){0} - 126.0f, x);
    lanes shifted = kept + 12582912.0f; /* the nearest whole number, in its last bits */
    ints n = (ints)shifted - (ints)((lanes){0} + 12582912.0f);
    lanes r = kept - (shifted - 12582912.0f);
#endif
    lanes p = (lanes){0} + 1.5403530e-4f; /* ln(2)^6 / 6! and so on */
    p = p * r + 1.3333558e-3f;
    p = p * r + 9.6181291e-3f;
    p = p * r + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
#ifdef __AVX512F__
    __mmask16 real = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return (lanes)_mm512_maskz_scalef_ps(real, (__m512)p, (__m512)n);
#else
    p *= (lanes)((n + 127) << 23);
    return choose(x < -126.0f, (lanes){0}, p);
#endif
}

/* 1 / (1 + e^-x). */
INLINE lanes sigmoid(lanes x) {
    lanes y = x * -LOG2E;
    lanes sum = 1.0f + power(choose(y > 126.0f, (lanes){0} + 126.0f, y));
#ifdef __AVX512F__
    /* Division takes as long as all the rest; one step of Newton's leaves an error of 2^-23 */
    lanes near = (lanes)_mm512_rcp14_ps((__m512)sum);
    return near * (2.0f - sum * near);
#else
    return 1.0f / sum;
#endif
}
