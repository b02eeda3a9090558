// Activations, and gates of them, with their gradients: one pass over memory where torch takes two
// to five. Counts are multiples of 16.

#include "activations.h"

namespace {

// out = f(x) * gated; where there is no gate, f(x).
template <class F, class T>
void forward(const T* x, const T* gated, T* out, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i += LANES) {
        Floats y = F::at(load(x + i)).value;
        store(out + i, gated ? y * load(gated + i) : y);
    }
}

template <class F, class T>
void backward(const T* x, const T* gated, const T* grad, T* of_x, T* of_gated, int64_t count,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i += LANES) {
        Point point = F::at(load(x + i));
        Floats g = load(grad + i);
        if (gated) {
            store(of_gated + i, g * point.value);
            g *= load(gated + i);
        }
        store(of_x + i, g * point.slope);
    }
}

}  // namespace

#define FUNCTIONS(NAME, F, TYPE, T)                                                            \
    void NAME##_##TYPE(const T* x, const T* gated, T* out, int64_t count, int32_t threads) {   \
        forward<F>(x, gated, out, count, threads);                                             \
    }                                                                                          \
    void NAME##_back_##TYPE(const T* x, const T* gated, const T* grad, T* of_x, T* of_gated,   \
                            int64_t count, int32_t threads) {                                  \
        backward<F>(x, gated, grad, of_x, of_gated, count, threads);                           \
    }

extern "C" {

FUNCTIONS(silu, Silu, float32, float)
FUNCTIONS(silu, Silu, bfloat16, BFloat)
FUNCTIONS(gelu_tanh, GeluTanh, float32, float)
FUNCTIONS(gelu_tanh, GeluTanh, bfloat16, BFloat)
FUNCTIONS(gelu, Gelu, float32, float)
FUNCTIONS(gelu, Gelu, bfloat16, BFloat)

}
