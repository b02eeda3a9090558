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

#include "activations.h"

namespace {

constexpr int GROUP = 32, ROWS = 16, FOURS = GROUP / 4;
constexpr int CHUNK = 64;  // tokens whose activations stay in the nearest cache

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

// Scales of a group of activations: of those that meet weights in groups of eight bits one for each
// half, as their own rounding is what such products lose.
template <Kind KIND> constexpr int SCALES = KIND == INT8_GROUPS ? 2 : 1;

// Where the weights' codes begin, by their scale; of four bits that is said with each group.
template <Kind KIND> constexpr float BEGIN = KIND == INT4_GROUPS ? 1.0f : -128.0f;

typedef int32_t Four __attribute__((may_alias, aligned(1)));  // codes of four columns

inline float half(const uint8_t* from) {
    uint16_t bits;
    std::memcpy(&bits, from, sizeof(bits));
#ifdef POLYHEAD_AVX2
    return _cvtsh_ss(bits);
#else
    uint32_t size = (uint32_t)(bits & 0x7fff) << 13;
    float found;
    std::memcpy(&found, &size, sizeof(found));
    found *= 0x1p112f;  // the exponents begin elsewhere
    if (size >= 0x7c00u << 13) found = INFINITY;
    return bits >> 15 ? -found : found;
#endif
}

// Of a row of a block.
template <Kind KIND> inline void read_codes(const uint8_t* at, int64_t row, uint8_t* codes) {
    at += head_bytes<KIND>() + 4 * row;
    for (int i = 0; i < GROUP; i++) {
        int place = KIND == INT4_GROUPS ? i % (GROUP / 2) : i;
        uint8_t code = at[place / 4 * 64 + place % 4];
        codes[i] = KIND != INT4_GROUPS ? code : i < GROUP / 2 ? code & 15 : code >> 4;
    }
}

// The numbers of one row, `width` of them.
template <Kind KIND, class T>
void unpack_row(const uint8_t* blocks, const float* row_scales, int64_t row, int64_t width, T* out) {
    int64_t groups = (width + GROUP - 1) / GROUP, lane = row % ROWS;
    const uint8_t* at = blocks + row / ROWS * groups * block_bytes<KIND>();
    float scale = row_scales ? row_scales[row] : 1.0f;
    for (int64_t first = 0; first < width; first += GROUP, at += block_bytes<KIND>()) {
        if (KIND != INT8_ROWS) scale = half(at + 2 * lane);
        float least = KIND == INT4_GROUPS ? half(at + 2 * (ROWS + lane)) : scale * -128.0f;
        uint8_t codes[GROUP];
        float found[GROUP];
        read_codes<KIND>(at, lane, codes);
        for (int i = 0; i < GROUP; i++) found[i] = codes[i] * scale + least;
        int64_t count = std::min<int64_t>(GROUP, width - first);
        for (int64_t i = 0; i < count; i += LANES) {
            int64_t there = std::min<int64_t>(LANES, count - i);
            T* to = out + first + i;
            there == LANES ? store(to, load(found + i)) : store_some(to, load(found + i), there);
        }
    }
}

// Activations of some tokens in groups of 32, `each` scales for each: of each chunk of tokens its
// codes [groups, tokens, 32], scales [groups, tokens, each] and sums of the numbers that the codes
// stand for, times BEGIN [groups, tokens].
struct Rounded {
    int8_t* codes;
    float *scales, *sums;
    int64_t tokens, groups;
    int each;

    // Where `room` bytes hold those of so many tokens of `given` numbers each.
    Rounded(void* room, int64_t tokens, int64_t given, int each)
        : tokens(tokens), groups((given + GROUP - 1) / GROUP), each(each) {
        codes = (int8_t*)room;
        scales = (float*)(codes + tokens * groups * GROUP);
        sums = scales + tokens * groups * each;
    }

    // Where a token's first group stands, and how far apart its groups are.
    int64_t first(int64_t token) const { return token / CHUNK * CHUNK * groups + token % CHUNK; }
    int64_t apart(int64_t token) const {
        return std::min<int64_t>(CHUNK, tokens - token / CHUNK * CHUNK);
    }
    static int64_t room(int64_t tokens, int64_t given, int each) {
        return tokens * ((given + GROUP - 1) / GROUP) * (GROUP + (each + 1) * sizeof(float));
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

inline void keep_codes(int8_t* to, Ints codes) {
#ifdef __AVX512BW__
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)codes));
#else
    for (int i = 0; i < LANES; i++) to[i] = codes[i];
#endif
}

