// Products of activations in eight bits with weights in four or eight, sixteen outputs at a time.
//
// Weights lie in blocks of 16 rows and 32 columns; sixty-four bytes hold four columns of each row.
// Of eight bits, a weight is its code less 128, by the scale of its row. Of four, a block begins
// with 16 scales and 16 least values as float16, a weight is scale * code + least, and the low
// halves of the bytes are the first sixteen columns, the high halves the others.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

constexpr int GROUP = 32, ROWS = 16, FOURS = GROUP / 4, TOKENS = 8;

typedef uint8_t Codes __attribute__((vector_size(64), aligned(1)));

enum Kind { INT8_ROWS, INT4_GROUPS };

template <Kind KIND> constexpr int64_t block_bytes() {
    return KIND == INT8_ROWS ? GROUP * ROWS : GROUP * ROWS / 2 + 4 * ROWS;
}

inline Codes load_codes(const uint8_t* from) { return *reinterpret_cast<const Codes*>(from); }

#ifdef __AVX512VNNI__
inline Ints dot(Ints sum, Codes codes, int32_t four) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(four));
}
#else
inline Ints dot(Ints sum, Codes codes, int32_t four) {
    int8_t x[4];
    std::memcpy(x, &four, 4);
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < 4; i++) sum[row] += codes[4 * row + i] * x[i];
    return sum;
}
#endif

#ifdef __AVX512F__
inline Floats load_halves(const uint8_t* from) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
#else
inline Floats load_halves(const uint8_t* from) {
    _Float16 halves[LANES];
    std::memcpy(halves, from, sizeof(halves));
    Floats found;
    for (int i = 0; i < LANES; i++) found[i] = (float)halves[i];
    return found;
}
#endif

// Activations of some tokens, a scale for each 32: codes [tokens, width], scales and sums of the
// numbers that the codes stand for [tokens, width / 32].
struct Activations {
    std::vector<int8_t> codes;
    std::vector<float> scales, sums;
    int64_t width, groups;

    Activations(int64_t tokens, int64_t width)
        : codes(tokens * width), scales(tokens * width / GROUP), sums(tokens * width / GROUP),
          width(width), groups(width / GROUP) {}

    // given: how many numbers of a token there are; the rest are zeros.
    template <class T> void read(const T* x, int64_t given, int64_t token) {
        float few[GROUP];
        for (int64_t group = 0; group < groups; group++) {
            int64_t first = group * GROUP, count = std::min<int64_t>(GROUP, given - first);
            Floats low, high;
            if (count == GROUP) {
                low = load(x + first), high = load(x + first + LANES);
            } else {
                low = load_some(x + first, std::min<int64_t>(count, LANES));
                high = load_some(x + first + LANES, std::max<int64_t>(count - LANES, 0));
            }
            store(few, low), store(few + LANES, high);
            float most = std::max(largest(low < 0 ? -low : low), largest(high < 0 ? -high : high));
            float inverse = most > 0 ? 127.0f / most : 0.0f;
            // What is not a number makes the sums none.
            float scale = most / 127.0f + total((low - low) + (high - high));
            int8_t* to = &codes[token * width + first];
            int32_t sum = 0;
            for (int i = 0; i < GROUP; i++) {
                int32_t code = std::lrintf(few[i] * inverse);
                to[i] = code, sum += code;
            }
            scales[token * groups + group] = scale;
            sums[token * groups + group] = scale * sum;
        }
    }
};

