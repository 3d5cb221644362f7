/* Attention in rows of several sequences, forward and backward, in which a token sees at most two spans of its own row:
   a part of the prompt, and the tokens of its own sequence from somewhere on up to itself.

   Compiled by native.py for a model's sizes: GROUPS key heads, SHARED query heads for each, WIDTH numbers a head, which
   are bfloat16 where HALF is defined and float32 elsewhere. Sums, weights' maxima and gradients are float32. Rows are
   computed one by one, each from its own first token on, so that none depends on what stands beside it.

   Queries are taken a block at a time and lie in the lanes of vectors, keys one after the other: largest weights and
   sums are then taken lane by lane. Weights are made again in the backward pass (Dao et al. 2022, arXiv 2205.14135). Where
   the CPU multiplies pairs of bfloat16 (PAIRED), or tiles of them (TILED), products are its own. */

#include "lanes.h"

#define SIZE 32 /* queries of a block, and keys of one */
#define PARTS (SIZE / 16)
#define ROUNDED(x, to) (((x) + (to) - 1) / (to) * (to))
/* Heads that a thread takes together: two that write to one line of the cache would wait for each other. */
#define TAKEN (WIDTH * sizeof(number) % 64 ? GROUPS : 1)

/* What products are made of: rows of WIDE numbers, zero behind WIDTH. The right side of one has two layouts: [k, n], or,
   PAIRED, [k / 2, n, 2]. */
#ifdef __AVX512F__
#define ROWS 8
#else
#define ROWS 2
#endif
#if defined HALF && defined __AVX512BF16__
#define PAIRED
#if defined __AMX_BF16__ && !defined UNTILED
#define TILED
#include <sys/syscall.h>
#include <unistd.h>
#endif
typedef uint16_t operand;
#define WIDE ROUNDED(WIDTH, 32)
#define DEEP WIDE
#define TALL WIDE
#else
typedef float operand;
#define WIDE ROUNDED(WIDTH, 16)
#define DEEP WIDTH             /* of it where it is summed over */
#define TALL ROUNDED(WIDTH, 8) /* of it where it is the rows of a product */
#endif

/* The left side of a product: (i, k) is at[i * row + k * column]; `column` is 1 where PAIRED. */
struct left {
    const operand *at;
    int64_t row, column;
};

#ifdef TILED
struct tiles {
    uint8_t palette, start, zero[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

/* c [m, n] = a [m, k] b [k, n], or that much more; all three are multiples of 32. */
static void product(struct left a, const operand *b, float *c, int m, int n, int k, int more) {
    __asm__ volatile("" ::: "memory"); /* loading a tile does not tell the compiler that it reads */
    for (int i = 0; i < m; i += 32)
        for (int j = 0; j < n; j += 32) {
            float *to = c + (int64_t)i * n + j;
            if (more) {
                _tile_loadd(0, to, 4 * n);
                _tile_loadd(1, to + 16, 4 * n);
                _tile_loadd(2, to + 16 * n, 4 * n);
                _tile_loadd(3, to + 16 * n + 16, 4 * n);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int at = 0; at < k; at += 32) {
                const operand *rows = a.at + i * a.row + at, *columns = b + (int64_t)at * n + 2 * j;
                _tile_loadd(4, rows, 2 * a.row);
                _tile_loadd(6, columns, 4 * n);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, columns + 32, 4 * n);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, rows + 16 * a.row, 2 * a.row);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, to, 4 * n);
            _tile_stored(1, to + 16, 4 * n);
            _tile_stored(2, to + 16 * n, 4 * n);
            _tile_stored(3, to + 16 * n + 16, 4 * n);
        }
}
#else
/* Rows of a product: 16 columns of it, or 32, behind the other. */
INLINE void strip(struct left a, const operand *b, float *c, int m, int n, int k, int more, const int parts) {
    for (int i = 0; i < m; i += ROWS) {
        lanes sum[ROWS][2];
        EACH(r, ROWS) EACH(p, parts) {
            if (more) memcpy(&sum[r][p], c + (int64_t)(i + r) * n + 16 * p, 64);
            else sum[r][p] = (lanes){0};
        }
#ifdef PAIRED
        for (int at = 0; at < k; at += 2) {
            __m512bh x[2];
            EACH(p, parts) memcpy(&x[p], b + (int64_t)at * n + 32 * p, 64);
            EACH(r, ROWS) {
                int32_t both;
                memcpy(&both, a.at + (i + r) * a.row + at, 4);
                __m512bh y = (__m512bh)_mm512_set1_epi32(both);
                EACH(p, parts) sum[r][p] = (lanes)_mm512_dpbf16_ps((__m512)sum[r][p], y, x[p]);
            }
        }
#else
        for (int at = 0; at < k; at++) {
            lanes x[2];
            EACH(p, parts) memcpy(&x[p], b + (int64_t)at * n + 16 * p, 64);
            EACH(r, ROWS) {
                float y = a.at[(i + r) * a.row + at * a.column];
                EACH(p, parts) sum[r][p] += y * x[p];
            }
        }
#endif
        EACH(r, ROWS) EACH(p, parts) memcpy(c + (int64_t)(i + r) * n + 16 * p, &sum[r][p], 64);
    }
}

