/* y = x W^T and W itself, for a weight on one codebook per input column, from its packed codes.
 *
 * The codebook belongs to the input, so it can be multiplied by the activation before any output is looked at. Columns of 1 and
 * 2 bits are joined until their codes fill a nibble: the 16 possible sums of their products fit one AVX-512 register, and one
 * permutation of it adds four or two columns to 16 outputs. Wider columns look up the level and multiply it by every row of x.
 *
 * Arithmetic is float32. An output is computed the same way whatever the number of threads, so results do not depend on it.
 * Indices are trusted; whoever loads a weight checks them. */

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define ALWAYS static inline __attribute__((always_inline))

enum {
    TILE = 128,      /* outputs at a time: their sums stay in the first-level cache */
    ROWS = 4,        /* rows of x at a time, at most: their sums stay in registers */
    AHEAD = 8,       /* rows of code words prefetched: a tile is too narrow for the processor to see the stream by itself */
    NIBBLES = 8,     /* in a code word */
    ENTRIES = 16,    /* of a nibble's table */
    JOINED_BITS = 2, /* widths up to this one are joined */
    MOST_THREADS = 64
};

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* The columns of one width. They come in groups whose codes fill whole words, see group_columns. */
typedef struct {
    int64_t bits, count;
    const int32_t *columns; /* (count) input of each */
    const uint32_t *codes;  /* (ceil(count * bits / 32), outputs) */
    const float *levels;    /* (count up to whole groups, 1 << bits); zero beyond count */
} segment;

typedef struct {
    int64_t outputs, inputs, parts;
    const segment *part;   /* (parts) */
    const int32_t *starts; /* (outputs + 1) CSR rows of the outliers, or NULL */
    const int32_t *inputs_of;
    const float *values;
} weight;

/* Outputs first ... first + width - 1 of a weight, width <= TILE, and the sums of up to ROWS products with them. */
typedef struct {
    const weight *w;
    int64_t first, width;
    float *sums; /* (ROWS, TILE) */
} tile;

ALWAYS int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* 32 columns of an odd width; 32 / bits of a power of two. */
ALWAYS int group_columns(const int bits) { return 32 / (bits & -bits); }
ALWAYS int group_words(const int bits) { return bits / (bits & -bits); }
ALWAYS int64_t groups(const segment *s) { return (s->count + group_columns((int)s->bits) - 1) / group_columns((int)s->bits); }
ALWAYS int64_t padded(const segment *s) { return groups(s) * group_columns((int)s->bits); }
ALWAYS int64_t code_words(const segment *s) { return (s->count * s->bits + 31) / 32; }
ALWAYS int is_joined(const segment *s) { return s->bits <= JOINED_BITS; }

/* Lookups: the low `bits` bits of each lane choose an entry; the bits above them do not matter. */

#if defined(__AVX512F__)
ALWAYS floats look_up(const float *table, words index, const int bits)
{
    if (bits > 4)
        return (floats)_mm512_i32gather_ps((__m512i)(index & ((1u << bits) - 1)), table, 4);
    __m512 entries;
    if (bits == 1)
        entries = _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_load_sd((const double *)table)));
    else if (bits == 2)
        entries = _mm512_broadcast_f32x4(_mm_loadu_ps(table));
    else if (bits == 3)
        entries = _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(_mm256_loadu_ps(table))));
    else
        entries = _mm512_loadu_ps(table);
    return (floats)_mm512_permutexvar_ps((__m512i)index, entries);
}
#elif defined(__AVX2__)
ALWAYS floats look_up(const float *table, words index, const int bits)
{
    const __m256i at = (__m256i)index;
    if (bits > 4)
        return (floats)_mm256_i32gather_ps(table, (__m256i)(index & ((1u << bits) - 1)), 4);
    if (bits == 1)
        return (floats)_mm256_permutevar8x32_ps(_mm256_castpd_ps(_mm256_broadcast_sd((const double *)table)), at);
    if (bits == 2)
        return (floats)_mm256_permutevar_ps(_mm256_broadcast_ps((const __m128 *)table), at);
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at);
    if (bits == 3)
        return (floats)low;
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), at);
    return (floats)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
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

