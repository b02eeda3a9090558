// What is done to each token by itself.

#pragma once
#include "activations.h"
#include "step.h"

namespace {

template <class T> struct Norm {  // of `per` rows a token; without `center` by the root mean square
    const T *x, *weight, *bias;
    T* out;
    int64_t tokens, per, width, center;
    double eps;

    void operator()(const Thread& thread) const {
        Share share(tokens, thread);
        for (int64_t row = share.first * per; row < share.end * per; row++)
            one(x + row * width, out + row * width);
    }

    void one(const T* from, T* to) const {
        float mean = 0.0f;
        if (center) {
            Floats sum = {};
            across(width, [&](int64_t i, int n) { sum += read(from + i, n); });
            mean = total(sum) / width;
        }
        Floats squares = {};
        across(width, [&](int64_t i, int n) {
            Floats away = read(from + i, n) - mean;
            if (n < LANES)
                for (int lane = n; lane < LANES; lane++) away[lane] = 0.0f;
            squares += away * away;
        });
        float scale = 1.0f / std::sqrt(total(squares) / width + (float)eps);
        across(width, [&](int64_t i, int n) {
            Floats y = (read(from + i, n) - mean) * scale;
            if (weight) y *= read(weight + i, n);
            write(to + i, bias ? y + read(bias + i, n) : y, n);
        });
    }
};

struct Add {
    static Floats of(Floats a, Floats b) { return a + b; }
};
struct Multiply {
    static Floats of(Floats a, Floats b) { return a * b; }
};

// out = a, op, b: rows begin so far apart, 0 where all tokens share one; a row of b is one number
// where it is not `wide`. Without b, `number` stands for it.
template <class F, class T> struct Binary {
    const T *a, *b;
    T* out;
    int64_t tokens, width, a_apart, b_apart, wide;
    double number_;

    void operator()(const Thread& thread) const {
        Share share(tokens, thread);
        for (int64_t token = share.first; token < share.end; token++) {
            const T *left = a + token * a_apart, *right = b ? b + token * b_apart : nullptr;
            Floats same = Floats{} + (b ? number(*right) : (float)number_);
            across(width, [&](int64_t i, int n) {
                Floats other = wide ? read(right + i, n) : same;
                write(out + token * width + i, F::of(read(left + i, n), other), n);
            });
        }
    }
};
template <class T> using Sum = Binary<Add, T>;
template <class T> using Product = Binary<Multiply, T>;

// out = f(x), times a gate if there is one.
template <class F, class T> struct Activation {
    const T *x, *gate;
    T* out;
    int64_t tokens, width;

    void operator()(const Thread& thread) const {
        Share share(tokens, thread);
        across((share.end - share.first) * width, [&](int64_t i, int n) {
            i += share.first * width;
            Floats y = F::at(read(x + i, n)).value;
            write(out + i, gate ? y * read(gate + i, n) : y, n);
        });
    }
};
template <class T> using SiluOf = Activation<Silu, T>;
template <class T> using GeluOf = Activation<Gelu, T>;
template <class T> using GeluTanhOf = Activation<GeluTanh, T>;
template <class T> using ReluOf = Activation<Relu, T>;

struct Sigmoid {
    static Point at(Floats x) { return {sigmoid(x), Floats{}}; }
};
template <class T> using SigmoidOf = Activation<Sigmoid, T>;

// The rows of a table that tokens name.
template <class T> struct Lookup {
    const int64_t* index;
    const T* table;
    T* out;
    int64_t tokens, width;

    void operator()(const Thread& thread) const {
        Share share(tokens, thread);
        for (int64_t token = share.first; token < share.end; token++)
            std::memcpy(out + token * width, table + index[token] * width, width * sizeof(T));
    }
};

// Halves turned against each other by angles that positions name: [heads, D] of each token.
template <class T> struct Turn {
    const T* x;
    const float *cos, *sin;  // [positions, D / 2]
    const int64_t* at;
    T* out;
    int64_t tokens, heads, d, token_apart, head_apart;

    void operator()(const Thread& thread) const {
        Share share(tokens, thread);
        for (int64_t token = share.first; token < share.end; token++)
            for (int64_t head = 0; head < heads; head++)
                one(x + token * token_apart + head * head_apart,
                    out + (token * heads + head) * d, at[token] * (d / 2));
    }

    void one(const T* from, T* to, int64_t angle) const {
        int64_t half = d / 2;
        across(half, [&](int64_t i, int n) {
            Floats c = read(cos + angle + i, n), s = read(sin + angle + i, n);
            Floats a = read(from + i, n), b = read(from + half + i, n);
            write(to + i, a * c - b * s, n);
            write(to + half + i, b * c + a * s, n);
        });
    }
};

// Numbers of up to three dimensions laid side by side.
template <class T> struct Copy {
    const T* x;
    T* out;
    int64_t tokens, rows, width, token_apart, row_apart, apart;

    void operator()(const Thread& thread) const {
        Share share(tokens, thread);
        for (int64_t token = share.first; token < share.end; token++)
            for (int64_t row = 0; row < rows; row++) {
                const T* from = x + token * token_apart + row * row_apart;
                T* to = out + (token * rows + row) * width;
                for (int64_t i = 0; i < width; i++) to[i] = from[i * apart];
            }
    }
};

// The index of the largest number of each row, the first of several; -1 where that, or any number
// of the row, is none. Each thread looks at a stretch of every row, and the last one compares.
template <class T> struct Likeliest {
    struct Found {
        double best;
        int64_t at;
    };
    const T* x;
    int64_t* out;
    Found* found;  // [threads, tokens]
    int64_t tokens, width;

    void operator()(const Thread& thread) const {
        Share share(width, thread);
        for (int64_t token = 0; token < tokens; token++)
            found[thread.number * tokens + token] = one(x + token * width, share);
        if (thread.taken->fetch_add(1, std::memory_order_acq_rel) < thread.many - 1) return;
        for (int64_t token = 0; token < tokens; token++) {
            Found first = found[token];
            for (int64_t i = 1; i < thread.many; i++) {
                Found next = found[i * tokens + token];
                if (next.best != next.best || next.best > first.best) first = next;
                if (first.best != first.best) break;
            }
            out[token] = std::isfinite(first.best) ? first.at : -1;
        }
    }

    static Found one(const T* row, const Share& share) {
        Floats best = Floats{} - INFINITY;
        Ints at = {}, none = {};
        across(share.end - share.first, [&](int64_t i, int n) {
            Floats y = read(row + share.first + i, n);
            for (int lane = n; lane < LANES; lane++) y[lane] = -INFINITY;
            Ints better = y > best;
            best = better ? y : best;
            at = better ? (int32_t)i + numbered() : at;
            none |= y != y;
        });
        Found first = {best[0], at[0]};
        for (int lane = 0; lane < LANES; lane++) {
            if (none[lane]) return {NAN, 0};
            bool is_first = best[lane] == first.best && at[lane] < first.at;
            if (best[lane] > first.best || is_first) first = {best[lane], at[lane]};
        }
        return {first.best, share.first + first.at};
    }
};

}  // namespace
