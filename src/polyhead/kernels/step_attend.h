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

// K: how numbers are kept: as they are, as halves, or in eight bits by a scale a vector.
template <class T, class K> struct Keep {
    Pages pages;
    const T *k, *v;
    K *keys, *values;
    float *key_scales, *value_scales;
    int64_t tokens, k_token, k_head, v_token, v_head;

    void operator()(const Thread& thread) const {
        // Where threads share the keys of a token, the last one has the newest.
        bool is_shared = tokens < thread.many;
        if (is_shared && thread.number < thread.many - 1) return;
        Share share(tokens, is_shared ? Thread{0, 1, nullptr} : thread);
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
        } else if constexpr (std::is_same_v<K, T>) {
            std::memcpy(to, from, pages.d * sizeof(K));
        } else {
            constexpr float most = 65504.0f;  // a half has no larger one
            across(pages.d, [&](int64_t i, int n) {
                Floats x = read(from + i, n);
                x = x > most ? Floats{} + most : x;
                write(to + i, x < -most ? Floats{} - most : x, n);
            });
        }
    }
};

template <class T, class K> struct Run;

template <class T, class K> struct Attend {
    Pages pages;
    const T* q;
    const K *keys, *values;
    const float *key_scales, *value_scales;
    const float* bias;  // [H, positions] by how far back a key is, or none
    T* out;             // [tokens, H, D]
    float* parts;       // what each thread found: [threads, tokens, H, D + 2], or none
    float* room;        // of each thread
    int64_t tokens, heads, q_token, q_head, window, bias_apart, room_apart, threads;
    double scale;

    // Of few tokens each thread takes some, or, where they are fewer than threads, some of their
    // keys; of many, they stand in runs of texts being read.
    void operator()(const Thread& thread) const {
        int64_t groups = pages.groups, unit = 0;
        float* own = room + thread.number * room_apart;
        if (parts) return by_keys(thread, own);
        if (tokens <= FEW) {
            Share share(tokens, thread);
            for (int64_t b = share.first; b < share.end; b++)
                for (int64_t group = 0; group < groups; group++) one(b, group, own);
            return;
        }
        for (int64_t b = 0, end; b < tokens; b = end) {
            end = run_end(b);
            for (int64_t group = 0; group < groups; group++) {
                if (unit++ % thread.many != thread.number) continue;
                end - b == 1 ? one(b, group, own)
                             : Run<T, K>{*this, b, end, group}.attend(own);
            }
        }
    }

    static constexpr int64_t FEW = 16;

    // Tokens that follow one another in a text, as many as one run takes.
    int64_t run_end(int64_t b) const {
        int64_t most = std::max<int64_t>(1, Run<T, K>::QUERIES * pages.groups / heads), end = b + 1;
        while (end < tokens && end - b < most && pages.rows[end] == pages.rows[b] &&
               pages.at[end] == pages.at[b] + end - b)
            end++;
        return end;
    }

    int64_t first(int64_t b) const {
        return window ? std::max<int64_t>(0, pages.at[b] - window + 1) : 0;
    }

    void by_keys(const Thread& thread, float* own) const {
        for (int64_t b = 0; b < tokens; b++) {
            int64_t begin = first(b), last = pages.at[b];
            Share share((last - begin) / LANES + 1, thread);
            int64_t from = begin + share.first * LANES;
            int64_t to = std::min(begin + share.end * LANES - 1, last);
            float* found = parts + (thread.number * tokens + b) * heads * (pages.d + 2);
            for (int64_t group = 0; group < pages.groups; group++)
                some(b, group, from, to, own, found + group * heads / pages.groups * (pages.d + 2));
        }
        if (thread.number < thread.many - 1) return;
        for (int64_t row = thread.many * tokens * heads; row < threads * tokens * heads; row++)
            parts[row * (pages.d + 2) + pages.d + 1] = 0.0f;  // of threads that are not there
    }

    // The queries that share a head of keys.
    void one(int64_t b, int64_t group, float* own) const {
        int64_t many = heads / pages.groups, d = pages.d;
        float* found = own + many * d;
        some(b, group, first(b), pages.at[b], own, found);
        for (int64_t j = 0; j < many; j++, found += d + 2)
            across(d, [&](int64_t i, int n) {
                T* to = out + (b * heads + group * many + j) * d + i;
                write(to, read(found + i, n) / found[d + 1], n);
            });
    }

    // The same among the keys first..last; of each query the sums of values by their weights, which
    // are as if the highest score were zero, then that score and the sum of the weights. `own`
    // holds the queries, room for what `one` finds, and weights.
    void some(int64_t b, int64_t group, int64_t first, int64_t last, float* own,
              float* found) const {
        int64_t many = heads / pages.groups, head = group * many, d = pages.d;
        int64_t count = std::max<int64_t>(0, last - first + 1);
        float *queries = own, *weights = own + many * (2 * d + 2);
        for (int64_t j = 0; j < many; j++)
            across(d, [&](int64_t i, int n) {
                Floats x = read(q + b * q_token + (head + j) * q_head + i, n);
                write(queries + j * d + i, x * (float)scale, n);
            });
        stretches(b, group, first, last, [&](int64_t place, int64_t slot, int64_t length) {
            // Stretches lie here and there, where nobody but us knows what is read next.
            int64_t next = first + place + length;
            if (next <= last) fetch(keys + pages.slot(b, group, next) * d, length * d);
            fetch(values + slot * d, length * d);
            for (int64_t key = 0; key < length; key += LANES)
                for (int64_t j = 0; j < many; j++) {
                    int some = std::min<int64_t>(LANES, length - key);
                    Floats found = scores(queries + j * d, slot + key, some);
                    write(weights + j * count + place + key, found, some);
                }
        });
        for (int64_t j = 0; j < many; j++) {
            if (bias)
                for (int64_t i = 0, back = pages.at[b] - first; i < count; i++, back--)
                    weights[j * count + i] += bias[(head + j) * bias_apart + back];
            weigh(weights + j * count, count, found + j * (d + 2) + d);
        }
        if (value_scales)
            stretches(b, group, first, last, [&](int64_t place, int64_t slot, int64_t length) {
                for (int64_t j = 0; j < many; j++)
                    for (int64_t key = 0; key < length; key++)
                        weights[j * count + place + key] *= value_scales[slot + key];
            });
        for (int64_t j = 0; j < many; j += AT_ONCE) {
            Sums sums{*this, b, group, first, last, weights + j * count, found + j * (d + 2)};
            switch (std::min<int64_t>(AT_ONCE, many - j)) {
                case 1: sums.template all<1>(); break;
                case 2: sums.template all<2>(); break;
                case 3: sums.template all<3>(); break;
                default: sums.template all<AT_ONCE>();
            }
        }
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

    // Bring so many numbers near.
    static void fetch(const K* from, int64_t count) {
        const char *begin = (const char*)from, *end = (const char*)(from + count);
        for (; begin < end; begin += 64) __builtin_prefetch(begin);
    }

    // Of as many keys that stand together as a vector holds, or fewer.
    Floats scores(const float* query, int64_t slot, int count) const {
        Floats sums[LANES] = {};
        const K* key = keys + slot * pages.d;
        across(pages.d, [&](int64_t i, int n) {
            Floats own = read(query + i, n);
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++)
                if (j < count) sums[j] += own * read(key + j * pages.d + i, n);
        });
        Floats found = totals(sums);
        return key_scales ? found * read(key_scales + slot, count) : found;
    }

    // From scores to weights; to[0] is the highest score, to[1] the sum.
    static void weigh(float* x, int64_t count, float* to) {
        Floats high = Floats{} - INFINITY, sum = {};
        across(count, [&](int64_t i, int n) {
            Floats y = read(x + i, n);
            for (int lane = n; lane < LANES; lane++) y[lane] = -INFINITY;
            high = y > high ? y : high;
        });
        float most = largest(high);
        across(count, [&](int64_t i, int n) {
            Floats y = exponential(read(x + i, n) - most);
            for (int lane = n; lane < LANES; lane++) y[lane] = 0.0f;
            write(x + i, y, n);
            sum += y;
        });
        to[0] = most, to[1] = total(sum);
    }

    static constexpr int AT_ONCE = 4;  // queries and vectors whose sums stay in registers

    // Sums of values by the weights of N queries.
    struct Sums {
        const Attend& of;
        int64_t b, group, first, last;
        const float* weights;
        float* to;

        template <int N> void all() const {
            int64_t i = 0, d = of.pages.d;
            for (; i + AT_ONCE * LANES <= d; i += AT_ONCE * LANES) some<N, AT_ONCE>(i, LANES);
            for (; i < d; i += LANES) some<N, 1>(i, std::min<int64_t>(LANES, d - i));
        }

        template <int N, int WIDE> void some(int64_t i, int n) const {
            int64_t count = last - first + 1, d = of.pages.d;
            Floats sums[N][WIDE] = {};
            of.stretches(b, group, first, last, [&](int64_t place, int64_t slot, int64_t length) {
                for (int64_t key = 0; key < length; key++) {
                    Floats value[WIDE];
                    for (int k = 0; k < WIDE; k++)
                        value[k] = read(of.values + (slot + key) * d + i + k * LANES, n);
                    for (int j = 0; j < N; j++)
                        for (int k = 0; k < WIDE; k++)
                            sums[j][k] += value[k] * weights[j * count + place + key];
                }
            });
            for (int j = 0; j < N; j++)
                for (int k = 0; k < WIDE; k++)
                    write(to + j * (d + 2) + i + k * LANES, sums[j][k], n);
        }
    };
};