/* Codes of one group of columns */

typedef struct {
    const uint32_t *codes; /* the group's first word, for the vector's first output */
    int64_t stride, last;  /* from word to word; the last word there is, counted from the first */
    int64_t room;          /* outputs from here to the end of the tile */
} span;

ALWAYS span span_at(const tile *t, const segment *s, int64_t word, int64_t output)
{
    return (span){s->codes + word * t->w->outputs + t->first + output, t->w->outputs, code_words(s) - 1 - word, t->width - output};
}

/* An address beyond the codes is as good as any other: a prefetch of it does nothing. */
ALWAYS void prefetch(const tile *t, const segment *s, int64_t word)
{
    const uintptr_t from = (uintptr_t)(s->codes + t->first) + 4 * (uintptr_t)(word * t->w->outputs);
    for (int i = 0; i < 4 * TILE; i += 64)
        __builtin_prefetch((const void *)(from + (uintptr_t)i));
}

ALWAYS words load_words(const uint32_t *from, int64_t room, const int partial)
{
    if (!partial)
        return *(const words *)from;
    words loaded = {0};
    memcpy(&loaded, from, 4 * (size_t)smaller(room, LANES));
    return loaded;
}

/* The codes that start `at` bits into the group, under whatever lies above them. Where the columns end within a group, the words
 * that are not there are replaced by the last one: what it says meets levels of zero. */
ALWAYS words codes_at(const span s, const int at, const int bits, const int partial)
{
    const int word = at / 32, shift = at % 32;
    words index = load_words(s.codes + (word ? smaller(word, s.last) * s.stride : 0), s.room, partial) >> (uint32_t)shift;
    if (shift + bits > 32)
        index |= load_words(s.codes + smaller(word + 1, s.last) * s.stride, s.room, partial) << (uint32_t)(32 - shift);
    return index;
}

/* Columns one by one */

/* The sums of one vector of outputs += W x over one group of columns; x is (columns of the group, rows). */
ALWAYS void multiply_group(const int bits, const int rows, const int partial, const span s, const float *levels, const float *x, float *sums)
{
    floats total[ROWS];
    for (int r = 0; r < rows; r++)
        total[r] = *(floats *)(sums + r * TILE);
#pragma GCC unroll 32
    for (int c = 0; c < group_columns(bits); c++) {
        const floats level = look_up(levels + (c << bits), codes_at(s, c * bits, bits, partial), bits);
        for (int r = 0; r < rows; r++)
            total[r] += level * x[c * rows + r];
    }
    for (int r = 0; r < rows; r++)
        *(floats *)(sums + r * TILE) = total[r];
}

/* The same with nothing known in advance: widths beyond 4 bits, and the outputs that do not fill a vector. */
static void multiply_any(int bits, int rows, const span s, const float *levels, const float *x, float *sums)
{
    floats total[ROWS] = {{0}};
    for (int c = 0; c < group_columns(bits); c++) {
        const floats level = look_up(levels + (c << bits), codes_at(s, c * bits, bits, 1), bits);
        for (int r = 0; r < rows; r++)
            total[r] += level * x[c * rows + r];
    }
    for (int r = 0; r < rows; r++)
        *(floats *)(sums + r * TILE) += total[r];
}

ALWAYS void multiply_as(const int bits, const int rows, const int known, const tile *t, const segment *s, const float *x)
{
    const float *levels = s->levels;
    for (int64_t g = 0, word = 0; g < groups(s); g++, word += group_words(bits)) {
        for (int i = 0; i < group_words(bits); i++)
            prefetch(t, s, word + AHEAD + i);
        int64_t o = 0;
        for (; known && o + LANES <= t->width; o += LANES)
            multiply_group(bits, rows, 0, span_at(t, s, word, o), levels, x, t->sums + o);
        for (; o < t->width; o += LANES)
            multiply_any(bits, rows, span_at(t, s, word, o), levels, x, t->sums + o);
        levels += group_columns(bits) << bits, x += group_columns(bits) * rows;
    }
}

