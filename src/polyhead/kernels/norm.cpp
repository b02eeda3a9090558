// LayerNorm and RMSNorm of rows side by side, a multiple of 16 numbers wide, with their gradients:
// statistics in fp32.

#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

struct Spread {
    float mean, scale;
};

// The sum over a row of what f makes of each vector: in several chains, as each waits for its last
// sum.
template <class F> float sum_of(int64_t width, F f) {
    constexpr int CHAINS = 4;
    Floats sums[CHAINS] = {};
    int64_t i = 0;
    for (; i + CHAINS * LANES <= width; i += CHAINS * LANES)
        for (int chain = 0; chain < CHAINS; chain++) sums[chain] += f(i + chain * LANES);
    for (; i < width; i += LANES) sums[0] += f(i);
    return total(sums[0] + sums[1] + (sums[2] + sums[3]));
}

// What a row is brought to the norm by; RMSNorm knows no mean.
template <bool CENTERS, class T> Spread spread(const T* x, int64_t width, float eps) {
    float mean = 0.0f;
    if (CENTERS) mean = sum_of(width, [&](int64_t i) { return load(x + i); }) / width;
    float squares = sum_of(width, [&](int64_t i) {
        Floats away = load(x + i) - mean;
        return away * away;
    });
    return {mean, 1.0f / std::sqrt(squares / width + eps)};
}

template <bool CENTERS, class T>
void forward(const T* x, const T* weight, const T* bias, T* out, int64_t rows, int64_t width,
             float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = x + row * width;
        T* to = out + row * width;
        Spread s = spread<CENTERS>(from, width, eps);
        for (int64_t i = 0; i < width; i += LANES) {
            Floats y = (load(from + i) - s.mean) * s.scale * load(weight + i);
            store(to + i, bias ? y + load(bias + i) : y);
        }
    }
}

// sums [threads, 2, width] come to hold each thread's gradients of weight and bias.
template <bool CENTERS, class T>
void backward(const T* x, const T* weight, const T* grad, T* of_x, float* sums, int64_t rows,
              int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) {
        // Sums of many rows are kept in two stages, or the last rows would be rounded away.
        std::vector<float> near(2 * width);
        float* far = sums + part * 2 * width;
        int64_t first = rows * part / threads, end = rows * (part + 1) / threads;
        for (int64_t row = first; row < end; row++) {
            const T *from = x + row * width, *g = grad + row * width;
            Spread s = spread<CENTERS>(from, width, eps);
            Floats along = {}, even = {};
            for (int64_t i = 0; i < width; i += LANES) {
                Floats y = (load(from + i) - s.mean) * s.scale, own = load(g + i);
                store(&near[i], load(&near[i]) + own * y);
                store(&near[width + i], load(&near[width + i]) + own);
                own *= load(weight + i);
                along += own * y;
                even += own;
            }
            float of_scale = total(along) / width, of_mean = CENTERS ? total(even) / width : 0.0f;
            for (int64_t i = 0; i < width; i += LANES) {
                Floats y = (load(from + i) - s.mean) * s.scale;
                Floats own = load(g + i) * load(weight + i);
                store(of_x + row * width + i, (own - y * of_scale - of_mean) * s.scale);
            }
            if ((row - first) % 128 == 127 || row == end - 1)
                for (int64_t i = 0; i < 2 * width; i += LANES) {
                    store(far + i, load(far + i) + load(&near[i]));
                    store(&near[i], Floats{});
                }
        }
    }
}

}  // namespace

#define FUNCTIONS(NAME, CENTERS, TYPE, T)                                                       \
    void NAME##_##TYPE(const T* x, const T* weight, const T* bias, T* out, int64_t rows,        \
                       int64_t width, float eps, int32_t threads) {                             \
        forward<CENTERS>(x, weight, bias, out, rows, width, eps, threads);                      \
    }                                                                                           \
    void NAME##_back_##TYPE(const T* x, const T* weight, const T* grad, T* of_x, float* sums,   \
                            int64_t rows, int64_t width, float eps, int32_t threads) {          \
        backward<CENTERS>(x, weight, grad, of_x, sums, rows, width, eps, threads);              \
    }

extern "C" {

FUNCTIONS(layer, true, float32, float)
FUNCTIONS(layer, true, bfloat16, BFloat)
FUNCTIONS(rms, false, float32, float)
FUNCTIONS(rms, false, bfloat16, BFloat)

}
