// Rotary positions: the halves of each head turned by their angles, or back.

#include "vectors.h"

// Heads are `d` numbers side by side, a multiple of 32; strides are in numbers.
struct Turn {
    int64_t batch, heads, tokens, d;
    int64_t x[3], out[3];  // of a row of the batch, a head, a token
    int64_t angles[2];     // of a row of the batch, a token
    int32_t back, threads;
};

namespace {

template <class T> void rotate(const Turn& s, const T* x, const T* cos, const T* sin, T* out) {
    int64_t half = s.d / 2;
#pragma omp parallel for num_threads(s.threads) schedule(static) collapse(2)
    for (int64_t b = 0; b < s.batch; b++)
        for (int64_t t = 0; t < s.tokens; t++) {
            const T* c = cos + b * s.angles[0] + t * s.angles[1];
            const T* n = sin + b * s.angles[0] + t * s.angles[1];
            for (int64_t h = 0; h < s.heads; h++) {
                const T* from = x + b * s.x[0] + h * s.x[1] + t * s.x[2];
                T* to = out + b * s.out[0] + h * s.out[1] + t * s.out[2];
                for (int64_t i = 0; i < half; i += LANES) {
                    Floats first = load(from + i), second = load(from + half + i);
                    // The gradient takes the transposed turn.
                    Floats low = load(n + (s.back ? half + i : i)) * second;
                    Floats high = load(n + (s.back ? i : half + i)) * first;
                    store(to + i, load(c + i) * first + (s.back ? low : -low));
                    store(to + half + i, load(c + half + i) * second + (s.back ? -high : high));
                }
            }
        }
}

}  // namespace

extern "C" {

void rotate_float32(const Turn* s, const float* x, const float* cos, const float* sin, float* out) {
    rotate(*s, x, cos, sin, out);
}

void rotate_bfloat16(const Turn* s, const BFloat* x, const BFloat* cos, const BFloat* sin,
                     BFloat* out) {
    rotate(*s, x, cos, sin, out);
}

}
