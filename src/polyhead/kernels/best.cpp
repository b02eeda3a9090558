// The log-probabilities of the likeliest few of each row of logits, without those of all others.

#include <algorithm>
#include <cmath>
#include <limits>

#include "vectors.h"

namespace {

// The best so far, in order; of equal ones, what came first stays first.
struct Best {
    float* values;
    int64_t* places;
    int64_t most, held = 0;

    float least() const {
        return held < most ? -std::numeric_limits<float>::infinity() : values[most - 1];
    }

    void take(float value, int64_t place) {
        if (held == most && !(value > values[most - 1])) return;
        int64_t at = held < most ? held++ : most - 1;
        for (; at > 0 && value > values[at - 1]; at--) {
            values[at] = values[at - 1];
            places[at] = places[at - 1];
        }
        values[at] = value;
        places[at] = place;
    }
};

}  // namespace

extern "C" void best_float32(const float* logits, float* values, int64_t* places, int64_t rows,
                             int64_t width, int64_t most, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float* row = logits + i * width;
        Best best{values + i * most, places + i * most, most};
        int64_t whole = width / LANES * LANES;
        for (int64_t at = 0; at < whole; at += LANES) {
            if (best.held == most && !(largest(load(row + at)) > best.least())) continue;
            for (int64_t one = at; one < at + LANES; one++) best.take(row[one], one);
        }
        for (int64_t one = whole; one < width; one++) best.take(row[one], one);

        float top = best.values[0], rest = 0.0f;
        Floats sum = {};
        for (int64_t at = 0; at < whole; at += LANES) sum += exponential(load(row + at) - top);
        for (int64_t one = whole; one < width; one++) rest += std::exp(row[one] - top);
        float log = std::log(total(sum) + rest);
        for (int64_t one = 0; one < most; one++) best.values[one] = best.values[one] - top - log;
    }
}
