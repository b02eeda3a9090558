// Parts of a decode step. Each is a struct of eight-byte fields, as step.py lays them out, whose
// call does one thread's share; a token's numbers lie side by side, its rows one after another.

#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace {

// One thread of those that do a part together.
struct Thread {
    int64_t number, many;
    std::atomic<int64_t>* taken;  // by all of them, of what there is to do

    // The next so many; the first that is not there ends the part.
    int64_t take(int64_t count) const {
        return taken->fetch_add(count, std::memory_order_relaxed);
    }
};

// A thread's share of so many, the same each time.
struct Share {
    int64_t first, end;
    Share(int64_t count, const Thread& thread)
        : first(count * thread.number / thread.many),
          end(count * (thread.number + 1) / thread.many) {}
};

// f(place, count) for every vector of a row, and for the fewer numbers at its end.
template <class F> inline void across(int64_t width, F f) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) f(i, LANES);
    if (i < width) f(i, (int)(width - i));
}

template <class T> inline Floats read(const T* from, int count) {
    return count == LANES ? load(from) : load_some(from, count);
}

template <class T> inline void write(T* to, Floats x, int count) {
    count == LANES ? store(to, x) : store_some(to, x, count);
}

inline float number(float x) { return x; }
inline float number(int8_t x) { return x; }
inline float number(BFloat x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float found;
    std::memcpy(&found, &bits, sizeof(found));
    return found;
}

}  // namespace

#define STEP(NAME, ...)                                                                            \
    extern "C" void NAME(const void* fields, const Thread& thread) {                               \
        (*(const __VA_ARGS__*)fields)(thread);                                                     \
    }
#define STEPS(NAME, PART)                                                                          \
    STEP(NAME##_float32, PART<float>)                                                              \
    STEP(NAME##_bfloat16, PART<BFloat>)
