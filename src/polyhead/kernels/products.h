// Sixteen outputs at a time of activations in eight bits by weights in four or eight.
//
// Weights lie in blocks of 16 rows and 32 columns; sixty-four bytes hold four columns of each row.
// A block in groups begins with 16 scales as float16. Of eight bits a weight is its code less 128,
// by the scale of its group or of its row. Of four, 16 least values follow the scales, a weight is
// scale * code + least, and the low halves of the bytes are the first sixteen columns, the high
// halves the others.

#pragma once
#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace {

constexpr int GROUP = 32, ROWS = 16, FOURS = GROUP / 4;
constexpr int CHUNK = 64;  // tokens whose activations stay in the nearest cache

// Of a block's rows.
typedef uint8_t Codes __attribute__((vector_size(4 * ROWS), aligned(1)));
typedef int32_t Counts __attribute__((vector_size(4 * ROWS), aligned(4)));
typedef float Found __attribute__((vector_size(4 * ROWS), aligned(4)));

enum Kind { INT8_ROWS, INT8_GROUPS, INT4_GROUPS };

template <Kind KIND> constexpr int64_t head_bytes() {
    return KIND == INT8_ROWS ? 0 : KIND == INT8_GROUPS ? 2 * ROWS : 4 * ROWS;
}
template <Kind KIND> constexpr int64_t code_bytes() {
    return KIND == INT4_GROUPS ? GROUP * ROWS / 2 : GROUP * ROWS;
}
template <Kind KIND> constexpr int64_t block_bytes() {
    return head_bytes<KIND>() + code_bytes<KIND>();
}

typedef int32_t Four __attribute__((may_alias, aligned(1)));  // codes of four columns

inline Codes load_codes(const uint8_t* from) { return *reinterpret_cast<const Codes*>(from); }

#ifdef __AVX512VNNI__
inline Counts dot(Counts sum, Codes codes, int32_t four) {
    return (Counts)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(four));
}
#else
inline Counts dot(Counts sum, Codes codes, int32_t four) {
    int8_t x[4];
    std::memcpy(x, &four, 4);
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < 4; i++) sum[row] += codes[4 * row + i] * x[i];
    return sum;
}
#endif

#ifdef __AVX512F__
inline Found load_halves(const uint8_t* from) {
    return (Found)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
#elif defined(POLYHEAD_AVX2)
inline Found load_halves(const uint8_t* from) {
    Found found;
    float* to = (float*)&found;
    for (int i = 0; i < ROWS; i += LANES)
        store(to + i, (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 2 * i))));
    return found;
}
#else
inline Found load_halves(const uint8_t* from) {
    _Float16 halves[ROWS];
    std::memcpy(halves, from, sizeof(halves));
    Found found;
    for (int i = 0; i < ROWS; i++) found[i] = (float)halves[i];
    return found;
}
#endif

// Activations of some tokens, a scale for each 32: of each chunk of tokens its codes [groups,
// tokens, 32], scales and sums of the numbers that the codes stand for [groups, tokens].
struct Rounded {
    int8_t* codes;
    float *scales, *sums;
    int64_t tokens, groups;

    // Where `room` bytes hold those of so many tokens of `given` numbers each.
    Rounded(void* room, int64_t tokens, int64_t given)
        : tokens(tokens), groups((given + GROUP - 1) / GROUP) {
        codes = (int8_t*)room;
        scales = (float*)(codes + tokens * groups * GROUP);
        sums = scales + tokens * groups;
    }

    // Where a token's first group stands, and how far apart its groups are.
    int64_t first(int64_t token) const { return token / CHUNK * CHUNK * groups + token % CHUNK; }
    int64_t apart(int64_t token) const {
        return std::min<int64_t>(CHUNK, tokens - token / CHUNK * CHUNK);
    }
    static int64_t room(int64_t tokens, int64_t given) {
        return tokens * ((given + GROUP - 1) / GROUP) * (GROUP + 2 * sizeof(float));
    }
};

inline Ints nearest(Floats x) {
#ifdef __AVX512BW__
    return (Ints)_mm512_cvtps_epi32((__m512)x);
#else
    constexpr float high = 12582912.0f;  // 1.5 * 2^23: the whole part stands in the lowest bits
    return (Ints)(x + high) - (Ints)(Floats{} + high);
#endif
}

inline int32_t keep_codes(int8_t* to, Ints codes) {  // returns their sum
#ifdef __AVX512BW__
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)codes));
    return _mm512_reduce_add_epi32((__m512i)codes);
#else
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) to[i] = codes[i], sum += codes[i];
    return sum;
#endif
}

