// Attention over not too many keys: softmax(q k^T * scale + bias) v, a head of a row at a time.
//
// A head's keys and values are laid out once for products whose lanes are keys (scores) or
// channels (answers); its scores are fp32 and never leave the cache. What causal queries do not
// see is left out.

#include <algorithm>
#include <cmath>
#include <limits>

#include "attend.h"
#include "panels.h"

namespace {

constexpr int CHUNK = 40;  // queries whose scores are held at once
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// One head of a row. T: what is read and written. U: what is multiplied, floats or pairs of bf16.
template <class T> class Head {
    typedef Unit<T> U;
    static constexpr int W = WIDTH<U>;

    const Shape& s;
    const int d, padded;
    Room room;
    float *scores, *answers;
    U *keys, *values, *queries;
    Written<U>* shares;

public:
    explicit Head(const Shape& shape)
        : s(shape), d(int(s.d)), padded(int((s.keys + LANES - 1) / LANES * LANES)),
          room((CHUNK + ROWS) * (padded + d) * 2 + int64_t(padded) * d * 2) {
        int64_t rows = CHUNK + ROWS;
        scores = room.take<float>(rows * padded);
        answers = room.take<float>(rows * d);
        shares = room.take<Written<U>>(rows * padded);
        queries = room.take<U>(rows * d);
        keys = room.take<U>(int64_t(padded) * d);
        values = room.take<U>(int64_t(padded) * d);
    }

    void run(const T* q, const T* k, const T* v, const T* bias, const uint8_t* seen, T* out,
             float* logs) {
        across(k, s.k[2], int(s.keys), d, keys, padded);
        down(v, s.v[2], int(s.keys), d, values);
        for (int64_t first = 0; first < s.queries; first += CHUNK) {
            int rows = int(std::min<int64_t>(CHUNK, s.queries - first));
            // The last query of the chunk sees the most.
            int most = seen_by(int(first) + rows - 1), lanes = (most + LANES - 1) / LANES * LANES;
            scores_of(q + first * s.q[2], rows, lanes);
            float scale[CHUNK + LANES];
            for (int row = 0; row < rows; row += LANES) {
                int64_t at = first + row;
                share(row, std::min(LANES, rows - row), int(at), lanes,
                      bias ? bias + at * s.bias[2] : nullptr,
                      seen ? seen + at * s.seen[2] : nullptr, scale + row,
                      logs ? logs + at : nullptr);
            }
            const U* left = reinterpret_cast<const U*>(shares);
            product(left, padded / W, rows, values, d, d, (most + W - 1) / W, answers, d);
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < d; i += LANES)
                    store(out + (first + row) * s.out[2] + i,
                          load(answers + row * d + i) * scale[row]);
        }
    }

private:
    int seen_by(int query) const { return s.causal ? query + 1 : int(s.keys); }

    void scores_of(const T* q, int rows, int lanes) {
        if constexpr (std::is_same_v<T, U>) {
            product(q, s.q[2], rows, keys, padded, lanes, d, scores, padded);
        } else {
            by_rows(q, s.q[2], rows, d, queries);
            product(queries, d / W, rows, keys, padded, lanes, d / W, scores, padded);
        }
    }

    // Some rows of scores, as many as a vector has numbers at most, become exponentials less their
    // largest, zero where there is no key to see; scale [LANES]: what makes their sums one.
    void share(int first, int count, int query, int lanes, const T* bias, const uint8_t* seen,
               float* scale, float* logs) {
        Floats most[LANES], sums[LANES] = {};
        std::fill_n(most, LANES, Floats{} + NEVER);
        for (int row = 0; row < count; row++)
            most[row] = settled(scores + (first + row) * padded, seen_by(query + row),
                                bias ? bias + row * s.bias[2] : nullptr,
                                seen ? seen + row * s.seen[2] : nullptr);
        Floats tops = highest(most);
        // Whoever sees nothing has exponentials of zero, not of what is no number.
        float top[LANES], sum[LANES];
        store(top, tops == NEVER ? Floats{} : tops);
        for (int row = 0; row < count; row++) {
            int end = (seen_by(query + row) + LANES - 1) / LANES * LANES;
            const float* from = scores + (first + row) * padded;
            Written<U>* to = shares + (first + row) * padded;
            for (int key = 0; key < end; key += LANES) {
                Floats x = exponential(load(from + key) - top[row]);
                sums[row] += x;
                store(to + key, x);
            }
            for (int key = end; key < lanes; key += LANES) store(to + key, Floats{});
        }
        Floats all = totals(sums);
        store(scale, all != 0.0f ? 1.0f / all : Floats{});
        store(sum, all);
        for (int row = 0; logs && row < count; row++)
            logs[row] = sum[row] ? top[row] + std::log(sum[row]) : -NEVER;
    }

    // A row of scores, scaled, its bias added, NEVER where there is no key to see; returns the
    // largest of each lane, or what is not a number.
    Floats settled(float* at, int there, const T* bias, const uint8_t* seen) const {
        const Floats never = Floats{} + NEVER;
        Floats most = never;
        auto settle = [&](int key, Floats x, Ints keep) {
            x = (Floats)(((Ints)x & keep) | ((Ints)never & ~keep));
            store(at + key, x);
            most = larger(most, x);
        };
        int whole = there / LANES * LANES, rest = there - whole;
        for (int key = 0; key < whole; key += LANES) {
            Floats x = load(at + key) * s.scale;
            if (bias) x += load(bias + key);
            settle(key, x, seen ? Ints(load(seen + key) != 0) : ~Ints{});
        }
        if (rest) {
            Floats x = load(at + whole) * s.scale;
            if (bias) x += load_some(bias + whole, rest);
            Ints keep = numbered() < rest;
            if (seen) keep &= load_some(seen + whole, rest) != 0;
            settle(whole, x, keep);
        }
        return most;
    }
};

template <class T>
void attend(const Shape& s, const T* q, const T* k, const T* v, const T* bias, const uint8_t* seen,
            T* out, float* logs) {
    int64_t sharing = s.heads / s.groups;
#pragma omp parallel num_threads(s.threads)
    {
        Head<T> head(s);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.batch * s.heads; i++) {
            int64_t b = i / s.heads, h = i % s.heads, g = h / sharing;
            head.run(q + b * s.q[0] + h * s.q[1], k + b * s.k[0] + g * s.k[1],
                     v + b * s.v[0] + g * s.v[1],
                     bias ? bias + b * s.bias[0] + h * s.bias[1] : nullptr,
                     seen ? seen + b * s.seen[0] + h * s.seen[1] : nullptr,
                     out + b * s.out[0] + h * s.out[1], logs ? logs + i * s.queries : nullptr);
        }
    }
}

}  // namespace

extern "C" {

void attend_float32(const Shape* s, const float* q, const float* k, const float* v,
                    const float* bias, const uint8_t* seen, float* out, float* logs) {
    attend(*s, q, k, v, bias, seen, out, logs);
}

void attend_bfloat16(const Shape* s, const BFloat* q, const BFloat* k, const BFloat* v,
                     const BFloat* bias, const uint8_t* seen, BFloat* out, float* logs) {
    attend(*s, q, k, v, bias, seen, out, logs);
}

}
