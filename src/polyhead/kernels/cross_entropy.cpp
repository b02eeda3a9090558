// Cross-entropy of rows of logits, which become their gradient where they stand.

#include <algorithm>
#include <cmath>
#include <limits>

#include "vectors.h"

namespace {

// Calls f(place, numbers, how many) for all of a row; what lies beyond its end is -inf.
template <class T, class F> void over(T* row, int64_t width, F f) {
    int64_t whole = width / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) f(row + i, load(row + i), LANES);
    if (int rest = int(width - whole)) {
        float few[LANES];
        store(few, load_some(row + whole, rest));
        std::fill(few + rest, few + LANES, -std::numeric_limits<float>::infinity());
        f(row + whole, load(few), rest);
    }
}

template <class T> void put(T* to, Floats x, int count) {
    if (count == LANES) {
        store(to, x);
    } else {
        T all[LANES];
        store(all, x);
        std::copy(all, all + count, to);
    }
}

inline float number(float x) { return x; }
inline float number(BFloat x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float found;
    std::memcpy(&found, &bits, sizeof(found));
    return found;
}

// A label below 0 does not count. even: the mean over all classes, what smoothing moves towards.
template <class T>
void cross_entropy(T* logits, const int64_t* labels, float* nll, float* even, int64_t rows,
                   int64_t width, float smoothing, bool differentiates, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        T* row = logits + i * width;
        int64_t label = labels[i];
        nll[i] = even[i] = 0.0f;
        if (label < 0) {
            if (differentiates) over(row, width, [](T* at, Floats, int n) { put(at, Floats{}, n); });
            continue;
        }
        Floats most = Floats{} - std::numeric_limits<float>::infinity(), all = {}, sum = {};
        over(row, width, [&](T*, Floats x, int n) {
            most = most > x ? most : x;
            if (smoothing) {
                float few[LANES] = {};
                store(few, x);
                std::fill(few + n, few + LANES, 0.0f);
                all += load(few);
            }
        });
        float top = largest(most);
        over(row, width, [&](T*, Floats x, int) { sum += exponential(x - top); });
        float log = top + std::log(total(sum)), rest = smoothing / width;
        nll[i] = log - number(row[label]);
        if (smoothing) even[i] = log - total(all) / width;
        if (!differentiates) continue;
        float scale = 1.0f / total(sum);
        float right = std::exp(number(row[label]) - top) * scale - rest - (1.0f - smoothing);
        over(row, width, [&](T* at, Floats x, int n) {
            put(at, exponential(x - top) * scale - rest, n);
        });
        put(row + label, Floats{} + right, 1);
    }
}

}  // namespace

extern "C" {

void cross_entropy_float32(float* logits, const int64_t* labels, float* nll, float* even,
                           int64_t rows, int64_t width, float smoothing, int32_t differentiates,
                           int32_t threads) {
    cross_entropy(logits, labels, nll, even, rows, width, smoothing, differentiates, threads);
}

void cross_entropy_bfloat16(BFloat* logits, const int64_t* labels, float* nll, float* even,
                            int64_t rows, int64_t width, float smoothing, int32_t differentiates,
                            int32_t threads) {
    cross_entropy(logits, labels, nll, even, rows, width, smoothing, differentiates, threads);
}

}
