// Keys and values kept in pages, and attention of one query a token over them.

#pragma once
#include "step.h"

namespace {

// Where the tokens of a batch lie: token b is at position at[b] of the text in table row rows[b],
// whose blocks those of the pages are; all blocks of a head stand together.
struct Pages {
    const int64_t *at, *rows, *tables;
    int64_t columns, size, blocks, groups, d;

    int64_t slot(int64_t b, int64_t group, int64_t position) const {
        int64_t block = tables[rows[b] * columns + position / size];
        return (group * blocks + block) * size + position % size;
    }
};

// K: how numbers are kept; in eight bits by a scale a vector.
template <class T, class K> struct Keep {
    Pages pages;
    const T *k, *v;
    K *keys, *values;
    float *key_scales, *value_scales;
    int64_t tokens, k_token, k_head, v_token, v_head;

    void operator()(int thread, int threads) const {
        Share share(tokens, thread, threads);
        for (int64_t b = share.first; b < share.end; b++)
            for (int64_t group = 0; group < pages.groups; group++) {
                int64_t slot = pages.slot(b, group, pages.at[b]);
                one(k + b * k_token + group * k_head, keys, key_scales, slot);
                one(v + b * v_token + group * v_head, values, value_scales, slot);
            }
    }

    void one(const T* from, K* into, float* scales, int64_t slot) const {
        K* to = into + slot * pages.d;
        if constexpr (std::is_same_v<K, int8_t>) {
            float most = 1e-12f;
            for (int64_t i = 0; i < pages.d; i++) {
                float x = std::fabs(number(from[i]));
                most = x > most || x != x ? x : most;
            }
            scales[slot] = most / 127.0f;
            for (int64_t i = 0; i < pages.d; i++)
                to[i] = (int8_t)std::lrintf(number(from[i]) / scales[slot]);
        } else {
            std::memcpy(to, from, pages.d * sizeof(K));
        }
    }
};

template <class T, class K> struct Attend {
    Pages pages;
    const T* q;
    const K *keys, *values;
    const float *key_scales, *value_scales;
    const float* bias;  // [H, positions] by how far back a key is, or none
    T* out;             // [tokens, H, D]
    float* room;        // of each thread
    int64_t tokens, heads, q_token, q_head, window, bias_apart, room_apart;
    double scale;

    void operator()(int thread, int threads) const {
        int64_t groups = pages.groups;
        bool by_token = tokens >= threads;
        Share share(by_token ? tokens : tokens * groups, thread, threads);
        int64_t first = share.first * (by_token ? groups : 1);
        int64_t end = share.end * (by_token ? groups : 1);
        for (int64_t unit = first; unit < end; unit++)
            one(unit / groups, unit % groups, room + thread * room_apart);
    }

    // The queries that share a head of keys; `own` holds them, and behind them their weights.
    void one(int64_t b, int64_t group, float* own) const {
        int64_t many = heads / pages.groups, head = group * many, d = pages.d;
        int64_t last = pages.at[b], first = window ? std::max<int64_t>(0, last - window + 1) : 0;
        float *queries = own, *weights = own + many * d;
        for (int64_t j = 0; j < many; j++)
            across(d, [&](int64_t i, int n) {
                Floats x = read(q + b * q_token + (head + j) * q_head + i, n);
                write(queries + j * d + i, x * (float)scale, n);
            });
        int64_t count = last - first + 1;
        stretches(b, group, first, last, [&](int64_t place, int64_t slot, int64_t length) {
            for (int64_t key = 0; key < length; key++)
                for (int64_t j = 0; j < many; j++)
                    weights[j * count + place + key] = score(queries + j * d, slot + key);
        });
        for (int64_t j = 0; j < many; j++) {
            if (bias)
                for (int64_t i = 0; i < count; i++)
                    weights[j * count + i] += bias[(head + j) * bias_apart + count - 1 - i];
            softmax(weights + j * count, count);
        }
        if (value_scales)
            stretches(b, group, first, last, [&](int64_t place, int64_t slot, int64_t length) {
                for (int64_t j = 0; j < many; j++)
                    for (int64_t key = 0; key < length; key++)
                        weights[j * count + place + key] *= value_scales[slot + key];
            });
        T* to = out + (b * heads + head) * d;
        for (int64_t j = 0; j < many; j += AT_ONCE)
            across(d, [&](int64_t i, int n) {
                sum_values(b, group, first, last, weights + j * count,
                           std::min<int64_t>(AT_ONCE, many - j), i, n, to + j * d + i);
            });
    }

    // f(place among the keys, slot, length) of each stretch of keys that stand together.
    template <class F>
    void stretches(int64_t b, int64_t group, int64_t first, int64_t last, F f) const {
        for (int64_t at = first; at <= last;) {
            int64_t length = std::min(pages.size - at % pages.size, last + 1 - at);
            f(at - first, pages.slot(b, group, at), length);
            at += length;
        }
    }

    float score(const float* query, int64_t slot) const {
        Floats sum = {};
        const K* key = keys + slot * pages.d;
        across(pages.d, [&](int64_t i, int n) { sum += read(query + i, n) * read(key + i, n); });
        return total(sum) * (key_scales ? key_scales[slot] : 1.0f);
    }

    static void softmax(float* x, int64_t count) {
        float most = -INFINITY, sum = 0.0f;
        for (int64_t i = 0; i < count; i++) most = x[i] > most ? x[i] : most;
        across(count, [&](int64_t i, int n) {
            Floats y = exponential(read(x + i, n) - most);
            if (n < LANES)
                for (int lane = n; lane < LANES; lane++) y[lane] = 0.0f;
            write(x + i, y, n);
            sum += total(y);
        });
        across(count, [&](int64_t i, int n) { write(x + i, read(x + i, n) / sum, n); });
    }

    static constexpr int AT_ONCE = 4;  // queries whose sums stay in registers

    void sum_values(int64_t b, int64_t group, int64_t first, int64_t last, const float* weights,
                    int64_t many, int64_t i, int n, T* to) const {
        int64_t count = last - first + 1;
        Floats sums[AT_ONCE] = {};
        stretches(b, group, first, last, [&](int64_t place, int64_t slot, int64_t length) {
            for (int64_t key = 0; key < length; key++) {
                Floats value = read(values + (slot + key) * pages.d + i, n);
                const float* weight = weights + place + key;
                for (int j = 0; j < AT_ONCE; j++)
                    sums[j] += value * weight[j < many ? j * count : 0];
            }
        });
        for (int64_t j = 0; j < many; j++) write(to + j * pages.d, sums[j], n);
    }
};

}  // namespace
