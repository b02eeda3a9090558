// Activations, and gates of them, with their gradients: one pass over memory where torch takes two
// to five. Counts are multiples of 16.

#include "vectors.h"

namespace {

inline Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

inline Floats where(Ints chosen, Floats yes, Floats no) {
    return (Floats)(((Ints)yes & chosen) | ((Ints)no & ~chosen));
}

inline Floats sigmoid(Floats x) {
    Floats small = exponential(-absolute(x));
    return where(x < 0.0f, small, Floats{} + 1.0f) / (small + 1.0f);
}

struct Point {
    Floats value, slope;
};

struct Silu {
    static Point at(Floats x) {
        Floats s = sigmoid(x);
        return {x * s, s * (x * (1.0f - s) + 1.0f)};
    }
};

struct GeluTanh {  // x (1 + tanh(u)) / 2 is x sigmoid(2 u)
    static Point at(Floats x) {
        constexpr float twice = 1.5957691216f, cubic = 0.044715f;
        Floats square = x * x;
        Floats s = sigmoid(x * (square * cubic + 1.0f) * twice);
        return {x * s, s + x * s * (1.0f - s) * (square * (3 * cubic) + 1.0f) * twice};
    }
};

struct Gelu {  // the normal distribution to 1e-7 (Abramowitz and Stegun, 7.1.26)
    static Point at(Floats x) {
        Floats density = exponential(x * x * -0.5f);
        Floats t = 1.0f / (absolute(x) * 0.23164189f + 1.0f);
        Floats tail = t * 0.5307027145f - 0.7265760135f;
        tail = tail * t + 0.7107068705f;
        tail = tail * t - 0.142248368f;
        tail = (tail * t + 0.127414796f) * t * density;
        Floats below = where(x < 0.0f, tail, 1.0f - tail);
        return {x * below, below + x * density * 0.3989422804f};
    }
};

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
