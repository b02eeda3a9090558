// The gradient of attention without a bias: the weights are made again from what they summed to
// (Dao et al. 2022, algorithm 4), for a group of heads that share keys and values at a time.

#include <limits>

#include "attend.h"
#include "panels.h"

// Where the gradients lie; as in Shape.
struct Gradients {
    int64_t out[3], q[3], k[3], v[3];
};

namespace {

constexpr int CHUNK = 60;  // queries at once; even, as they are multiplied in pairs

template <class T> class Group {
    typedef Unit<T> U;
    static constexpr int W = WIDTH<U>;

    const Shape& s;
    const Gradients& g;
    const int d, padded;
    Room room;
    float *scores, *slopes, *answers, *of_keys, *of_values;
    U *keys, *values, *keys_down, *queries, *grads, *queries_turned, *grads_turned;
    U *shares_down, *slopes_down;
    Written<U>* slopes_by_rows;

public:
    Group(const Shape& shape, const Gradients& grad)
        : s(shape), g(grad), d(int(s.d)), padded(int((s.keys + LANES - 1) / LANES * LANES)),
          room(int64_t(CHUNK + ROWS) * (padded * 5 + d * 5) + int64_t(padded) * (d + ROWS) * 5) {
        int64_t rows = CHUNK + ROWS, width = padded;
        scores = room.take<float>(rows * width);
        slopes = room.take<float>(rows * width);
        slopes_by_rows = room.take<Written<U>>(rows * width);
        shares_down = room.take<U>(rows * width);
        slopes_down = room.take<U>(rows * width);
        answers = room.take<float>(rows * d);
        queries = room.take<U>(rows * d);
        grads = room.take<U>(rows * d);
        queries_turned = room.take<U>(rows * d);
        grads_turned = room.take<U>(rows * d);
        keys = room.take<U>(width * d);
        values = room.take<U>(width * d);
        keys_down = room.take<U>(width * d);
        of_keys = room.take<float>(width * (d + ROWS));
        of_values = room.take<float>(width * (d + ROWS));
    }

    void begin(const T* k, const T* v) {
        across(k, s.k[2], int(s.keys), d, keys, padded);
        across(v, s.v[2], int(s.keys), d, values, padded);
        down(k, s.k[2], int(s.keys), d, keys_down);
        for (int64_t i = 0; i < int64_t(padded) * d; i += LANES) {
            store(of_keys + i, Floats{});
            store(of_values + i, Floats{});
        }
    }

    void head(const T* q, const T* grad, const uint8_t* seen, const float* logs, T* of_q) {
        for (int first = 0; first < s.queries; first += CHUNK) {
            int rows = std::min<int>(CHUNK, int(s.queries) - first);
            int most = seen_by(first + rows - 1), lanes = (most + LANES - 1) / LANES * LANES;
            const T *from = q + first * s.q[2], *above = grad + first * g.out[2];
            by_rows(from, s.q[2], rows, d, queries);
            by_rows(above, g.out[2], rows, d, grads);
            product(queries, d / W, rows, keys, padded, lanes, d / W, scores, padded);
            product(grads, d / W, rows, values, padded, lanes, d / W, slopes, padded);
            for (int row = 0; row < rows; row++) {
                int at = first + row;
                differentiate(row, seen_by(at), lanes, logs[at],
                              seen ? seen + at * s.seen[2] : nullptr);
            }
            const U* left = reinterpret_cast<const U*>(slopes_by_rows);
            product(left, padded / W, rows, keys_down, d, d, (most + W - 1) / W, answers, d);
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < d; i += LANES)
                    store(of_q + (first + row) * g.q[2] + i, load(answers + row * d + i));
            int steps = (rows + W - 1) / W;
            down_lanes(scores, rows, lanes, shares_down);
            down_lanes(slopes, rows, lanes, slopes_down);
            turn(from, s.q[2], rows, queries_turned);
            turn(above, g.out[2], rows, grads_turned);
            product<true>(grads_turned, CHUNK / W, d, shares_down, padded, lanes, steps, of_values,
                          padded);
            product<true>(queries_turned, CHUNK / W, d, slopes_down, padded, lanes, steps, of_keys,
                          padded);
        }
    }

    void end(T* of_k, T* of_v) const {
        turn_back(of_keys, of_k, g.k[2]);
        turn_back(of_values, of_v, g.v[2]);
    }

private:
    int seen_by(int query) const { return s.causal ? query + 1 : int(s.keys); }