// Sixteen outputs of N tokens.
template <Kind KIND, int N>
inline void tile(const uint8_t* at, const Activations& x, int64_t token, Floats* out) {
    for (int n = 0; n < N; n++) out[n] = Floats{};
    for (int64_t group = 0; group < x.groups; group++) {
        Floats scale = Floats{} + 1.0f, least = Floats{} - 128.0f;
        Codes codes[FOURS];
        if (KIND == INT4_GROUPS) {
            scale = load_halves(at), least = load_halves(at + 2 * ROWS);
            at += 4 * ROWS;
            for (int i = 0; i < FOURS / 2; i++) {
                Codes both = load_codes(at + 64 * i);
                codes[i] = both & 15, codes[i + FOURS / 2] = both >> 4;
            }
        } else {
            for (int i = 0; i < FOURS; i++) codes[i] = load_codes(at + 64 * i);
        }
        at += KIND == INT8_ROWS ? GROUP * ROWS : GROUP * ROWS / 2;
        for (int n = 0; n < N; n++) {
            int32_t fours[FOURS];
            std::memcpy(fours, &x.codes[(token + n) * x.width + group * GROUP], GROUP);
            Ints even = {}, odd = {};  // two chains, as each waits for its last sum
            for (int i = 0; i < FOURS; i += 2) {
                even = dot(even, codes[i], fours[i]);
                odd = dot(odd, codes[i + 1], fours[i + 1]);
            }
            int64_t place = (token + n) * x.groups + group;
            Floats sum = __builtin_convertvector(even + odd, Floats);
            out[n] += sum * (scale * x.scales[place]);
            out[n] += least * x.sums[place];
        }
    }
}

template <class T> void keep(T* to, Floats y, int64_t count) {
    if (count >= LANES) return store(to, y);
    T all[LANES];
    store(all, y);
    std::memcpy(to, all, count * sizeof(T));
}
template <> void keep(BFloat* to, Floats y, int64_t count) {
    if (count >= LANES) return store(to, y);
    BFloat all[LANES];
    store(all, y);
    std::memcpy(to, all, count * sizeof(BFloat));
}

template <Kind KIND, int N, class T>
void finish(const uint8_t* at, const Activations& x, int64_t token, int64_t row, int64_t rows,
            const float* row_scales, T* out) {
    Floats found[N];
    tile<KIND, N>(at, x, token, found);
    int64_t count = std::min<int64_t>(ROWS, rows - row);
    for (int n = 0; n < N; n++) {
        Floats y = found[n];
        if (row_scales) y *= load_some(row_scales + row, count);
        keep(out + (token + n) * rows + row, y, count);
    }
}

template <Kind KIND, class T>
void product(const T* in, const uint8_t* blocks, const float* row_scales, T* out, int64_t tokens, int64_t given, int64_t rows, int threads) {
    int64_t groups = (given + GROUP - 1) / GROUP, stretch = groups * block_bytes<KIND>();
    Activations x(tokens, groups * GROUP);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++) x.read(in + token * given, given, token);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row += ROWS) {
            const uint8_t* at = blocks + row / ROWS * stretch;
            int64_t token = 0;
            for (; token + TOKENS <= tokens; token += TOKENS)
                finish<KIND, TOKENS>(at, x, token, row, rows, row_scales, out);
            for (; token + 2 <= tokens; token += 2)
                finish<KIND, 2>(at, x, token, row, rows, row_scales, out);
            for (; token < tokens; token++)
                finish<KIND, 1>(at, x, token, row, rows, row_scales, out);
        }
    }
}

}  // namespace

// in [tokens, given], out [tokens, rows]; row_scales [rows], or none.
#define PRODUCT(NAME, KIND, T)                                                                     \
    extern "C" void product_##NAME(const T* in, const uint8_t* blocks, const float* row_scales,    \
                                   T* out, int64_t tokens, int64_t given, int64_t rows,            \
                                   int32_t threads) {                                              \
        product<KIND>(in, blocks, row_scales, out, tokens, given, rows, threads);                  \
    }
PRODUCT(int8_float32, INT8_ROWS, float)
PRODUCT(int8_bfloat16, INT8_ROWS, BFloat)
PRODUCT(int4_float32, INT4_GROUPS, float)
PRODUCT(int4_bfloat16, INT4_GROUPS, BFloat)