/* c [m, n] = a [m, k] b [k, n], or that much more; m is a multiple of 8, n of 16. */
static void product(struct left a, const operand *b, float *c, int m, int n, int k, int more) {
    const int apart = sizeof(float) / sizeof(operand); /* of a column's numbers: a pair, or one */
    int j = 0;
    for (; j + 32 <= n; j += 32) strip(a, b + apart * j, c + j, m, n, k, more, 2);
    if (j < n) strip(a, b + apart * j, c + j, m, n, k, more, 1);
}
#endif

/* 16 × 16 words from rows to columns. */
INLINE void turn16(const uint32_t *from, int64_t stride, uint32_t *to, int64_t apart) {
    words x[16];
    EACH(i, 16) memcpy(&x[i], from + i * stride, 64);
#define STAGE(s)                                                                                                      \
    {                                                                                                                 \
        words low, high;                                                                                              \
        EACH(e, 16) {                                                                                                 \
            low[e] = e & s ? 16 + e - s : e;                                                                          \
            high[e] = e & s ? 16 + e : e + s;                                                                         \
        }                                                                                                             \
        EACH(i, 16) if (!(i & s)) {                                                                                   \
            words one = x[i], other = x[i | s];                                                                       \
            x[i] = __builtin_shuffle(one, other, low), x[i | s] = __builtin_shuffle(one, other, high);                \
        }                                                                                                             \
    }
    STAGE(8) STAGE(4) STAGE(2) STAGE(1)
#undef STAGE
    EACH(i, 16) memcpy(to + i * apart, &x[i], 64);
}

/* [rows, columns] words to [columns, rows], both multiples of 16. */
static void turn(const void *from, void *to, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t j = 0; j < columns; j += 16)
            turn16((const uint32_t *)from + i * columns + j, columns, (uint32_t *)to + j * rows + i, rows);
}

/* `count` rows of WIDTH numbers, `stride` apart, to `room` of WIDE. */
static void gather(const number *from, int64_t stride, int64_t count, operand *to, int64_t room) {
    for (int64_t i = 0; i < room; i++, to += WIDE) {
        if (i < count) {
            const number *own = from + i * stride;
#ifdef PAIRED
            memcpy(to, own, WIDTH * sizeof *to);
#else
            for (int d = 0; d < WIDTH; d++) to[d] = widen(own[d]);
#endif
            for (int d = WIDTH; d < WIDE; d++) to[d] = 0;
        } else memset(to, 0, WIDE * sizeof *to);
    }
}

/* Numbers of a right side of k = SIZE rows of n; `rows` and `to` may be the same where not PAIRED. */
INLINE void pair(const operand *rows, operand *to, int n) {
#ifdef PAIRED
    for (int i = 0; i < SIZE; i += 2)
        for (int d = 0; d < n; d++) {
            uint32_t both = rows[i * n + d] | (uint32_t)rows[(i + 1) * n + d] << 16;
            memcpy(to + i * n + 2 * d, &both, 4);
        }
#else
    if (to != rows) memcpy(to, rows, SIZE * n * sizeof *to);
#endif
}

#ifdef PAIRED
/* [count, WIDE] to [WIDE, count], by way of `place`. */
static void sideways(const operand *rows, operand *to, operand *place, int64_t count) {
    for (int64_t i = 0; i < count; i += SIZE) pair(rows + i * WIDE, place + i * WIDE, WIDE);
    turn(place, to, count / 2, WIDE);
}
#endif