#define CASE(b, r) case (b) * 8 + (r): multiply_as(b, r, 1, t, s, x); break

static void multiply(const tile *t, const segment *s, const float *x, int64_t rows)
{
    switch (s->bits * 8 + rows) {
        CASE(3, 1);
        CASE(3, 2);
        CASE(3, 4);
        CASE(4, 1);
        CASE(4, 2);
        CASE(4, 4);
        default: multiply_as((int)s->bits, (int)rows, 0, t, s, x);
    }
}

/* Columns joined to nibbles */

/* The sums of products of the columns that share a nibble, for every value of it. Consecutive columns of x are `rows` apart. */
static void join(int bits, const float *levels, const float *x, int64_t rows, float *table)
{
    int made = 1;
    table[0] = 0;
    for (int c = 0; c < 4 / bits; c++, made <<= bits)
        for (int k = (1 << bits) - 1; k >= 0; k--) {
            const float product = levels[(c << bits) + k] * x[c * rows];
            for (int i = 0; i < made; i++)
                table[k * made + i] = table[i] + product;
        }
}

/* The sums of one vector of outputs += what one word of codes stands for; tables is (rows, NIBBLES, ENTRIES). */
ALWAYS void add_word(const int rows, const words codes, const float *tables, float *sums)
{
    for (int r = 0; r < rows; r++, tables += NIBBLES * ENTRIES) {
        floats pair[NIBBLES / 2];
#pragma GCC unroll 4
        for (int i = 0; i < NIBBLES / 2; i++)
            pair[i] = look_up(tables + 2 * i * ENTRIES, codes >> (uint32_t)(8 * i), 4)
                    + look_up(tables + (2 * i + 1) * ENTRIES, codes >> (uint32_t)(8 * i + 4), 4);
        *(floats *)(sums + r * TILE) += (pair[0] + pair[1]) + (pair[2] + pair[3]);
    }
}

ALWAYS void add_as(const int rows, const tile *t, const segment *s, const float *tables)
{
    for (int64_t word = 0; word < code_words(s); word++, tables += rows * NIBBLES * ENTRIES) {
        const uint32_t *codes = s->codes + word * t->w->outputs + t->first;
        prefetch(t, s, word + AHEAD);
        int64_t o = 0;
        for (; o + LANES <= t->width; o += LANES)
            add_word(rows, load_words(codes + o, 0, 0), tables, t->sums + o);
        if (o < t->width)
            add_word(rows, load_words(codes + o, t->width - o, 1), tables, t->sums + o);
    }
}

static void add_joined(const tile *t, const segment *s, const float *tables, int64_t rows)
{
    if (rows == 1)
        add_as(1, t, s, tables);
    else if (rows == 2)
        add_as(2, t, s, tables);
    else
        add_as(4, t, s, tables);
}

/* Outliers */

/* Where an input's codes and levels are. */
typedef struct {
    const uint32_t *codes; /* its first word, for output 0 */
    const float *levels;
    uint32_t shift, bits;
} home;

static void find_homes(const weight *w, home *homes)
{
    for (const segment *s = w->part; s < w->part + w->parts; s++)
        for (int64_t c = 0; c < s->count; c++) {
            const int64_t bit = c * s->bits;
            const uint32_t *codes = s->codes + bit / 32 * w->outputs;
            homes[s->columns[c]] = (home){codes, s->levels + (c << s->bits), (uint32_t)(bit % 32), (uint32_t)s->bits};
        }
}

/* The outliers of a tile: their codes have been taken for their weights, so the difference is added. x is (rows, inputs). */
ALWAYS void correct_as(const int rows, const tile *t, const home *homes, const float *x)
{
    const weight *w = t->w;
    for (int64_t o = 0, output = t->first; o < t->width; o++, output++) {
        float total[ROWS] = {0};
        for (int64_t e = w->starts[output]; e < w->starts[output + 1]; e++) {
            __asm__ volatile(""); /* keeps GCC from vectorizing, which makes this loop slower: nothing in it is contiguous */
            const home h = homes[w->inputs_of[e]];
            uint32_t code = h.codes[output] >> h.shift;
            if (h.shift + h.bits > 32)
                code |= h.codes[output + w->outputs] << (32 - h.shift);
            const float change = w->values[e] - h.levels[code & ((1u << h.bits) - 1)];
            for (int r = 0; r < rows; r++)
                total[r] += change * x[r * w->inputs + w->inputs_of[e]];
        }
        for (int r = 0; r < rows; r++)
            t->sums[r * TILE + o] += total[r];
    }
}