// What the threads found of each token's keys, put together.
template <class T> struct Join {
    const float* parts;  // [threads, tokens, H, D + 2]
    T* out;
    int64_t tokens, heads, d, threads;

    void operator()(const Thread& thread) const {
        Share share(tokens * heads, thread);
        for (int64_t row = share.first; row < share.end; row++) one(row);
    }

    void one(int64_t row) const {
        float most = -INFINITY, mass = 0.0f;
        for (int64_t t = 0; t < threads; t++)
            if (found(t, row)[d + 1] != 0.0f) most = std::max(most, found(t, row)[d]);
        for (int64_t t = 0; t < threads; t++) {
            float by = factor(t, row, most);
            if (by != 0.0f) mass += found(t, row)[d + 1] * by;
        }
        across(d, [&](int64_t i, int n) {
            Floats sum = {};
            for (int64_t t = 0; t < threads; t++)
                if (float by = factor(t, row, most)) sum += read(found(t, row) + i, n) * by;
            write(out + row * d + i, sum / mass, n);
        });
    }

    const float* found(int64_t t, int64_t row) const {
        return parts + (t * tokens * heads + row) * (d + 2);
    }
    // Where there was no key, there are no numbers.
    float factor(int64_t t, int64_t row, float most) const {
        const float* own = found(t, row);
        return own[d + 1] == 0.0f ? 0.0f : std::exp(own[d] - most);
    }
};

