// The tile of products.h in vectors of 32 bytes: eight of its sixteen rows at a time.

#pragma once
namespace {

// Codes of eight rows in one group of columns, and what times them.
template <Kind KIND> struct Eight {
    static constexpr int COUNT = FOURS / SCALES<KIND>;
    __m256i codes[FOURS];

    explicit Eight(const uint8_t* at) {
        const __m256i low = _mm256_set1_epi8(15);
        for (int i = 0; i < FOURS; i++) {
            int place = KIND == INT4_GROUPS ? i % (FOURS / 2) : i;
            codes[i] = _mm256_loadu_si256((const __m256i*)(at + 64 * place));
            if (KIND == INT4_GROUPS && i >= FOURS / 2) codes[i] = _mm256_srli_epi16(codes[i], 4);
            if (KIND == INT4_GROUPS) codes[i] = _mm256_and_si256(codes[i], low);
            if (IS_SIGNED) codes[i] = _mm256_xor_si256(codes[i], _mm256_set1_epi8(-128));
        }
    }

#ifdef __AVXVNNI__
    static constexpr bool IS_SIGNED = false;

    // Of the columns that share the scale `part` of the activations.
    __m256i times(const Four* fours, int part) const {
        __m256i even = _mm256_setzero_si256(), odd = even;
        for (int i = part * COUNT; i < (part + 1) * COUNT; i += 2) {
            even = _mm256_dpbusd_avx_epi32(even, codes[i], _mm256_set1_epi32(fours[i]));
            odd = _mm256_dpbusd_avx_epi32(odd, codes[i + 1], _mm256_set1_epi32(fours[i + 1]));
        }
        return _mm256_add_epi32(even, odd);
    }
#else
    // Two products of eight bits add up in sixteen, which those with codes to 255 would overflow:
    // of eight bits the codes count from -128 to 127.
    static constexpr bool IS_SIGNED = KIND != INT4_GROUPS;

    __m256i times(const Four* fours, int part) const {
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i sum = _mm256_setzero_si256();
        for (int i = part * COUNT; i < (part + 1) * COUNT; i++) {
            __m256i x = _mm256_set1_epi32(fours[i]);
            if (IS_SIGNED) {
                __m256i sizes = _mm256_abs_epi8(codes[i]), turned = _mm256_sign_epi8(x, codes[i]);
                __m256i pairs = _mm256_maddubs_epi16(sizes, turned);
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
            } else {  // eight pairs of at most 2 * 15 * 127 fit
                sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes[i], x));
            }
        }
        return IS_SIGNED ? sum : _mm256_madd_epi16(sum, ones);
    }
#endif
};

template <Kind KIND, int N>
inline void tile(const uint8_t* at, const Rounded& x, int64_t token, Floats (*found)[PARTS]) {
    for (int n = 0; n < N; n++) found[n][0] = found[n][1] = Floats{};
    int64_t place = x.first(token), apart = x.apart(token);
    for (int64_t group = 0; group < x.groups; group++, place += apart) {
        const Four* fours = (const Four*)(x.codes + place * GROUP);
        for (int i = 0; i < block_bytes<KIND>(); i += 64) __builtin_prefetch(at + 4096 + i);
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
            auto halves = [&](int64_t first) {
                const uint8_t* from = at + first + part * 2 * LANES;
                return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
            };
            Eight<KIND> eight(at + head_bytes<KIND>() + part * 4 * LANES);
            __m256 scale = KIND == INT8_ROWS ? _mm256_set1_ps(1.0f) : halves(0);
            __m256 least = KIND == INT4_GROUPS ? halves(2 * ROWS) : scale;
#pragma GCC unroll 1  // more would not stay in sixteen registers
            for (int n = 0; n < N; n++) {
                for (int some = 0; some < SCALES<KIND>; some++) {
                    __m256 sum = _mm256_cvtepi32_ps(eight.times(fours + n * FOURS, some));
                    float own = x.scales[(place + n) * SCALES<KIND> + some];
                    found[n][part] += (Floats)sum * ((Floats)scale * own);
                }
                if (!Eight<KIND>::IS_SIGNED)
                    found[n][part] += (Floats)least * x.sums[place + n];
            }
        }
        at += block_bytes<KIND>();
    }
}

}  // namespace