static void correct(const tile *t, const home *homes, const float *x, int64_t rows)
{
    if (rows == 1)
        correct_as(1, t, homes, x);
    else if (rows == 2)
        correct_as(2, t, homes, x);
    else
        correct_as(4, t, homes, x);
}

/* Threads */

typedef void tile_work(const void *task, int64_t first, int64_t width);

typedef struct {
    tile_work *work;
    const void *task;
    int64_t from, to;
} share;

static void *do_share(void *given)
{
    const share *s = given;
    for (int64_t first = s->from; first < s->to; first += TILE)
        s->work(s->task, first, smaller(TILE, s->to - first));
    return NULL;
}

/* Calls work for every tile of `outputs` outputs. A thread that cannot be had is no failure: its share is done here. */
static void for_tiles(tile_work *work, const void *task, int64_t outputs, int64_t threads)
{
    share shares[MOST_THREADS];
    pthread_t ids[MOST_THREADS];
    int running[MOST_THREADS];
    const int64_t tiles = (outputs + TILE - 1) / TILE;
    threads = smaller(smaller(threads, tiles), MOST_THREADS);
    for (int64_t i = 0; i < threads; i++) {
        shares[i] = (share){work, task, tiles * i / threads * TILE, smaller(outputs, tiles * (i + 1) / threads * TILE)};
        running[i] = i && !pthread_create(&ids[i], NULL, do_share, &shares[i]);
    }
    for (int64_t i = 0; i < threads; i++)
        if (!running[i])
            do_share(&shares[i]);
    for (int64_t i = 0; i < threads; i++)
        if (running[i])
            pthread_join(ids[i], NULL);
}

/* The product. Rows of x go in blocks of 4, then 2, then 1. */

typedef struct {
    const weight *w;
    const float *x; /* (rows, inputs) */
    int64_t rows;
    float *y;        /* (rows, outputs) */
    float *gathered; /* for each block and part: (padded columns, rows of the block) */
    float *tables;   /* for each block and part that is joined: (code words, rows of the block, NIBBLES, ENTRIES) */
    home *homes;     /* (inputs), or NULL without outliers */
} product;

ALWAYS int64_t block_rows(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

static void product_tile(const void *task, int64_t first, int64_t width)
{
    const product *p = task;
    const weight *w = p->w;
    const float *x = p->gathered, *tables = p->tables;
    for (int64_t row = 0, rows; row < p->rows; row += rows) {
        float sums[ROWS * TILE] = {0};
        const tile t = {w, first, width, sums};
        rows = block_rows(p->rows - row);
        for (const segment *s = w->part; s < w->part + w->parts; x += padded(s) * rows, s++) {
            if (is_joined(s)) {
                add_joined(&t, s, tables, rows);
                tables += code_words(s) * rows * NIBBLES * ENTRIES;
            } else {
                multiply(&t, s, x, rows);
            }
        }
        if (w->starts)
            correct(&t, p->homes, p->x + row * w->inputs, rows);
        for (int64_t r = 0; r < rows; r++)
            memcpy(p->y + (row + r) * w->outputs + first, sums + r * TILE, 4 * (size_t)width);
    }
}

static void gather(const product *p, const segment *s, int64_t row, int64_t rows, float *x)
{
    memset(x + s->count * rows, 0, 4 * (size_t)((padded(s) - s->count) * rows));
    for (int64_t c = 0; c < s->count; c++)
        for (int64_t r = 0; r < rows; r++)
            x[c * rows + r] = p->x[(row + r) * p->w->inputs + s->columns[c]];
}

static float *make_tables(const segment *s, const float *x, int64_t rows, float *tables)
{
    const int bits = (int)s->bits, joined = 4 / bits;
    for (int64_t word = 0; word < code_words(s); word++)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = word * NIBBLES; i < (word + 1) * NIBBLES; i++, tables += ENTRIES)
                join(bits, s->levels + ((i * joined) << bits), x + i * joined * rows + r, rows, tables);
    return tables;
}