/* A row of weights or of their gradients. */
INLINE void keep(lanes low, lanes high, operand *to) {
#ifdef PAIRED
    __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    memcpy(to, &both, 64);
#else
    memcpy(to, &low, 64);
    memcpy(to + 16, &high, 64);
#endif
}

/* What the queries of a block see: of a row's tokens those in [from, to) and in [own, self]. */
struct block {
    ints from[PARTS], to[PARTS], own[PARTS], self[PARTS];
    int first, queries;          /* of the row */
    int start[2], end[2], parts; /* key blocks that any of them sees, in tokens of the row */
};

/* Places in a whole row of rows: spans [3, tokens]. */
static struct block look(const int32_t *spans, int64_t tokens, int64_t row, int first, int size) {
    struct block b = {.first = first, .queries = size - first < SIZE ? size - first : SIZE};
    int32_t prompt = INT32_MAX, behind = 0, own = INT32_MAX;
    for (int i = 0; i < SIZE; i++) {
        int64_t at = row + first + i;
        int real = i < b.queries, some = real && spans[tokens + at] > spans[at];
        /* Lanes without a query see all there is, which is zeros: they do not make a block a special one */
        int32_t from = real ? spans[at] - row : 0, to = real ? spans[tokens + at] - row : INT32_MAX;
        int32_t mine = real ? spans[2 * tokens + at] - row : 0, self = first + i;
        b.from[i / 16][i % 16] = from, b.to[i / 16][i % 16] = to;
        b.own[i / 16][i % 16] = mine, b.self[i / 16][i % 16] = self;
        if (some && from < prompt) prompt = from;
        if (some && to > behind) behind = to;
        if (real && mine < own) own = mine;
    }
    int last = ROUNDED(first + b.queries, SIZE);
    own = own / SIZE * SIZE, prompt = behind ? prompt / SIZE * SIZE : own, behind = ROUNDED(behind, SIZE);
    if (behind >= own || prompt >= own) {
        b.start[0] = prompt < own ? prompt : own, b.end[0] = last, b.parts = 1;
    } else {
        b.start[0] = prompt, b.end[0] = behind, b.start[1] = own, b.end[1] = last, b.parts = 2;
    }
    return b;
}

/* Whether every query sees all of the SIZE keys from `first` on. */
INLINE int all_seen(const struct block *b, int first) {
    ints hidden = {0};
    EACH(p, PARTS) {
        ints prompt = (b->from[p] <= first) & (b->to[p] >= first + SIZE);
        ints own = (b->own[p] <= first) & (b->self[p] >= first + SIZE - 1);
        hidden |= ~(prompt | own);
    }
    int any = 0;
    EACH(i, 16) any |= hidden[i];
    return !any;
}

/* x where a query sees the key, else −inf. */
INLINE lanes shown(const struct block *b, int p, lanes x, int key) {
    ints seen = ((b->from[p] <= key) & (b->to[p] > key)) | ((b->own[p] <= key) & (b->self[p] >= key));
    return choose(seen, x, (lanes){0} - INFINITY);
}

/* Memory of one thread, of several tables one after the other. */
struct room {
    char *at;
};

static void *take(struct room *room, int64_t bytes) {
    void *at = room->at;
    room->at += ROUNDED(bytes, 64);
    return at;
}

#define TABLE(type, count) take(&room, (count) * (int64_t)sizeof(type))

static int64_t longest(const int64_t *firsts, int64_t rows) {
    int64_t most = 0;
    for (int64_t r = 0; r < rows; r++) {
        int64_t size = ROUNDED(firsts[r + 1] - firsts[r], SIZE);
        most = size > most ? size : most;
    }
    return most;
}

#ifdef TILED
/* Others' tiles on this thread are as they were before: libraries remember what they have set up. */
#define BEGIN                                                                                                         \
    struct tiles before, own = {.palette = 1};                                                                        \
    for (int i = 0; i < 8; i++) own.bytes[i] = 64, own.rows[i] = 16;                                                  \
    _tile_storeconfig(&before);                                                                                       \
    _tile_loadconfig(&own);
#define END _tile_loadconfig(&before);
#else
#define BEGIN
#define END
#endif