// given: how many numbers of a token there are; the rest are zeros.
template <class T> void round_token(const Rounded& to, const T* x, int64_t given, int64_t token) {
    for (int64_t group = 0; group < to.groups; group++) {
        int64_t first = group * GROUP, count = std::min<int64_t>(GROUP, given - first);
        Floats some[GROUP / LANES], high = {}, none = {};
        for (int i = 0; i < GROUP / LANES; i++) {
            const T* from = x + first + i * LANES;
            int64_t there = std::clamp<int64_t>(count - i * LANES, 0, LANES);
            some[i] = there == LANES ? load(from) : load_some(from, there);
            Floats size = absolute(some[i]);
            high = size > high ? size : high;
            none += some[i] - some[i];
        }
        float most = largest(high);
        float inverse = most > 0 ? 127.0f / most : 0.0f;
        // What is not a number makes the sums none.
        float scale = most / 127.0f + total(none);
        int64_t place = to.first(token) + group * to.apart(token);
        int32_t sum = 0;
        for (int i = 0; i < GROUP / LANES; i++) {
            int8_t* codes = to.codes + place * GROUP + i * LANES;
            sum += keep_codes(codes, nearest(some[i] * inverse));
        }
        to.scales[place] = scale;
        to.sums[place] = scale * sum;
    }
}

}  // namespace

#if defined(POLYHEAD_AVX2) && !defined(__AVX512VNNI__)
#include "products_avx2.h"
#else
namespace {

// Sixteen outputs of N tokens.
template <Kind KIND, int N>
inline void tile(const uint8_t* at, const Rounded& x, int64_t token, Found* out) {
    for (int n = 0; n < N; n++) out[n] = Found{};
    int64_t place = x.first(token), apart = x.apart(token);
    for (int64_t group = 0; group < x.groups; group++, place += apart) {
        Found scale = Found{} + 1.0f;
        if (KIND != INT8_ROWS) scale = load_halves(at);
        Found least = scale * -128.0f;
        if (KIND == INT4_GROUPS) least = load_halves(at + 2 * ROWS);
        for (int i = 0; i < block_bytes<KIND>(); i += 64) __builtin_prefetch(at + 4096 + i);
        at += head_bytes<KIND>();
        Codes codes[FOURS];
        for (int i = 0; i < FOURS; i++) {
            if (KIND != INT4_GROUPS) {
                codes[i] = load_codes(at + 64 * i);
            } else {
                Codes both = load_codes(at + 64 * (i % (FOURS / 2)));
                codes[i] = i < FOURS / 2 ? both & 15 : both >> 4;
            }
        }
        at += code_bytes<KIND>();
        const Four* fours = (const Four*)(x.codes + place * GROUP);
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            Counts even = {}, odd = {};  // two chains, as each waits for its last sum
            for (int i = 0; i < FOURS; i += 2) {
                even = dot(even, codes[i], fours[n * FOURS + i]);
                odd = dot(odd, codes[i + 1], fours[n * FOURS + i + 1]);
            }
            Found sum = __builtin_convertvector(even + odd, Found);
            out[n] += sum * (scale * x.scales[place + n]);
            out[n] += least * x.sums[place + n];
        }
    }
}

}  // namespace
#endif

namespace {

template <Kind KIND, int N, class T>
void finish(const uint8_t* at, const Rounded& x, int64_t token, int64_t row, int64_t rows,
            const float* row_scales, T* out) {
    Found found[N];
    tile<KIND, N>(at, x, token, found);
    for (int64_t end = std::min(rows, row + ROWS), lane = 0; row < end; row += LANES, lane += LANES) {
        int64_t count = std::min<int64_t>(LANES, end - row);
        for (int n = 0; n < N; n++) {
            Floats y = load((const float*)(found + n) + lane);
            if (row_scales) y *= load_some(row_scales + row, count);
            T* to = out + (token + n) * rows + row;
            count == LANES ? store(to, y) : store_some(to, y, count);
        }
    }
}

// Of as many tokens as can be from here on, N at a time; returns the next.
template <Kind KIND, int N, class T>
inline int64_t finish_all(const uint8_t* at, const Rounded& x, int64_t token, int64_t last,
                          int64_t row, int64_t rows, const float* row_scales, T* out) {
    for (; token + N <= last; token += N)
        finish<KIND, N>(at, x, token, row, rows, row_scales, out);
    return token;
}

// The rows from..to, both of whole blocks, of the tokens first..last; out [tokens, rows].
template <Kind KIND, class T>
void multiply(const Rounded& x, int64_t first, int64_t last, const uint8_t* blocks,
              const float* row_scales, int64_t from, int64_t to, int64_t rows, T* out) {
    int64_t stretch = x.groups * block_bytes<KIND>();
    while (first < last) {
        int64_t end = std::min(last, (first / CHUNK + 1) * CHUNK);
        for (int64_t row = from; row < std::min(to, rows); row += ROWS) {
            const uint8_t* at = blocks + row / ROWS * stretch;
            int64_t token = finish_all<KIND, 16>(at, x, first, end, row, rows, row_scales, out);
            token = finish_all<KIND, 8>(at, x, token, end, row, rows, row_scales, out);
            token = finish_all<KIND, 4>(at, x, token, end, row, rows, row_scales, out);
            finish_all<KIND, 1>(at, x, token, end, row, rows, row_scales, out);
        }
        first = end;
    }
}

}  // namespace
