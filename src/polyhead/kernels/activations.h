// Activations and their slopes, some at a time.

#pragma once
#include "vectors.h"

namespace {

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

struct Relu {
    static Point at(Floats x) {
        Floats slope = where(x > 0.0f, Floats{} + 1.0f, Floats{});
        return {where(x < 0.0f, Floats{}, x), slope};  // what is not a number stays none
    }
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

}  // namespace
