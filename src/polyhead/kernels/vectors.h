// As many numbers at once as a vector of the machine holds, in the vectors of GCC and Clang: read,
// written, summed, raised.

#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define POLYHEAD_AVX2
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(POLYHEAD_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1)));
typedef int8_t Small __attribute__((vector_size(LANES), aligned(1)));

struct BFloat {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};
struct Pair {
    uint32_t bits;
};

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
#if defined(__AVX512BW__)  // GCC 12 widens in two halves, or one by one
inline Words load_bits(const BFloat* from) {
    return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
}
inline Floats load(const Half* from) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
inline void store(Half* to, Floats x) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
inline Ints load(const uint8_t* from) {
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
}
inline Ints load_ints(const int8_t* from) {
    return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
}
#elif defined(POLYHEAD_AVX2)
inline Words load_bits(const BFloat* from) {
    return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
}
inline Floats load(const Half* from) {
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
inline void store(Half* to, Floats x) {
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
inline Ints load(const uint8_t* from) {
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
}
inline Ints load_ints(const int8_t* from) {
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
}
#else
inline Words load_bits(const BFloat* from) {
    return __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words);
}
inline Floats load(const Half* from) {
    Floats found;
    for (int i = 0; i < LANES; i++) found[i] = ((const _Float16*)from)[i];
    return found;
}
inline void store(Half* to, Floats x) {
    for (int i = 0; i < LANES; i++) ((_Float16*)to)[i] = (_Float16)x[i];
}
inline Ints load(const uint8_t* from) {
    return __builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Ints);
}
inline Ints load_ints(const int8_t* from) {
    return __builtin_convertvector(*reinterpret_cast<const Small*>(from), Ints);
}
#endif
inline Floats load(const BFloat* from) { return (Floats)(load_bits(from) << 16); }
inline Floats load(const int8_t* from) {
    return __builtin_convertvector(load_ints(from), Floats);
}

// The first n numbers; the rest is zero.
template <class T> inline auto load_some(const T* from, int n) {
    T few[LANES] = {};
    for (int i = 0; i < n; i++) few[i] = from[i];
    return load(few);
}

// 0, 1, 2 and so on.
inline Ints numbered() {
    constexpr int32_t all[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return *reinterpret_cast<const Ints*>(all);
}

inline Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

inline void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }
inline void store(Pair* to, Words x) { *reinterpret_cast<Words*>(to) = x; }

#ifdef __AVX512BW__
inline Floats load_some(const float* from, int n) {
    return (Floats)_mm512_maskz_loadu_ps((1u << n) - 1, from);
}
inline Floats load_some(const BFloat* from, int n) {
    __m512i bits = _mm512_maskz_loadu_epi16((1u << n) - 1, from);
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16);
}
inline Ints load_some(const uint8_t* from, int n) {
    return (Ints)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8((1u << n) - 1, from));
}
template <int BITS> using Mix = std::integral_constant<int, BITS>;
inline float largest(Floats x) { return _mm512_reduce_max_ps((__m512)x); }
inline float total(Floats x) { return _mm512_reduce_add_ps((__m512)x); }
// Sixteen vectors at once: of each, what an operation makes of its numbers.
template <class Op> inline Floats reduce_each(const Floats* x, Op op) {
    auto of = [&](Floats a, Floats b, auto low, auto high) {
        return op((Floats)_mm512_shuffle_f32x4((__m512)a, (__m512)b, low.value),
                  (Floats)_mm512_shuffle_f32x4((__m512)a, (__m512)b, high.value));
    };
    auto within = [&](Floats a, Floats b, auto low, auto high) {
        return op((Floats)_mm512_shuffle_ps((__m512)a, (__m512)b, low.value),
                  (Floats)_mm512_shuffle_ps((__m512)a, (__m512)b, high.value));
    };
    Floats some[4];
    for (int i = 0; i < 4; i++)
        some[i] = of(of(x[i], x[i + 4], Mix<0x44>(), Mix<0xee>()),
                     of(x[i + 8], x[i + 12], Mix<0x44>(), Mix<0xee>()), Mix<0x88>(), Mix<0xdd>());
    return within(within(some[0], some[1], Mix<0x44>(), Mix<0xee>()),
                  within(some[2], some[3], Mix<0x44>(), Mix<0xee>()), Mix<0x88>(), Mix<0xdd>());
}