/* 0 where this process may compute so. */
int refused(void) {
#ifdef TILED
    return syscall(SYS_arch_prctl, 0x1023, 18) != 0; /* ARCH_REQ_XCOMP_PERM of tiles' data */
#else
    return 0;
#endif
}

/* Queries, keys and values [tokens, heads, WIDTH] with `strides` of token and head, three times; `firsts` [rows + 1]
   where rows begin; `spans` [3, tokens]: from and to of what a token sees of its prompt, from of what it sees of its own
   sequence. To `out` [tokens, heads, WIDTH], and to `tops` and `shares` [heads, tokens] the largest score and one over
   the sum of the weights, relative to it. Returns how many threads found no memory. */
int forward(const number *query, const number *key, const number *value, const int64_t *strides, const int64_t *firsts,
            const int32_t *spans, number *out, float *tops, float *shares, int64_t rows, float scale) {
    int64_t tokens = firsts[rows], most = longest(firsts, rows);
    int failed = 0;
    scale *= LOG2E;
#pragma omp parallel reduction(+ : failed)
    {
        int64_t bytes = 4 * most * WIDE * sizeof(operand) + most * SIZE * (sizeof(float) + 2 * sizeof(operand)) +
                        3 * SIZE * WIDE * sizeof(float) + 1024;
        void *memory = aligned_alloc(64, ROUNDED(bytes, 64));
        failed += memory == NULL;
        BEGIN
#pragma omp for schedule(dynamic, TAKEN)
        for (int64_t item = 0; item < rows * GROUPS; item++) {
            if (memory == NULL) continue;
            struct room room = {memory};
            int64_t row = firsts[item / GROUPS], size = firsts[item / GROUPS + 1] - row, group = item % GROUPS;
            int64_t padded = ROUNDED(size, SIZE);
            operand *keys = TABLE(operand, padded * WIDE), *values = TABLE(operand, padded * WIDE);
            float *made = TABLE(float, padded * SIZE), *mixed = TABLE(float, SIZE * WIDE);
            operand *weights = TABLE(operand, padded * SIZE);
            operand *queries = TABLE(operand, SIZE * WIDE), *columns = TABLE(operand, SIZE * WIDE);
            gather(key + row * strides[2] + group * strides[3], strides[2], size, keys, padded);
            gather(value + row * strides[4] + group * strides[5], strides[4], size, values, padded);
#ifdef PAIRED
            operand *turned = TABLE(operand, padded * WIDE), *paired = TABLE(operand, padded * SIZE);
            sideways(values, turned, TABLE(operand, padded * WIDE), padded);
#endif
            for (int first = 0; first < size; first += SIZE) {
                struct block b = look(spans, tokens, row, first, size);
                for (int h = 0; h < SHARED; h++) {
                    int64_t head = group * SHARED + h;
                    gather(query + (row + first) * strides[0] + head * strides[1], strides[0], b.queries, queries, SIZE);
                    turn(queries, columns, SIZE, WIDE * sizeof(operand) / 4);
                    lanes top[PARTS], sum[PARTS];
                    EACH(p, PARTS) top[p] = (lanes){0} - 1e30f, sum[p] = (lanes){0};
                    float *at = made;
                    for (int part = 0; part < b.parts; part++) {
                        int start = b.start[part], count = b.end[part] - start;
                        product((struct left){keys + start * WIDE, WIDE, 1}, columns, at, count, SIZE, DEEP, 0);
                        for (int from = 0; from < count; from += SIZE) {
                            int all = all_seen(&b, start + from);
                            for (int t = from; t < from + SIZE; t++, at += SIZE) EACH(p, PARTS) {
                                lanes x = load(at + 16 * p) * scale;
                                if (!all) x = shown(&b, p, x, start + t);
                                memcpy(at + 16 * p, &x, 64);
                                top[p] = choose(x > top[p], x, top[p]);
                            }
                        }
                    }
                    int64_t count = (at - made) / SIZE;
                    for (int64_t t = 0; t < count; t++) {
                        lanes x[PARTS];
                        EACH(p, PARTS) {
                            x[p] = power(load(made + t * SIZE + 16 * p) - top[p]);
                            sum[p] += x[p];
                        }
                        keep(x[0], x[1], weights + t * SIZE);
                    }
#ifdef PAIRED
                    for (int64_t t = 0; t < count; t += SIZE) pair(weights + t * SIZE, paired + t * SIZE, SIZE);
                    const operand *w = paired;
#else
                    const operand *w = weights;
#endif
                    for (int part = 0; part < b.parts; part++) {
                        int start = b.start[part], seen = b.end[part] - start;
#ifdef PAIRED
                        struct left side = {turned + start, padded, 1};
#else
                        struct left side = {values + start * WIDE, 1, WIDE};
#endif
                        product(side, w, mixed, TALL, SIZE, seen, part);
                        w += (int64_t)seen * SIZE;
                    }
                    float share[SIZE], result[WIDE * SIZE] __attribute__((aligned(64)));
                    EACH(p, PARTS) {
                        lanes one = 1.0f / sum[p];
                        memcpy(share + 16 * p, &one, 64);
                        for (int i = 0; i < b.queries - 16 * p && i < 16; i++) {
                            tops[head * tokens + row + first + 16 * p + i] = top[p][i];
                            shares[head * tokens + row + first + 16 * p + i] = one[i];
                        }
                    }
                    for (int d = TALL; d < WIDE; d++) memset(mixed + d * SIZE, 0, SIZE * sizeof *mixed);
                    turn(mixed, result, WIDE, SIZE);
                    for (int i = 0; i < b.queries; i++) {
                        number *to = out + ((row + first + i) * GROUPS * SHARED + head) * WIDTH;
                        for (int d = 0; d < WIDTH; d += 16) narrow(load(result + i * WIDE + d) * share[i], to + d, WIDTH - d);
                    }
                }
            }
        }
        END
        free(memory);
    }
    return failed;
}