// Of `SIZE` vectors each, as many parts as a vector has numbers; `many` of them are there. Each has a
// scale of its own; place_of(i): where the i-th group stands. LEAVES there what the codes lack.
template <Kind KIND, bool LEAVES, int SIZE, class Place>
inline void round_parts(const Rounded& to, int many, Floats (*parts)[SIZE], Place place_of) {
    Floats sizes[LANES] = {}, sums[LANES] = {};
    for (int part = 0; part < many; part++)
        for (int i = 0; i < SIZE; i++) {
            Ints size = (Ints)absolute(parts[part][i]);
            sizes[part] = (Floats)(size > (Ints)sizes[part] ? size : (Ints)sizes[part]);
        }
    Floats most = tops(sizes);
    // What is not a number makes the sums none.
    Floats scales = most / 127.0f + (most - most);
    Floats inverses = (Floats)((Ints)(127.0f / most) & (most > 0.0f));
    float scale[LANES], inverse[LANES], sum[LANES];
    store(scale, scales), store(inverse, inverses);
    constexpr int EACH = SCALES<KIND>;
    for (int part = 0; part < many; part++) {
        int64_t place = place_of(part / EACH);
        int8_t* codes = to.codes + place * GROUP + part % EACH * (GROUP / EACH);
        Ints all = {};
        for (int i = 0; i < SIZE; i++) {
            Ints near = nearest(parts[part][i] * inverse[part]);
            keep_codes(codes + i * LANES, near);
            all += near;
            if (LEAVES)
                parts[part][i] -= __builtin_convertvector(near, Floats) * scale[part];
        }
        sums[part] = __builtin_convertvector(all, Floats);
        to.scales[place * EACH + part % EACH] = scale[part];
    }
    store(sum, totals(sums) * scales * BEGIN<KIND>);
    for (int part = 0; part < many; part += EACH) {
        float all = sum[part];
        for (int i = 1; i < EACH; i++) all += sum[part + i];
        to.sums[place_of(part / EACH)] = all;
    }
}

// x: the numbers of a token, `given` of them; the rest of its groups are zeros. Of two TIMES what
// the codes lack is rounded too, as a token of its own that stands next.
template <Kind KIND, int TIMES, class T>
void round_token(const Rounded& to, const T* x, int64_t given, int64_t token) {
    constexpr int SIZE = GROUP / LANES / SCALES<KIND>;
    int64_t count = to.groups * SCALES<KIND>;
    for (int64_t first = 0; first < count; first += LANES) {
        Floats parts[LANES][SIZE];
        int many = std::min<int64_t>(LANES, count - first);
        for (int i = 0; i < many * SIZE; i++) {
            int64_t at = (first * SIZE + i) * LANES;
            int64_t there = std::clamp<int64_t>(given - at, 0, LANES);
            parts[i / SIZE][i % SIZE] = there == LANES ? load(x + at) : load_some(x + at, there);
        }
        for (int time = 0; time < TIMES; time++) {
            int64_t own = token * TIMES + time;
            int64_t start = to.first(own) + first / SCALES<KIND> * to.apart(own);
            round_parts<KIND, TIMES == 2>(to, many, parts, [&](int group) {
                return start + group * to.apart(own);
            });
        }
    }
}

}  // namespace

constexpr int PARTS = ROWS / LANES;

// Sixteen outputs of each of N tokens, tile<KIND, N>(blocks, x, token, Floats found[N][PARTS]).
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "products_avx512.h"
#elif defined(POLYHEAD_AVX2)
#include "products_avx2.h"
#else
#include "products_plain.h"
#endif

