// Products of a step: with weights in few bits, with plain ones, and of a mixture's experts.

#pragma once
#include <vector>

#include "products.h"
#include "step.h"

namespace {

// Activations in eight bits, as products with weights of such a kind read them.
template <Kind KIND, int TIMES, class T> struct Round {
    const T* x;
    uint8_t* room;
    int64_t tokens, given;

    void operator()(const Thread& thread) const {
        Rounded to(room, tokens * TIMES, given, SCALES<KIND>);
        Share share(tokens, thread);
        for (int64_t token = share.first; token < share.end; token++)
            round_token<KIND, TIMES>(to, x + token * given, given, token);
    }
};
template <class T> using RoundInt4 = Round<INT4_GROUPS, 1, T>;
template <class T> using RoundInt8 = Round<INT8_GROUPS, 1, T>;
template <class T> using RoundInt8Rows = Round<INT8_ROWS, 1, T>;
template <class T> using RoundInt8Twice = Round<INT8_GROUPS, 2, T>;
template <class T> using RoundInt8RowsTwice = Round<INT8_ROWS, 2, T>;

constexpr int TOKENS = 4;  // whose products take as long as their weights take to be read

// By a matrix in few bits; `ends`, if any, are those of the tokens of each of so many experts,
// whose rows stand one after another.
template <Kind KIND, int TIMES, class T> struct Packed {
    uint8_t* room;
    const uint8_t* blocks;
    const float* row_scales;
    const T* bias;
    T* out;
    const int64_t* ends;
    int64_t tokens, given, rows, experts;

    void operator()(const Thread& thread) const {
        Rounded x(room, tokens * TIMES, given, SCALES<KIND>);
        int64_t matrix = rows / ROWS * x.groups * block_bytes<KIND>();
        // Of few tokens the weights take the time, and each thread reads a stretch of them.
        if (tokens <= TOKENS) {
            Share share(rows / ROWS + (rows % ROWS > 0), thread);
            return multiply_rows(x, share.first * ROWS, std::min(share.end * ROWS, rows), matrix);
        }
        // Some blocks at a time: a core that others are using does fewer of them.
        int64_t parts = thread.many * 4;
        int64_t step = (rows + ROWS * parts - 1) / (ROWS * parts) * ROWS;
        for (int64_t from; (from = thread.take(step)) < rows;)
            multiply_rows(x, from, std::min(from + step, rows), matrix);
    }

    void multiply_rows(const Rounded& x, int64_t from, int64_t to, int64_t matrix) const {
        for (int64_t expert = 0, first = 0; expert < experts; expert++) {
            int64_t last = ends ? ends[expert] : tokens;
            const float* scales = row_scales ? row_scales + expert * rows : nullptr;
            Ending<T> ending{scales, bias, NONE, out, rows};
            multiply<KIND, TIMES>(x, first, last, blocks + expert * matrix, from, to, ending);
            first = last;
        }
    }
};
template <class T> using PackedInt4 = Packed<INT4_GROUPS, 1, T>;
template <class T> using PackedInt8 = Packed<INT8_GROUPS, 1, T>;
template <class T> using PackedInt8Rows = Packed<INT8_ROWS, 1, T>;
template <class T> using PackedInt8Twice = Packed<INT8_GROUPS, 2, T>;
template <class T> using PackedInt8RowsTwice = Packed<INT8_ROWS, 2, T>;

// By a plain matrix [rows, given]; experts as above.
template <class T> struct Dense {
    const T *x, *weight, *bias;
    T* out;
    const int64_t* ends;
    int64_t tokens, given, rows, experts;

    void operator()(const Thread& thread) const {
        int64_t step = std::max<int64_t>(1, rows / DEEP / thread.many / 8) * DEEP;
        for (int64_t from; (from = thread.take(step)) < rows;)
            for (int64_t expert = 0, first = 0; expert < experts; expert++) {
                int64_t last = ends ? ends[expert] : tokens, to = std::min(from + step, rows);
                const T* own = weight + expert * rows * given;
                for (int64_t row = from; row < to; row += DEEP) {
                    int64_t token = first;
                    for (; token + WIDE <= last; token += WIDE) tile<WIDE>(own, token, row);
                    for (; token < last; token++) tile<1>(own, token, row);
                }
                first = last;
            }
    }

    static constexpr int DEEP = 4, WIDE = 4;  // rows and tokens whose sums stay in registers

    template <int N> void tile(const T* own, int64_t token, int64_t row) const {
        Floats sums[DEEP][N] = {};
        int64_t many = std::min<int64_t>(DEEP, rows - row);
        across(given, [&](int64_t i, int n) {
            Floats seen[N];
            for (int k = 0; k < N; k++) seen[k] = read(x + (token + k) * given + i, n);
            for (int j = 0; j < DEEP; j++) {
                Floats w = read(own + (row + (j < many ? j : 0)) * given + i, n);
                for (int k = 0; k < N; k++) sums[j][k] += w * seen[k];
            }
        });
        for (int64_t j = 0; j < many; j++)
            for (int k = 0; k < N; k++) {
                float found = total(sums[j][k]) + (bias ? number(bias[row + j]) : 0.0f);
                store_some(out + (token + k) * rows + row + j, Floats{} + found, 1);
            }
    }
};

// A row of a matrix in few bits for each index.
template <Kind KIND, class T> struct Unpacked {
    const int64_t* index;
    const uint8_t* blocks;
    const float* row_scales;
    T* out;
    int64_t tokens, width;

    void operator()(const Thread& thread) const {
        Share share(tokens, thread);
        for (int64_t token = share.first; token < share.end; token++)
            unpack_row<KIND>(blocks, row_scales, index[token], width, out + token * width);
    }
};
template <class T> using UnpackedInt4 = Unpacked<INT4_GROUPS, T>;
template <class T> using UnpackedInt8 = Unpacked<INT8_GROUPS, T>;
template <class T> using UnpackedInt8Rows = Unpacked<INT8_ROWS, T>;

// The experts of each token by its router's logits: `weights` of its choices, and, sorted by
// expert, which choice stands where (`order`, token * top_k + choice) and where each expert's end.
template <class T> struct Choose {
    const T* logits;
    float* weights;
    int64_t *order, *ends;
    int64_t tokens, experts, top_k, renormalize;

    void operator()(const Thread& thread) const {
        if (thread.number) return;
        std::vector<int64_t> chosen(tokens * top_k);
        for (int64_t token = 0; token < tokens; token++)
            choose(logits + token * experts, &chosen[token * top_k], weights + token * top_k);
        int64_t place = 0;
        for (int64_t expert = 0; expert < experts; expert++) {
            for (int64_t i = 0; i < tokens * top_k; i++)
                if (chosen[i] == expert) order[place++] = i;
            ends[expert] = place;
        }
    }

    void choose(const T* row, int64_t* chosen, float* shares) const {
        float most = -INFINITY, sum = 0.0f, kept = 0.0f;
        for (int64_t e = 0; e < experts; e++) most = std::max(most, number(row[e]));
        for (int64_t e = 0; e < experts; e++) sum += std::exp(number(row[e]) - most);
        for (int64_t k = 0; k < top_k; k++) {
            chosen[k] = 0;
            float best = -INFINITY;
            for (int64_t e = 0; e < experts; e++) {
                bool taken = std::find(chosen, chosen + k, e) != chosen + k;
                if (!taken && number(row[e]) > best) best = number(row[e]), chosen[k] = e;
            }
            shares[k] = std::exp(best - most) / sum;
            kept += shares[k];
        }
        if (renormalize)
            for (int64_t k = 0; k < top_k; k++) shares[k] /= kept;
    }
};

// The rows of x that choices stand for, by their order.
template <class T> struct Gather {
    const T* x;
    const int64_t* order;
    T* out;
    int64_t tokens, width, times;

    void operator()(const Thread& thread) const {
        Share share(tokens, thread);
        for (int64_t token = share.first; token < share.end; token++)
            std::memcpy(out + token * width, x + order[token] / times * width, width * sizeof(T));
    }
};

// Of each token, what its experts found [tokens * top_k, width], by their weights.
template <class T> struct Combine {
    const T* found;
    const float* weights;
    const int64_t* order;
    T* out;
    int64_t tokens, width, top_k;

    void operator()(const Thread& thread) const {
        Share share(tokens, thread);
        for (int64_t token = share.first; token < share.end; token++)
            across(width, [&](int64_t i, int n) {
                Floats sum = {};
                for (int64_t at = 0; at < tokens * top_k; at++)
                    if (order[at] / top_k == token)
                        sum += read(found + at * width + i, n) * weights[order[at]];
                write(out + token * width + i, sum, n);
            });
    }
};

}  // namespace
