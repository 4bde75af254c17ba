/* y = x W^T for a weight on one codebook per input column, from its packed codes, without ever holding W.
 *
 * What is fast about it: the codebook belongs to the input, so it can be multiplied by the activation before any output is
 * looked at. With few rows of x, the columns of 1 or 2 bits are joined until their codes fill a nibble: 16 sums of products,
 * one register of AVX-512, and one permutation then adds four or two columns to 16 outputs. Wider columns, and more rows, look
 * up the level itself and multiply it by every row.
 *
 * Arithmetic is float32. An output is computed the same way whatever the number of threads and wherever its tile lies.
 * Indices are trusted: the caller has checked them.
 */

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#ifndef TILE
#define TILE 128   /* outputs at a time: their codes stay in the second-level cache until the outliers have read them again */
#endif
#ifndef AHEAD
#define AHEAD 8   /* rows of code words to prefetch: a tile is too narrow for the hardware to see the stream */
#endif
enum { VECTORS = 2, ROWS = 4, PLACE_BITS = 28 };

#define ALWAYS static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef struct {
    int64_t bits, count;     /* of the columns */
    const int32_t *columns;  /* (count) */
    const uint32_t *codes;   /* (ceil(count * bits / 32), outputs) */
    const float *levels;     /* (padded(count), 1 << bits), zero from count on */
} segment;

typedef struct {
    int64_t outputs, inputs, parts;
    const segment *part;        /* (parts), at most 8 */
    const int32_t *starts;      /* (outputs + 1), or NULL without outliers */
    const int32_t *sparse;      /* input of each outlier */
    const float *values;        /* of each outlier */
} weight;

/* Lookups: the low `bits` bits of each lane of index choose among 1 << bits entries; the bits above are ignored. */

#if defined(__AVX512F__)
ALWAYS floats look_up(const float *table, words index, const int bits)
{
    __m512 entries;
    if (bits == 1)
        entries = _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_load_sd((const double *)table)));
    else if (bits == 2)
        entries = _mm512_broadcast_f32x4(_mm_loadu_ps(table));
    else if (bits == 3)
        entries = _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(_mm256_loadu_ps(table))));
    else if (bits == 4)
        entries = _mm512_loadu_ps(table);
    else
        return (floats)_mm512_i32gather_ps((__m512i)(index & ((1u << bits) - 1)), table, 4);
    return (floats)_mm512_permutexvar_ps((__m512i)index, entries);
}
#elif defined(__AVX2__)
ALWAYS floats look_up(const float *table, words index, const int bits)
{
    const __m256i at = (__m256i)index;
    if (bits == 1)
        return (floats)_mm256_permutevar_ps(_mm256_castpd_ps(_mm256_broadcast_sd((const double *)table)), at);
    if (bits == 2)
        return (floats)_mm256_permutevar_ps(_mm256_broadcast_ps((const __m128 *)table), at);
    if (bits == 3)
        return (floats)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at);
    if (bits == 4) {
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), at);
        return (floats)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
    }
    return (floats)_mm256_i32gather_ps(table, (__m256i)(index & ((1u << bits) - 1)), 4);
}
#else
ALWAYS floats look_up(const float *table, words index, const int bits)
{
    floats found;
    for (int i = 0; i < LANES; i++)
        found[i] = table[index[i] & ((1u << bits) - 1)];
    return found;
}
#endif

ALWAYS int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

ALWAYS int64_t code_words(const segment *s) { return (s->count * s->bits + 31) / 32; }

/* Columns whose codes fill whole words: 32 for odd widths, 32 / bits for powers of two. */
ALWAYS int group_columns(const int bits) { return 32 / (bits & -bits); }
ALWAYS int group_words(const int bits) { return bits / (bits & -bits); }
ALWAYS int64_t groups(const segment *s) { return (s->count + group_columns((int)s->bits) - 1) / group_columns((int)s->bits); }
ALWAYS int64_t padded(const segment *s) { return groups(s) * group_columns((int)s->bits); }

ALWAYS void prefetch(const uint32_t *from)
{
    for (int i = 0; i < TILE; i += 16)
        __builtin_prefetch(from + i);
}