// The queries of tokens b..end of one text that share a head of keys: R rows, the heads of a token
// one after another. Weights are summed some keys at a time (Dao et al. 2022).
template <class T, class K> struct Run {
    static constexpr int64_t QUERIES = 48, KEYS = 128, AT_ONCE = 8;

    const Attend<T, K>& all;
    int64_t b, end, group;

    // What the rows of one thread need.
    static int64_t room(int64_t d) { return QUERIES * (2 * d + KEYS + 2) + LANES * d; }

    void attend(float* own) const {
        const Pages& pages = all.pages;
        int64_t d = pages.d, many = all.heads / pages.groups, rows = (end - b) * many;
        float *queries = own, *sums = queries + QUERIES * d, *weights = sums + QUERIES * d;
        float *most = weights + QUERIES * KEYS, *mass = most + QUERIES, *turned = mass + QUERIES;
        for (int64_t row = 0; row < rows; row++) {
            const T* from = all.q + (b + row / many) * all.q_token + head(row) * all.q_head;
            across(d, [&](int64_t i, int n) {
                write(queries + row * d + i, read(from + i, n) * (float)all.scale, n);
            });
            most[row] = -INFINITY, mass[row] = 0.0f;
        }
        std::fill(queries + rows * d, queries + QUERIES * d, 0.0f);
        std::fill(sums, sums + QUERIES * d, 0.0f);
        int64_t from = all.window ? std::max<int64_t>(0, pages.at[b] - all.window + 1) : 0;
        for (; from <= pages.at[end - 1]; from += KEYS) {
            int64_t count = std::min(KEYS, pages.at[end - 1] + 1 - from), slots[KEYS];
            all.stretches(b, group, from, from + count - 1,
                          [&](int64_t place, int64_t slot, int64_t length) {
                              for (int64_t i = 0; i < length; i++) slots[place + i] = slot + i;
                          });
            for (int64_t key = 0; key < count; key += LANES) {
                turn(slots + key, std::min<int64_t>(LANES, count - key), turned);
                score(queries, turned, rows, weights + key);
            }
            for (int64_t row = 0; row < rows; row++)
                weigh(row, from, count, slots, weights + row * KEYS, sums + row * d, most[row],
                      mass[row]);
            sum_values(slots, count, rows, weights, sums);
        }
        for (int64_t row = 0; row < rows; row++) {
            T* to = all.out + ((b + row / many) * all.heads + head(row)) * d;
            across(d, [&](int64_t i, int n) {
                write(to + i, read(sums + row * d + i, n) / mass[row], n);
            });
        }
    }

    int64_t head(int64_t row) const {
        int64_t many = all.heads / all.pages.groups;
        return group * many + row % many;
    }

    // As many keys as a vector holds, or fewer, as the columns of [D, LANES].
    void turn(const int64_t* slots, int64_t count, float* turned) const {
        int64_t d = all.pages.d;
        across(d, [&](int64_t i, int n) {
            Floats some[LANES];
            for (int64_t lane = 0; lane < LANES; lane++) {
                int64_t slot = slots[lane < count ? lane : 0];
                some[lane] = read(all.keys + slot * d + i, n);
                if (all.key_scales) some[lane] *= all.key_scales[slot];
            }
            transpose(some);
            for (int k = 0; k < n; k++) store(turned + (i + k) * LANES, some[k]);
        });
    }

    void score(const float* queries, const float* turned, int64_t rows, float* weights) const {
        int64_t d = all.pages.d;
        for (int64_t row = 0; row < rows; row += AT_ONCE) {
            Floats sums[AT_ONCE] = {};
            const float* own = queries + row * d;
            for (int64_t i = 0; i < d; i++) {
                Floats keys = load(turned + i * LANES);
#pragma GCC unroll 8
                for (int j = 0; j < AT_ONCE; j++) sums[j] += keys * own[j * d + i];
            }
            for (int j = 0; j < AT_ONCE; j++) store(weights + (row + j) * KEYS, sums[j]);
        }
    }

    // From scores to weights, and what was summed before made to fit them.
    void weigh(int64_t row, int64_t from, int64_t count, const int64_t* slots, float* weights,
               float* sums, float& most, float& mass) const {
        int64_t many = all.heads / all.pages.groups, at = all.pages.at[b + row / many];
        const float* bias = all.bias ? all.bias + head(row) * all.bias_apart : nullptr;
        float high = most;
        for (int64_t i = 0; i < count; i++) {
            int64_t back = at - from - i;
            bool seen = back >= 0 && (!all.window || back < all.window);
            if (!seen) weights[i] = -INFINITY;
            else if (bias) weights[i] += bias[back];
            high = weights[i] > high ? weights[i] : high;
        }
        if (high == -INFINITY) return std::fill(weights, weights + count, 0.0f);
        float factor = std::exp(most - high);
        most = high, mass *= factor;
        across(all.pages.d, [&](int64_t i, int n) { write(sums + i, read(sums + i, n) * factor, n); });
        across(count, [&](int64_t i, int n) {
            Floats y = exponential(read(weights + i, n) - most);
            for (int lane = n; lane < LANES; lane++) y[lane] = 0.0f;
            write(weights + i, y, n);
            mass += total(y);
        });
        if (all.value_scales)
            for (int64_t i = 0; i < count; i++) weights[i] *= all.value_scales[slots[i]];
    }

    void sum_values(const int64_t* slots, int64_t count, int64_t rows, const float* weights,
                    float* sums) const {
        int64_t d = all.pages.d;
        for (int64_t row = 0; row < rows; row += AT_ONCE)
            across(d, [&](int64_t i, int n) {
                Floats found[AT_ONCE] = {};
                const float* own = weights + row * KEYS;
                for (int64_t key = 0; key < count; key++) {
                    Floats value = read(all.values + slots[key] * d + i, n);
#pragma GCC unroll 8
                    for (int j = 0; j < AT_ONCE; j++) found[j] += value * own[j * KEYS + key];
                }
                for (int j = 0; j < AT_ONCE; j++) {
                    float* to = sums + (row + j) * d + i;
                    write(to, read(to, n) + found[j], n);
                }
            });
    }
};

}  // namespace
