// Products of small matrices in registers: `left` by rows, `right` in panels whose lanes lie
// side by side. Where the machine multiplies pairs of bf16, bf16 does so; elsewhere it is widened.

#pragma once
#include <algorithm>
#include <new>
#include <type_traits>

#include "vectors.h"

namespace {

// Of a tile: its sums and a row of blocks stay in registers.
constexpr int ROWS = 5, BLOCKS = LANES == 16 ? 4 : 2;

inline Floats multiply_add(Floats sum, float one, const float* some) {
    return sum + load(some) * one;
}

#ifdef __AVX512BF16__
template <class T> using Unit = std::conditional_t<std::is_same_v<T, BFloat>, Pair, float>;

inline Floats multiply_add(Floats sum, Pair one, const Pair* some) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(one.bits),
                                    (__m512bh)_mm512_loadu_si512(some));
}

inline void store_pairs(Pair* to, Floats first, Floats second) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    store(to, (Words)low | (Words)high << 16);
}
#else
template <class T> using Unit = float;
#endif

// How many numbers a unit holds.
template <class U> constexpr int WIDTH = std::is_same_v<U, Pair> ? 2 : 1;

// Where numbers lie, in memory of a thread's own.
class Room {
    char *memory, *free;

public:
    explicit Room(int64_t numbers) : memory((char*)::operator new(numbers * 4 + 64 * 16,
                                                                  std::align_val_t(64))),
                                     free(memory) {}
    ~Room() { ::operator delete(memory, std::align_val_t(64)); }
    Room(const Room&) = delete;

    template <class X> X* take(int64_t count) {
        char* at = free;
        free += (count * 4 + 63) / 64 * 64;
        return reinterpret_cast<X*>(at);
    }
};

// to[ROWS][BLOCKS_] = left[ROWS][steps] x right[steps][BLOCKS_], in blocks of lanes; or added.
template <int BLOCKS_, bool ADDS, class U>
void tile(const U* const* left, const U* right, int stride, int steps, float* to, int to_stride) {
    Floats sums[ROWS][BLOCKS_] = {};
    for (int step = 0; step < steps; step++)
        for (int block = 0; block < BLOCKS_; block++)
            for (int row = 0; row < ROWS; row++)
                sums[row][block] = multiply_add(sums[row][block], left[row][step],
                                                right + step * stride + block * LANES);
    for (int row = 0; row < ROWS; row++)
        for (int block = 0; block < BLOCKS_; block++) {
            float* place = to + row * to_stride + block * LANES;
            store(place, ADDS ? sums[row][block] + load(place) : sums[row][block]);
        }
}

// Products of `rows` rows with `lanes` columns. What fills up the last tile repeats the last row
// and is written after it, so `to` has room for ROWS - 1 rows more.
template <bool ADDS = false, class U>
void product(const U* left, int64_t left_stride, int rows, const U* right, int right_stride,
             int lanes, int steps, float* to, int to_stride) {
    for (int row = 0; row < rows; row += ROWS) {
        const U* from[ROWS];
        for (int i = 0; i < ROWS; i++) from[i] = left + std::min(row + i, rows - 1) * left_stride;
        for (int lane = 0; lane < lanes; lane += BLOCKS * LANES) {
            float* place = to + row * to_stride + lane;
            const U* panel = right + lane;
            switch (std::min(BLOCKS, (lanes - lane) / LANES)) {
                case 1: tile<1, ADDS>(from, panel, right_stride, steps, place, to_stride); break;
                case 2: tile<2, ADDS>(from, panel, right_stride, steps, place, to_stride); break;
                case 3: tile<3, ADDS>(from, panel, right_stride, steps, place, to_stride); break;
                default: tile<BLOCKS, ADDS>(from, panel, right_stride, steps, place, to_stride);
            }
        }
    }
}

// The first `count` units of a row, as many as a vector holds at most, by their bits.
template <class U, class T> Floats units(const T* row, int count) {
    if constexpr (WIDTH<U> == 1) return load_some(row, count);
    else return load_some(reinterpret_cast<const float*>(row), count);
}

// As left: to[row][step] of rows of d numbers.
template <class U, class T> void by_rows(const T* x, int64_t stride, int rows, int d, U* to) {
    int steps = d / WIDTH<U>;
    for (int row = 0; row < rows; row++)
        for (int step = 0; step < steps; step += LANES) {
            int count = std::min(LANES, steps - step);
            Floats some = units<U>(x + row * stride + step * WIDTH<U>, count);
            float* place = reinterpret_cast<float*>(to + row * steps + step);
            count == LANES ? store(place, some) : store_some(place, some, count);
        }
}

// As right: to[step][row], of rows of d numbers, zero in lanes that have none.
template <class U, class T>
void across(const T* x, int64_t stride, int rows, int d, U* to, int padded) {
    for (int block = 0; block < padded; block += LANES) {
        int there = std::min(LANES, rows - block);
        for (int step = 0; step < d / WIDTH<U>; step += LANES) {
            Floats some[LANES] = {};  // of each row as many units
            int steps = std::min(LANES, d / WIDTH<U> - step);
            for (int i = 0; i < there; i++)
                some[i] = units<U>(x + (block + i) * stride + step * WIDTH<U>, steps);
            transpose(some);
            for (int i = 0; i < steps; i++)
                std::memcpy(to + (step + i) * padded + block, &some[i], sizeof(Floats));
        }
    }
}

// As right: to[step][channel]; a pair is of two rows that follow each other, zero beyond the last.
template <class U, class T> void down(const T* x, int64_t stride, int rows, int d, U* to) {
    for (int step = 0; step * WIDTH<U> < rows; step++) {
        const T* row = x + step * WIDTH<U> * stride;
        bool has_second = step * WIDTH<U> + 1 < rows;
        for (int i = 0; i < d; i += LANES) {
            U* at = to + step * d + i;
            if constexpr (WIDTH<U> == 1)
                store(at, load(row + i));
            else if constexpr (std::is_same_v<T, float>)
                store_pairs(at, load(row + i), has_second ? load(row + stride + i) : Floats{});
            else if (has_second)
                store(at, load_bits(row + i) | load_bits(row + stride + i) << 16);
            else
                store(at, load_bits(row + i));
        }
    }
}

// What is written as left for a unit: floats, or bf16 two by two.
template <class U> using Written = std::conditional_t<std::is_same_v<U, Pair>, BFloat, float>;

}  // namespace