static void prepare(const product *p)
{
    float *x = p->gathered, *tables = p->tables;
    for (int64_t row = 0, rows; row < p->rows; row += rows) {
        rows = block_rows(p->rows - row);
        for (const segment *s = p->w->part; s < p->w->part + p->w->parts; x += padded(s) * rows, s++) {
            gather(p, s, row, rows, x);
            if (is_joined(s))
                tables = make_tables(s, x, rows, tables);
        }
    }
    if (p->homes)
        find_homes(p->w, p->homes);
}

/* y (rows, outputs) = x (rows, inputs) W^T. Returns 0, or 1 if there is not enough memory. */
int columns_product(const weight *w, const float *x, int64_t rows, float *y, int64_t threads)
{
    int64_t columns = 0, entries = 0;
    for (const segment *s = w->part; s < w->part + w->parts; s++) {
        columns += padded(s);
        entries += is_joined(s) ? code_words(s) * NIBBLES * ENTRIES : 0;
    }
    product p = {w, x, rows, y, NULL, NULL, NULL};
    p.gathered = malloc(4 * (size_t)(columns * rows));
    p.tables = malloc(4 * (size_t)(entries * rows) + 1);
    p.homes = w->starts ? malloc(sizeof(home) * (size_t)w->inputs) : NULL;
    const int failed = !p.gathered || !p.tables || (w->starts && !p.homes);
    if (!failed) {
        prepare(&p);
        for_tiles(product_tile, &p, w->outputs, threads);
    }
    free(p.gathered);
    free(p.tables);
    free(p.homes);
    return failed;
}

/* The weight itself, inputs by outputs as the codes lie: one after another, for a matrix product of the usual kind. */

typedef struct {
    const weight *w;
    int64_t first, count; /* outputs */
    float *to;            /* (inputs, count) */
} decoding;

ALWAYS void decode_as(const int bits, const decoding *d, const segment *s, const tile *t)
{
    for (int64_t c = 0; c < s->count; c++) {
        const int64_t bit = c * bits, word = bit / 32;
        float *to = d->to + s->columns[c] * d->count + (t->first - d->first);
        int64_t o = 0;
        for (; o + LANES <= t->width; o += LANES)
            *(floats *)(to + o) = look_up(s->levels + (c << bits), codes_at(span_at(t, s, word, o), (int)(bit % 32), bits, 0), bits);
        if (o < t->width) {
            const floats last = look_up(s->levels + (c << bits), codes_at(span_at(t, s, word, o), (int)(bit % 32), bits, 1), bits);
            memcpy(to + o, &last, 4 * (size_t)(t->width - o));
        }
    }
}

static void decode_tile(const void *task, int64_t first, int64_t width)
{
    const decoding *d = task;
    const weight *w = d->w;
    const tile t = {w, d->first + first, width, NULL};
    for (const segment *s = w->part; s < w->part + w->parts; s++)
        switch (s->bits) {
            case 2: decode_as(2, d, s, &t); break;
            case 3: decode_as(3, d, s, &t); break;
            case 4: decode_as(4, d, s, &t); break;
            default: decode_as((int)s->bits, d, s, &t);
        }
    for (int64_t o = first; w->starts && o < first + width; o++)
        for (int64_t e = w->starts[d->first + o]; e < w->starts[d->first + o + 1]; e++)
            d->to[w->inputs_of[e] * d->count + o] = w->values[e];
}

/* to (inputs, count) = the weights of outputs first ... first + count - 1. */
void columns_decode(const weight *w, int64_t first, int64_t count, float *to, int64_t threads)
{
    const decoding d = {w, first, count, to};
    for_tiles(decode_tile, &d, count, threads);
}