/* The code words of one group, as seen from one output. */
typedef struct {
    const uint32_t *codes;  /* its first word */
    int64_t stride, last;   /* from word to word; the last word there is, counted from the first */
    int64_t room;           /* outputs from here to the end of the tile */
} span;

ALWAYS words load_words(const uint32_t *from, int64_t room, const int partial)
{
    if (!partial)
        return *(const words *)from;
    words loaded = {0};
    memcpy(&loaded, from, 4 * (size_t)smaller(room, LANES));
    return loaded;
}

/* Vector v of the codes that start `at` bits into the group, with whatever lies above them. A group cut short by the end of
 * the columns has no words there: its padding reads the last one instead, against levels of zero. */
ALWAYS words codes_at(const span s, const int at, const int bits, const int v, const int partial)
{
    const int word = at / 32, shift = at % 32;
    const uint32_t *from = s.codes + v * LANES;
    words index = load_words(from + (word ? smaller(word, s.last) * s.stride : 0), s.room - v * LANES, partial) >> (uint32_t)shift;
    if (shift + bits > 32)
        index |= load_words(from + smaller(word + 1, s.last) * s.stride, s.room - v * LANES, partial) << (uint32_t)(32 - shift);
    return index;
}

/* sums[r] += W x[r] over one group of columns, for `vectors` vectors of outputs and `rows` rows of x. */
ALWAYS void multiply(const int bits, const int rows, const int vectors, const int partial, const span s, const float *levels,
                     const float *x, float *sums)
{
    floats total[VECTORS][ROWS];
    for (int v = 0; v < vectors; v++)
        for (int r = 0; r < rows; r++)
            total[v][r] = *(floats *)(sums + r * TILE + v * LANES);
#pragma GCC unroll 32
    for (int c = 0; c < group_columns(bits); c++)
        for (int v = 0; v < vectors; v++) {
            const floats level = look_up(levels + (c << bits), codes_at(s, c * bits, bits, v, partial), bits);
            for (int r = 0; r < rows; r++)
                total[v][r] += level * x[c * rows + r];
        }
    for (int v = 0; v < vectors; v++)
        for (int r = 0; r < rows; r++)
            *(floats *)(sums + r * TILE + v * LANES) = total[v][r];
}

/* The outputs that do not fill the vectors of a tile, and the widths beyond 4 bits. */
static void multiply_any(const int bits, const int rows, const span s, const float *levels, const float *x, float *sums)
{
    floats total[ROWS];
    for (int r = 0; r < rows; r++)
        total[r] = *(floats *)(sums + r * TILE);
    for (int c = 0; c < group_columns(bits); c++) {
        const floats level = look_up(levels + (c << bits), codes_at(s, c * bits, bits, 0, 1), bits);
        for (int r = 0; r < rows; r++)
            total[r] += level * x[c * rows + r];
    }
    for (int r = 0; r < rows; r++)
        *(floats *)(sums + r * TILE) = total[r];
}

/* The columns of one width for one tile: outputs first ... first + width - 1. */
ALWAYS void multiply_part(const int bits, const int rows, const int vectors, const weight *w, const segment *s, const float *x,
                          int64_t first, int64_t width, float *sums)
{
    const int64_t words_there = code_words(s), columns = group_columns(bits);
    for (int64_t g = 0; g < groups(s); g++) {
        const uint32_t *codes = s->codes + g * group_words(bits) * w->outputs + first;
        const float *levels = s->levels + ((g * columns) << bits);
        for (int i = 0; i < group_words(bits); i++)
            prefetch(codes + (AHEAD + i) * w->outputs);
        span at = {codes, w->outputs, words_there - 1 - g * group_words(bits), width};
        int64_t done = 0;
        for (; vectors && done + vectors * LANES <= width; done += vectors * LANES) {
            at.codes = codes + done, at.room = width - done;
            multiply(bits, rows, vectors, 0, at, levels, x + g * columns * rows, sums + done);
        }
        for (; done < width; done += LANES) {
            at.codes = codes + done, at.room = width - done;
            multiply_any(bits, rows, at, levels, x + g * columns * rows, sums + done);
        }
    }
}

#define FAST(b, r) case (b) * 8 + (r): multiply_part(b, r, VECTORS, w, s, x, first, width, sums); break

