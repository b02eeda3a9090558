// LayerNorm of rows side by side, a multiple of 16 numbers wide: statistics in fp32.

#include <cmath>

#include "vectors.h"

namespace {

template <class T>
void norm(const T* x, const T* weight, const T* bias, T* out, int64_t rows, int64_t width,
          float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = x + row * width;
        T* to = out + row * width;
        Floats sum = {}, squares = {};
        for (int64_t i = 0; i < width; i += LANES) sum += load(from + i);
        float mean = total(sum) / width;
        for (int64_t i = 0; i < width; i += LANES) {
            Floats away = load(from + i) - mean;
            squares += away * away;
        }
        float scale = 1.0f / std::sqrt(total(squares) / width + eps);
        for (int64_t i = 0; i < width; i += LANES) {
            Floats y = (load(from + i) - mean) * scale * load(weight + i);
            store(to + i, bias ? y + load(bias + i) : y);
        }
    }
}

}  // namespace

extern "C" {

void norm_float32(const float* x, const float* weight, const float* bias, float* out, int64_t rows,
                  int64_t width, float eps, int32_t threads) {
    norm(x, weight, bias, out, rows, width, eps, threads);
}

void norm_bfloat16(const BFloat* x, const BFloat* weight, const BFloat* bias, BFloat* out,
                   int64_t rows, int64_t width, float eps, int32_t threads) {
    norm(x, weight, bias, out, rows, width, eps, threads);
}

}
