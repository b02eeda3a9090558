// The tile of products.h in vectors of 64 bytes.

#pragma once

namespace {

typedef uint8_t Codes __attribute__((vector_size(64), aligned(1)));

inline Codes load_codes(const uint8_t* from) { return *reinterpret_cast<const Codes*>(from); }

inline Ints dot(Ints sum, Codes codes, int32_t four) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(four));
}

inline Floats load_halves(const uint8_t* from) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}

template <Kind KIND, int N>
inline void tile(const uint8_t* at, const Rounded& x, int64_t token, Floats (*found)[PARTS]) {
    for (int n = 0; n < N; n++) found[n][0] = Floats{};
    int64_t place = x.first(token), apart = x.apart(token);
    for (int64_t group = 0; group < x.groups; group++, place += apart) {
        Floats scale, least;
        if (KIND != INT8_ROWS) scale = load_halves(at);
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
            Ints first = {}, second = {};  // two chains, as each waits for its last sum
            for (int i = 0; i < FOURS / 2; i++) {
                first = dot(first, codes[i], fours[n * FOURS + i]);
                second = dot(second, codes[i + FOURS / 2], fours[n * FOURS + i + FOURS / 2]);
            }
            const float* own = x.scales + (place + n) * SCALES<KIND>;
            Floats sum = {};
            if (SCALES<KIND> == 1) first += second;
            else sum = __builtin_convertvector(second, Floats) * own[1];
            sum += __builtin_convertvector(first, Floats) * own[0];
            if (KIND == INT4_GROUPS) found[n][0] += least * x.sums[place + n];
            else sum += x.sums[place + n];
            if (KIND == INT8_ROWS) found[n][0] += sum;
            else found[n][0] += sum * scale;
        }
    }
}

}  // namespace