static void multiply_columns(const weight *w, const segment *s, const float *x, int64_t rows, int64_t first, int64_t width, float *sums)
{
    switch (s->bits * 8 + rows) {
    FAST(1, 4);
    FAST(2, 4);
    FAST(3, 1);
    FAST(3, 2);
    FAST(3, 4);
    FAST(4, 1);
    FAST(4, 2);
    FAST(4, 4);
    default:
        multiply_part((int)s->bits, (int)rows, 0, w, s, x, first, width, sums);
    }
}

/* Joined columns */

/* The 16 sums of products of the columns that share a nibble. */
static void join(const int bits, const float *levels, const float *x, int64_t stride, float *table)
{
    int made = 1;
    table[0] = 0;
    for (int c = 0; c < 4 / bits; c++, made <<= bits)
        for (int k = (1 << bits) - 1; k >= 0; k--) {
            const float product = levels[(c << bits) + k] * x[c * stride];
            for (int i = 0; i < made; i++)
                table[k * made + i] = table[i] + product;
        }
}

ALWAYS floats add_word(const words codes, const float *tables)
{
    floats pair[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        pair[i] = look_up(tables + 32 * i, codes >> (uint32_t)(8 * i), 4) + look_up(tables + 32 * i + 16, codes >> (uint32_t)(8 * i + 4), 4);
    return (pair[0] + pair[1]) + (pair[2] + pair[3]);
}

static void add_joined(const weight *w, const segment *s, const float *tables, int64_t first, int64_t width, float *sums)
{
    for (int64_t i = 0; i < code_words(s); i++, tables += 8 * 16) {
        const uint32_t *codes = s->codes + i * w->outputs + first;
        prefetch(codes + AHEAD * w->outputs);
        int64_t done = 0;
        for (; done + LANES <= width; done += LANES)
            *(floats *)(sums + done) += add_word(load_words(codes + done, 0, 0), tables);
        if (done < width)
            *(floats *)(sums + done) += add_word(load_words(codes + done, width - done, 1), tables);
    }
}

/* The product */

typedef struct {
    const weight *w;
    const float *x;     /* (rows, inputs) */
    int64_t rows;
    float *y;           /* (rows, outputs) */
    float *gathered;    /* by block of rows: (padded columns of every part, rows of the block) */
    float *tables;      /* by row of the blocks that are joined: 16 sums for every nibble of the parts that are */
    uint32_t *place;    /* (inputs) part << PLACE_BITS | position in it */
} task;

ALWAYS int64_t block_rows(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

ALWAYS int is_joined(const segment *s, int64_t rows) { return s->bits <= 2 && rows < 4; }

static void add_outliers(const task *t, const float *x, int64_t rows, int64_t first, int64_t width, float *sums)
{
    const weight *w = t->w;
    int64_t base[8] = {0};
    for (int64_t p = 1; p < w->parts; p++)
        base[p] = base[p - 1] + padded(&w->part[p - 1]);
    for (int64_t o = 0; o < width; o++)
        for (int64_t e = w->starts[first + o]; e < w->starts[first + o + 1]; e++) {
            const uint32_t place = t->place[w->sparse[e]];
            const segment *s = &w->part[place >> PLACE_BITS];
            const int64_t column = place & ((1u << PLACE_BITS) - 1), bit = column * s->bits;
            const uint32_t *code = s->codes + bit / 32 * w->outputs + first + o;
            uint32_t index = code[0] >> bit % 32;
            if (bit % 32 + s->bits > 32)
                index |= code[w->outputs] << (32 - bit % 32);
            const float change = w->values[e] - s->levels[(column << s->bits) + (index & ((1u << s->bits) - 1))];
            const float *at = x + (base[place >> PLACE_BITS] + column) * rows;
            for (int64_t r = 0; r < rows; r++)
                sums[r * TILE + o] += change * at[r];
        }
}

static void multiply_tile(const task *t, int64_t first, int64_t width)
{
    const weight *w = t->w;
    const float *tables = t->tables, *x = t->gathered;
    for (int64_t row = 0, rows; row < t->rows; row += rows) {
        float sums[ROWS * TILE] = {0};
        const float *at = x;
        rows = block_rows(t->rows - row);
        for (const segment *s = w->part; s < w->part + w->parts; at += padded(s) * rows, s++) {
            if (!is_joined(s, rows)) {
                multiply_columns(w, s, at, rows, first, width, sums);
                continue;
            }
            for (int64_t r = 0; r < rows; r++, tables += code_words(s) * 8 * 16)
                add_joined(w, s, tables, first, width, sums + r * TILE);
        }
        if (w->starts)
            add_outliers(t, x, rows, first, width, sums);
        for (int64_t r = 0; r < rows; r++)
            memcpy(t->y + (row + r) * w->outputs + first, sums + r * TILE, 4 * (size_t)width);
        x = at;
    }
}

static void prepare_rows(const task *t)
{
    const weight *w = t->w;
    float *x = t->gathered, *tables = t->tables;
    for (int64_t row = 0, rows; row < t->rows; row += rows) {
        rows = block_rows(t->rows - row);
        for (const segment *s = w->part; s < w->part + w->parts; x += padded(s) * rows, s++) {
            memset(x, 0, 4 * (size_t)(padded(s) * rows));
            for (int64_t c = 0; c < s->count; c++)
                for (int64_t r = 0; r < rows; r++)
                    x[c * rows + r] = t->x[(row + r) * w->inputs + s->columns[c]];
            const int bits = (int)s->bits, nibble = 4 / bits;
            for (int64_t r = 0; is_joined(s, rows) && r < rows; r++)
                for (int64_t i = 0; i < code_words(s) * 8; i++, tables += 16)
                    join(bits, s->levels + ((i * nibble) << bits), x + i * nibble * rows + r, rows, tables);
        }
    }
}

static void prepare_places(const task *t)
{
    const weight *w = t->w;
    for (int64_t p = 0; p < w->parts; p++)
        for (int64_t c = 0; c < w->part[p].count; c++)
            t->place[w->part[p].columns[c]] = (uint32_t)(p << PLACE_BITS | c);
}

/* Threads */

typedef struct {
    void (*work)(const void *what, int64_t first, int64_t width);
    const void *what;
    int64_t from, to;
} share;

static void *do_share(void *given)
{
    const share *s = given;
    for (int64_t first = s->from; first < s->to; first += TILE)
        s->work(s->what, first, smaller(TILE, s->to - first));
    return NULL;
}

/* Calls work for every tile of outputs; whoever cannot be given a thread is served by this one. */
static void over_tiles(void (*work)(const void *, int64_t, int64_t), const void *what, int64_t from, int64_t to, int64_t threads)
{
    enum { MOST = 64 };
    share shares[MOST];
    pthread_t ids[MOST];
    int started[MOST] = {0};
    const int64_t tiles = (to - from + TILE - 1) / TILE;
    threads = smaller(smaller(threads, tiles), MOST);
    for (int64_t i = 0; i < threads; i++) {
        shares[i] = (share){work, what, from + tiles * i / threads * TILE, smaller(to, from + tiles * (i + 1) / threads * TILE)};
        if (i)
            started[i] = pthread_create(&ids[i], NULL, do_share, &shares[i]) == 0;
    }
    for (int64_t i = 0; i < threads; i++)
        if (!started[i])
            do_share(&shares[i]);
    for (int64_t i = 0; i < threads; i++)
        if (started[i])
            pthread_join(ids[i], NULL);
}

static void product_tile(const void *what, int64_t first, int64_t width) { multiply_tile(what, first, width); }

/* y (rows, outputs) = x (rows, inputs) W^T. Returns 0, or 1 if there is not enough memory. */
int lowbit_product(const weight *w, const float *x, int64_t rows, float *y, int64_t threads)
{
    int64_t columns = 0, joined = 0;
    for (const segment *s = w->part; s < w->part + w->parts; s++) {
        columns += padded(s);
        joined += s->bits <= 2 ? code_words(s) * 8 * 16 : 0;
    }
    task t = {w, x, rows, y, NULL, NULL, NULL};
    t.gathered = malloc(4 * (size_t)(columns * rows));
    t.tables = malloc(4 * (size_t)(joined * (rows % ROWS)) + 1);
    t.place = malloc(4 * (size_t)w->inputs);
    const int enough = t.gathered && t.tables && t.place;
    if (enough) {
        prepare_rows(&t);
        prepare_places(&t);
        over_tiles(product_tile, &t, 0, w->outputs, threads);
    }
    free(t.gathered), free(t.tables), free(t.place);
    return !enough;
}