// Rows of sixteen become columns.
inline void transpose(Floats* x) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm512_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        x[i] = (Floats)_mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
        x[i + 8] = (Floats)_mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    }
}
#elif defined(POLYHEAD_AVX2)
template <class Op> inline float reduce(Floats x, Op op) {
    __m128 half = op(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    half = op(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(op(half, _mm_movehdup_ps(half)));
}
inline float largest(Floats x) {
    return reduce(x, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}
inline float total(Floats x) {
    return reduce(x, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}

// Eight vectors at once: of each, what an operation makes of its numbers.
template <class Op> inline Floats reduce_each(const Floats* x, Op op) {
    auto pairs = [&](__m256 a, __m256 b) {
        return (__m256)op((Floats)_mm256_shuffle_ps(a, b, 0x88),
                          (Floats)_mm256_shuffle_ps(a, b, 0xdd));
    };
    __m256 some[2];
    for (int i = 0; i < 2; i++)
        some[i] = pairs(pairs((__m256)x[4 * i], (__m256)x[4 * i + 1]),
                        pairs((__m256)x[4 * i + 2], (__m256)x[4 * i + 3]));
    return op((Floats)_mm256_permute2f128_ps(some[0], some[1], 0x20),
              (Floats)_mm256_permute2f128_ps(some[0], some[1], 0x31));
}

// Rows of eight become columns.
inline void transpose(Floats* x) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps((__m256)x[i], (__m256)x[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps((__m256)x[i], (__m256)x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        x[i] = (Floats)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        x[i + 4] = (Floats)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}
#else
template <class Op> inline float reduce(Floats x, Op op) {
    float all[LANES];
    std::memcpy(all, &x, sizeof(all));
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) all[i] = op(all[i], all[i + half]);
    return all[0];
}
inline float largest(Floats x) {
    return reduce(x, [](float a, float b) { return a > b ? a : b; });
}
inline float total(Floats x) {
    return reduce(x, [](float a, float b) { return a + b; });
}
// As many vectors as a vector has numbers: of each, what an operation makes of its numbers.
template <class Op> inline Floats reduce_each(const Floats* x, Op op) {
    Floats rows[LANES];
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) rows[i][j] = x[j][i];
    return op(op(rows[0], rows[2]), op(rows[1], rows[3]));
}
inline void transpose(Floats* x) {
    Floats rows[LANES];
    std::memcpy(rows, x, sizeof(rows));
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) x[i][j] = rows[j][i];
}
#endif

inline Floats totals(const Floats* x) {
    return reduce_each(x, [](Floats a, Floats b) { return a + b; });
}

// The larger numbers; what is not a number is larger than all.
inline Floats larger(Floats a, Floats b) {
    return (Ints)(a > b) | (Ints)(a != a) ? a : b;
}

// Of vectors, the largest of each.
inline Floats highest(const Floats* x) { return reduce_each(x, larger); }

// Of vectors of what is not negative, the largest of each: what is not a number is larger than
// all.
inline Floats tops(const Floats* x) {
    return reduce_each(x, [](Floats a, Floats b) { return (Ints)a > (Ints)b ? a : b; });
}

#ifdef __AVX512BF16__
inline void store(BFloat* to, Floats x) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#else
inline void store(BFloat* to, Floats x) {  // to the nearest, ties to even
    Words bits = (Words)x;
    Words near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Words none = (Words)(x != x);
    *reinterpret_cast<Halves*>(to) =
        __builtin_convertvector((near & ~none) | (none & 0x7fc0), Halves);
}
#endif

// The first n.
template <class T> inline void store_some(T* to, Floats x, int64_t n) {
    T all[LANES];
    store(all, x);
    std::memcpy(to, all, n * sizeof(T));
}

inline Floats exponential(Floats x) {  // of x <= 0, to 1e-7
    Floats y = x * 1.44269504f;
    Floats shifted = y + 12582912.0f;  // 1.5 * 2^23: the whole part stands in the lowest bits
    Floats rest = y - (shifted - 12582912.0f);
    Floats power = rest * 1.54035304e-4f + 1.33335581e-3f;
    power = power * rest + 9.61812911e-3f;
    power = power * rest + 5.55041087e-2f;
    power = power * rest + 2.40226507e-1f;
    power = power * rest + 6.93147181e-1f;
    power = power * rest + 1.0f;
    // The difference is zero, but keeps what is not a number. What is very small is zero.
    Floats found = (Floats)((Ints)power + ((Ints)shifted << 23)) + (x - x);
    return (Floats)((Ints)found & ~(Ints)(y <= -126.0f));
}

}  // namespace