    // Scores become weights, and the weights' gradients the scores'.
    void differentiate(int row, int there, int lanes, float log, const uint8_t* seen) {
        float *p = scores + row * padded, *ds = slopes + row * padded;
        const Ints lane = numbered();
        Floats even = {};
        for (int key = 0; key < lanes; key += LANES) {
            Floats share = {};
            if (key < there) {
                Floats x = load(p + key) * s.scale - log;
                // Rounding may lift a score above the sum.
                share = exponential(x > 0.0f ? Floats{} : x);
                if (seen || key + LANES > there) {
                    Ints keep = lane < there - key;
                    if (seen) keep &= load_some(seen + key, std::min(LANES, there - key)) != 0;
                    share = (Floats)((Ints)share & keep);
                }
            }
            store(p + key, share);
            even += share * load(ds + key);
        }
        float mean = total(even);
        for (int key = 0; key < lanes; key += LANES) {
            Floats slope = load(p + key) * (load(ds + key) - mean) * s.scale;
            store(ds + key, slope);
            store(slopes_by_rows + row * padded + key, slope);
        }
    }

    void down_lanes(const float* x, int rows, int lanes, U* to) const {
        for (int step = 0; step * W < rows; step++) {
            const float* row = x + step * W * padded;
            for (int i = 0; i < lanes; i += LANES) {
                Floats first = load(row + i);
                if constexpr (W == 1)
                    store(to + step * padded + i, first);
                else
                    store_pairs(to + step * padded + i, first,
                                step * W + 1 < rows ? load(row + padded + i) : Floats{});
            }
        }
    }

    // As left: to[channel][step], a step being of W rows.
    void turn(const T* x, int64_t stride, int rows, U* to) const {
        Written<U>* at = reinterpret_cast<Written<U>*>(to);
        for (int row = 0; row < (rows + W - 1) / W * W; row++)
            for (int i = 0; i < d; i += LANES) {
                Written<U> few[LANES] = {};
                if (row < rows) store(few, load(x + row * stride + i));
                for (int lane = 0; lane < LANES; lane++) at[(i + lane) * CHUNK + row] = few[lane];
            }
    }

    void turn_back(const float* x, T* to, int64_t stride) const {
        for (int key = 0; key < s.keys; key++)
            for (int i = 0; i < d; i += LANES) {
                float few[LANES];
                for (int j = 0; j < LANES; j++) few[j] = x[(i + j) * padded + key];
                store(to + key * stride + i, load(few));
            }
    }
};

template <class T>
void back(const Shape& s, const Gradients& g, const T* q, const T* k, const T* v,
          const uint8_t* seen, const float* logs, const T* grad, T* of_q, T* of_k, T* of_v) {
    int64_t sharing = s.heads / s.groups;
#pragma omp parallel num_threads(s.threads)
    {
        Group<T> group(s, g);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.batch * s.groups; i++) {
            int64_t b = i / s.groups, n = i % s.groups;
            group.begin(k + b * s.k[0] + n * s.k[1], v + b * s.v[0] + n * s.v[1]);
            for (int64_t h = n * sharing; h < (n + 1) * sharing; h++)
                group.head(q + b * s.q[0] + h * s.q[1],
                           grad + b * g.out[0] + h * g.out[1],
                           seen ? seen + b * s.seen[0] + h * s.seen[1] : nullptr,
                           logs + (b * s.heads + h) * s.queries, of_q + b * g.q[0] + h * g.q[1]);
            group.end(of_k + b * g.k[0] + n * g.k[1], of_v + b * g.v[0] + n * g.v[1]);
        }
    }
}

}  // namespace

extern "C" {

void attend_back_float32(const Shape* s, const Gradients* g, const float* q, const float* k,
                         const float* v, const uint8_t* seen, const float* logs, const float* grad,
                         float* of_q, float* of_k, float* of_v) {
    back(*s, *g, q, k, v, seen, logs, grad, of_q, of_k, of_v);
}

void attend_back_bfloat16(const Shape* s, const Gradients* g, const BFloat* q, const BFloat* k,
                          const BFloat* v, const uint8_t* seen, const float* logs,
                          const BFloat* grad, BFloat* of_q, BFloat* of_k, BFloat* of_v) {
    back(*s, *g, q, k, v, seen, logs, grad, of_q, of_k, of_v);
}

}