/* The same, the output and its gradient (strides of token and head behind the other six) and `tops` and `shares` to
   gradients of queries, keys and values, [tokens, heads, WIDTH] each. */
int backward(const number *query, const number *key, const number *value, const number *grad, const int64_t *strides,
             const int64_t *firsts, const int32_t *spans, const number *out, const float *tops, const float *shares,
             number *of_query, number *of_key, number *of_value, int64_t rows, float scale) {
    int64_t tokens = firsts[rows], most = longest(firsts, rows);
    int failed = 0;
    float power_scale = scale * LOG2E;
#pragma omp parallel reduction(+ : failed)
    {
        int64_t bytes = most * WIDE * (4 * sizeof(operand) + 2 * sizeof(float)) +
                        SIZE * WIDE * (7 * sizeof(operand) + 2 * sizeof(float)) +
                        SIZE * SIZE * (3 * sizeof(operand) + 2 * sizeof(float)) + 2048;
        void *memory = aligned_alloc(64, ROUNDED(bytes, 64));
        failed += memory == NULL;
        BEGIN
#pragma omp for schedule(dynamic, TAKEN)
        for (int64_t item = 0; item < rows * GROUPS; item++) {
            if (memory == NULL) continue;
            struct room room = {memory};
            int64_t row = firsts[item / GROUPS], size = firsts[item / GROUPS + 1] - row, group = item % GROUPS;
            int64_t padded = ROUNDED(size, SIZE);
            operand *keys = TABLE(operand, padded * WIDE), *values = TABLE(operand, padded * WIDE);
            float *key_sum = TABLE(float, padded * WIDE), *value_sum = TABLE(float, padded * WIDE);
            operand *queries = TABLE(operand, SIZE * WIDE), *query_columns = TABLE(operand, SIZE * WIDE);
            operand *grads = TABLE(operand, SIZE * WIDE), *grad_columns = TABLE(operand, SIZE * WIDE);
            operand *query_rows = TABLE(operand, SIZE * WIDE), *grad_rows = TABLE(operand, SIZE * WIDE);
            float *query_sum = TABLE(float, SIZE * WIDE), *result = TABLE(float, SIZE * WIDE);
            float *made = TABLE(float, SIZE * SIZE), *of_made = TABLE(float, SIZE * SIZE);
            operand *weights = TABLE(operand, SIZE * SIZE), *of_scores = TABLE(operand, SIZE * SIZE);
            operand *score_rows = TABLE(operand, SIZE * SIZE);
            gather(key + row * strides[2] + group * strides[3], strides[2], size, keys, padded);
            gather(value + row * strides[4] + group * strides[5], strides[4], size, values, padded);
            memset(key_sum, 0, padded * WIDE * sizeof *key_sum);
            memset(value_sum, 0, padded * WIDE * sizeof *value_sum);
#ifdef PAIRED
            operand *turned = TABLE(operand, padded * WIDE);
            sideways(keys, turned, TABLE(operand, padded * WIDE), padded);
#endif
            for (int first = 0; first < size; first += SIZE) {
                struct block b = look(spans, tokens, row, first, size);
                for (int h = 0; h < SHARED; h++) {
                    int64_t head = group * SHARED + h;
                    lanes top[PARTS] = {0}, share[PARTS] = {0}, slope[PARTS] = {0};
                    for (int i = 0; i < b.queries; i++) {
                        int64_t at = row + first + i;
                        const number *mixed = out + (at * GROUPS * SHARED + head) * WIDTH;
                        const number *upstream = grad + at * strides[6] + head * strides[7];
                        float dot = 0;
#pragma omp simd reduction(+ : dot)
                        for (int d = 0; d < WIDTH; d++) dot += widen(mixed[d]) * widen(upstream[d]);
                        top[i / 16][i % 16] = tops[head * tokens + at];
                        share[i / 16][i % 16] = shares[head * tokens + at];
                        slope[i / 16][i % 16] = dot;
                    }
                    gather(query + (row + first) * strides[0] + head * strides[1], strides[0], b.queries, queries, SIZE);
                    gather(grad + (row + first) * strides[6] + head * strides[7], strides[6], b.queries, grads, SIZE);
                    turn(queries, query_columns, SIZE, WIDE * sizeof(operand) / 4);
                    turn(grads, grad_columns, SIZE, WIDE * sizeof(operand) / 4);
                    pair(queries, query_rows, WIDE);
                    pair(grads, grad_rows, WIDE);
                    int more = 0;
                    for (int part = 0; part < b.parts; part++)
                        for (int from = b.start[part]; from < b.end[part]; from += SIZE) {
                            int all = all_seen(&b, from);
                            struct left own = {keys + from * WIDE, WIDE, 1}, mine = {values + from * WIDE, WIDE, 1};
                            product(own, query_columns, made, SIZE, SIZE, DEEP, 0);
                            product(mine, grad_columns, of_made, SIZE, SIZE, DEEP, 0);
                            for (int t = 0; t < SIZE; t++) {
                                lanes x[PARTS], y[PARTS];
                                EACH(p, PARTS) {
                                    x[p] = load(made + t * SIZE + 16 * p) * power_scale;
                                    if (!all) x[p] = shown(&b, p, x[p], from + t);
                                    x[p] = power(x[p] - top[p]) * share[p];
                                    y[p] = x[p] * (load(of_made + t * SIZE + 16 * p) - slope[p]);
                                }
                                keep(x[0], x[1], weights + t * SIZE);
                                keep(y[0], y[1], of_scores + t * SIZE);
                            }
                            pair(of_scores, score_rows, SIZE);
                            product((struct left){weights, SIZE, 1}, grad_rows, value_sum + from * WIDE, SIZE, WIDE, SIZE, 1);
                            product((struct left){of_scores, SIZE, 1}, query_rows, key_sum + from * WIDE, SIZE, WIDE, SIZE, 1);
#ifdef PAIRED
                            struct left side = {turned + from, padded, 1};
#else
                            struct left side = {keys + from * WIDE, 1, WIDE};
#endif
                            product(side, score_rows, query_sum, TALL, SIZE, SIZE, more);
                            more = 1;
                        }
                    for (int d = TALL; d < WIDE; d++) memset(query_sum + d * SIZE, 0, SIZE * sizeof *query_sum);
                    turn(query_sum, result, WIDE, SIZE);
                    for (int i = 0; i < b.queries; i++) {
                        number *to = of_query + ((row + first + i) * GROUPS * SHARED + head) * WIDTH;
                        for (int d = 0; d < WIDTH; d += 16) narrow(load(result + i * WIDE + d) * scale, to + d, WIDTH - d);
                    }
                }
            }
            for (int64_t i = 0; i < size; i++)
                for (int d = 0; d < WIDTH; d += 16) {
                    int64_t to = ((row + i) * GROUPS + group) * WIDTH + d;
                    narrow(load(key_sum + i * WIDE + d) * scale, of_key + to, WIDTH - d);
                    narrow(load(value_sum + i * WIDE + d), of_value + to, WIDTH - d);
                }
        }
        END
        free(memory);
    }
    return failed;
}
