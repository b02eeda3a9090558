// Products of activations in eight bits with weights in four or eight, as products.h lays them.

#include "products.h"

#include <omp.h>
#include <vector>

namespace {

template <Kind KIND, class T>
void product(const T* in, const uint8_t* blocks, const float* row_scales, T* out, int64_t tokens,
             int64_t given, int64_t rows, int threads) {
    std::vector<uint8_t> room(Rounded::room(tokens, given));
    Rounded x(room.data(), tokens, given);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++)
            round_token(x, in + token * given, given, token);
        int64_t count = (rows + ROWS - 1) / ROWS, many = omp_get_num_threads();
        int64_t thread = omp_get_thread_num();
        multiply<KIND>(x, 0, tokens, blocks, row_scales, count * thread / many * ROWS,
                       count * (thread + 1) / many * ROWS, rows, out);
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
PRODUCT(int8_rows_float32, INT8_ROWS, float)
PRODUCT(int8_rows_bfloat16, INT8_ROWS, BFloat)
PRODUCT(int8_float32, INT8_GROUPS, float)
PRODUCT(int8_bfloat16, INT8_GROUPS, BFloat)
PRODUCT(int4_float32, INT4_GROUPS, float)
PRODUCT(int4_bfloat16, INT4_GROUPS, BFloat)
