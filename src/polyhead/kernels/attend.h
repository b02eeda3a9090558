// What attention is over, forward and backward.

#pragma once
#include <cstdint>

// Rows of q, k, v and out are `d` numbers side by side, a multiple of 16; strides are in numbers.
struct Shape {
    int64_t batch, heads, groups, queries, keys, d;
    int64_t q[3], k[3], v[3], out[3];  // of a row of the batch, a head, a token
    int64_t bias[3], seen[3];          // of a row of the batch, a head, a query; keys side by side
    float scale;
    int32_t causal, threads;
};
