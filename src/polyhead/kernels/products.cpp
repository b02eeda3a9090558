// Products of activations in eight bits with weights in four or eight, as products.h lays them.

#include "products.h"

#include <omp.h>
#include <vector>

namespace {

template <Kind KIND, int TIMES, class T>
void product(const T* in, const uint8_t* blocks, const float* row_scales, T* out, int64_t tokens,
             int64_t given, int64_t rows, int threads) {
    std::vector<uint8_t> room(Rounded::room(tokens * TIMES, given, SCALES<KIND>));
    Rounded x(room.data(), tokens * TIMES, given, SCALES<KIND>);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++)
            round_token<TIMES>(x, in + token * given, given, token);
        int64_t count = (rows + ROWS - 1) / ROWS, many = omp_get_num_threads();
        int64_t thread = omp_get_thread_num();
        multiply<KIND, TIMES>(x, 0, tokens, blocks, row_scales, count * thread / many * ROWS,
                       count * (thread + 1) / many * ROWS, rows, out);
    }
}

}  // namespace

// in [tokens, given], out [tokens, rows]; row_scales [rows], or none.
#define PRODUCT(NAME, KIND, TIMES, T)                                                              \
    extern "C" void product_##NAME(const T* in, const uint8_t* blocks, const float* row_scales,    \
                                   T* out, int64_t tokens, int64_t given, int64_t rows,            \
                                   int32_t threads) {                                              \
        product<KIND, TIMES>(in, blocks, row_scales, out, tokens, given, rows, threads);           \
    }
#define PRODUCTS(NAME, KIND, TIMES)                                                                \
    PRODUCT(NAME##_float32, KIND, TIMES, float)                                                    \
    PRODUCT(NAME##_bfloat16, KIND, TIMES, BFloat)
PRODUCTS(int8_rows, INT8_ROWS, 1)
PRODUCTS(int8_rows_twice, INT8_ROWS, 2)
PRODUCTS(int8, INT8_GROUPS, 1)
PRODUCTS(int8_twice, INT8_GROUPS, 2)
PRODUCTS(int4, INT4_GROUPS, 1)