namespace {

enum Then { NONE, RELU, GELU, GELU_TANH, SILU };

// What a sum becomes before it is written, and where that is: out [tokens, rows].
template <class T> struct Ending {
    const float* row_scales;  // [rows], or none
    const T* bias;            // [rows], or none
    Then then;
    T* out;
    int64_t rows;

    void write(Floats y, int64_t token, int64_t row) const {
        int64_t count = std::min<int64_t>(LANES, rows - row);
        T* to = out + token * rows + row;
        y = ended(y, row);
        count == LANES ? store(to, y) : store_some(to, y, count);
    }

    // Zero beyond the last row, as every activation is of zero.
    Floats ended(Floats y, int64_t row) const {
        int64_t count = std::clamp<int64_t>(rows - row, 0, LANES);
        if (row_scales) y *= load_some(row_scales + row, count);
        if (bias) y += load_some(bias + row, count);
        return then ? activated(y) : y;
    }

    [[gnu::noinline]] Floats activated(Floats y) const {
        switch (then) {
            case RELU: return Relu::at(y).value;
            case GELU: return Gelu::at(y).value;
            case GELU_TANH: return GeluTanh::at(y).value;
            default: return Silu::at(y).value;
        }
    }
};

// Of tokens rounded so many TIMES, whose sums belong together.
template <Kind KIND, int TIMES, int N, class T>
void finish(const uint8_t* at, const Rounded& x, int64_t token, int64_t row,
            const Ending<T>& ending) {
    Floats found[N][PARTS];
    tile<KIND, N>(at, x, token, found);
    for (int part = 0; part < PARTS && row < ending.rows; part++, row += LANES)
        for (int n = 0; n < N; n += TIMES) {
            Floats y = found[n][part];
            if (TIMES == 2) y += found[n + TIMES - 1][part];
            ending.write(y, (token + n) / TIMES, row);
        }
}

// Of as many tokens as can be from here on, N at a time; returns the next.
template <Kind KIND, int TIMES, int N, class T>
inline int64_t finish_all(const uint8_t* at, const Rounded& x, int64_t token, int64_t last,
                          int64_t row, const Ending<T>& ending) {
    for (; token + N <= last; token += N) finish<KIND, TIMES, N>(at, x, token, row, ending);
    return token;
}

// The rows from..to, both of whole blocks, of the tokens first..last.
template <Kind KIND, int TIMES, class T>
void multiply(const Rounded& x, int64_t first, int64_t last, const uint8_t* blocks, int64_t from,
              int64_t to, const Ending<T>& ending) {
    int64_t stretch = x.groups * block_bytes<KIND>();
    for (first *= TIMES, last *= TIMES; first < last;) {
        int64_t end = std::min(last, (first / CHUNK + 1) * CHUNK);
        for (int64_t row = from; row < std::min(to, ending.rows); row += ROWS) {
            const uint8_t* at = blocks + row / ROWS * stretch;
            int64_t token = first;
            token = finish_all<KIND, TIMES, 16>(at, x, token, end, row, ending);
            token = finish_all<KIND, TIMES, 8>(at, x, token, end, row, ending);
            token = finish_all<KIND, TIMES, 4>(at, x, token, end, row, ending);
            finish_all<KIND, TIMES, TIMES>(at, x, token, end, row, ending);
        }
        first = end;
    }
}

// Of N tokens the 32 outputs from a row on, rounded for the product that reads them.
template <Kind KIND, int N, class T>
void finish_rounded(const uint8_t* blocks, const Rounded& x, int64_t token, int64_t row,
                    const Ending<T>& ending, const Rounded& to) {
    constexpr int EACH = SCALES<KIND>, SIZE = GROUP / LANES / EACH;
    int64_t stretch = x.groups * block_bytes<KIND>();
    Floats parts[N * EACH][SIZE];
    for (int block = 0; block < GROUP / ROWS; block++) {
        Floats found[N][PARTS] = {};
        int64_t first = row + block * ROWS;
        if (first < ending.rows)
            tile<KIND, N>(blocks + first / ROWS * stretch, x, token, found);
        for (int n = 0; n < N; n++)
            for (int part = 0; part < PARTS; part++) {
                int at = block * PARTS + part;
                parts[n * EACH + at / SIZE][at % SIZE] =
                    ending.ended(found[n][part], first + part * LANES);
            }
    }
    for (int n = 0; n < N * EACH; n += LANES) {
        int many = std::min(LANES, N * EACH - n);
        round_parts<KIND, false>(to, many, parts + n, [&](int group) {
            int64_t own = token + n / EACH + group;
            return to.first(own) + row / GROUP * to.apart(own);
        });
    }
}

// Of all tokens the groups of 32 rows from..to.
template <Kind KIND, class T>
void multiply_rounded(const Rounded& x, const uint8_t* blocks, int64_t from, int64_t to,
                      const Ending<T>& ending, const Rounded& found) {
    for (int64_t first = 0; first < x.tokens; first += CHUNK) {
        int64_t end = std::min<int64_t>(x.tokens, first + CHUNK);
        for (int64_t row = from * GROUP; row < to * GROUP; row += GROUP) {
            int64_t token = first;
            for (; token + 16 <= end; token += 16)
                finish_rounded<KIND, 16>(blocks, x, token, row, ending, found);
            for (; token + 4 <= end; token += 4)
                finish_rounded<KIND, 4>(blocks, x, token, row, ending, found);
            for (; token < end; token++)
                finish_rounded<KIND, 1>(blocks, x, token, row, ending, found);
        }
    }
}

}  // namespace
