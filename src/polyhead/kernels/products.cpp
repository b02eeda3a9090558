// Products of activations in eight bits with weights in four or eight, as products.h lays them.

#include "products.h"

#include <omp.h>
#include <memory>

namespace {

template <Kind KIND, int TIMES, class T>
void product(const T* in, const uint8_t* blocks, const Ending<T>& ending, int64_t tokens,
             int64_t given, int threads) {
    std::unique_ptr<uint8_t[]> room(new uint8_t[Rounded::room(tokens * TIMES, given, SCALES<KIND>)]);
    Rounded x(room.get(), tokens * TIMES, given, SCALES<KIND>);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++)
            round_token<KIND, TIMES>(x, in + token * given, given, token);
        int64_t count = (ending.rows + ROWS - 1) / ROWS, many = omp_get_num_threads();
        int64_t thread = omp_get_thread_num();
        multiply<KIND, TIMES>(x, 0, tokens, blocks, count * thread / many * ROWS,
                              count * (thread + 1) / many * ROWS, ending);
    }
}

// What an ending makes of a product, by a second matrix.
template <Kind KIND, class T>
void both(const T* in, const uint8_t* up, const Ending<T>& between, const uint8_t* down,
          const Ending<T>& ending, int64_t tokens, int64_t given, int threads) {
    constexpr int EACH = SCALES<KIND>;
    int64_t inner = between.rows;
    std::unique_ptr<uint8_t[]> room(new uint8_t[Rounded::room(tokens, given, EACH)]);
    std::unique_ptr<uint8_t[]> wide(new uint8_t[Rounded::room(tokens, inner, EACH)]);
    Rounded x(room.get(), tokens, given, EACH), middle(wide.get(), tokens, inner, EACH);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++)
            round_token<KIND, 1>(x, in + token * given, given, token);
        int64_t many = omp_get_num_threads(), thread = omp_get_thread_num();
        multiply_rounded<KIND>(x, up, middle.groups * thread / many,
                               middle.groups * (thread + 1) / many, between, middle);
#pragma omp barrier
        int64_t count = (ending.rows + ROWS - 1) / ROWS;
        multiply<KIND, 1>(middle, 0, tokens, down, count * thread / many * ROWS,
                          count * (thread + 1) / many * ROWS, ending);
    }
}

template <Kind KIND, class T>
void unpack_rows(const int64_t* index, const uint8_t* blocks, const float* row_scales, T* out,
                 int64_t count, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++)
        unpack_row<KIND>(blocks, row_scales, index[i], width, out + i * width);
}

}  // namespace

// in [tokens, given], out [tokens, rows]; row_scales and bias [rows], or none.
#define PRODUCT(NAME, KIND, TIMES, T)                                                              \
    extern "C" void product_##NAME(const T* in, const uint8_t* blocks, const float* row_scales,    \
                                   const T* bias, int32_t activation, T* out, int64_t tokens,      \
                                   int64_t given, int64_t rows, int32_t threads) {                 \
        Ending<T> ending{row_scales, bias, (Then)activation, out, rows};                     \
        product<KIND, TIMES>(in, blocks, ending, tokens, given, threads);                          \
    }
#define PRODUCTS(NAME, KIND, TIMES)                                                                \
    PRODUCT(NAME##_float32, KIND, TIMES, float)                                                    \
    PRODUCT(NAME##_bfloat16, KIND, TIMES, BFloat)
PRODUCTS(int8_rows, INT8_ROWS, 1)
PRODUCTS(int8_rows_twice, INT8_ROWS, 2)
PRODUCTS(int8, INT8_GROUPS, 1)
PRODUCTS(int8_twice, INT8_GROUPS, 2)
PRODUCTS(int4, INT4_GROUPS, 1)

// in [tokens, given], out [tokens, rows]; up [inner, given] with its scales and bias [inner], down
// [rows, inner] with its own.
#define FEED_FORWARD(NAME, KIND, T)                                                                \
    extern "C" void both_##NAME(const T* in, const uint8_t* up, const float* up_scales,            \
                                const T* up_bias, int32_t activation, const uint8_t* down,         \
                                const float* down_scales, const T* down_bias, T* out,              \
                                int64_t tokens, int64_t given, int64_t inner, int64_t rows,        \
                                int32_t threads) {                                                 \
        Ending<T> between{up_scales, up_bias, (Then)activation, nullptr, inner};                   \
        Ending<T> ending{down_scales, down_bias, NONE, out, rows};                                 \
        both<KIND>(in, up, between, down, ending, tokens, given, threads);                         \
    }
// index [count], out [count, width].
#define UNPACKED(NAME, KIND, T)                                                                    \
    extern "C" void unpack_##NAME(const int64_t* index, const uint8_t* blocks,                     \
                                  const float* row_scales, T* out, int64_t count, int64_t width,   \
                                  int32_t threads) {                                               \
        unpack_rows<KIND>(index, blocks, row_scales, out, count, width, threads);                  \
    }
#define OTHERS(NAME, KIND)                                                                         \
    FEED_FORWARD(NAME##_float32, KIND, float)                                                      \
    FEED_FORWARD(NAME##_bfloat16, KIND, BFloat)                                                    \
    UNPACKED(NAME##_float32, KIND, float)                                                          \
    UNPACKED(NAME##_bfloat16, KIND, BFloat)
OTHERS(int8_rows, INT8_ROWS)
OTHERS(int8, INT8_GROUPS)
OTHERS(int4, INT4_GROUPS)
