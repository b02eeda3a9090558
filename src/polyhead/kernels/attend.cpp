// Attention over not too many keys: softmax(q k^T * scale + bias) v, a head of a row at a time.
//
// A head's keys and values are laid out once for products whose 16 lanes are keys (scores) or
// channels (answers); its scores are fp32 and never leave the cache. Where the machine multiplies
// pairs of bf16, bf16 does so; elsewhere it is widened first.

#include <algorithm>
#include <limits>
#include <new>
#include <type_traits>

#include "vectors.h"

// Rows of q, k, v and out are `d` numbers side by side, a multiple of 16; other strides are in
// numbers.
struct Shape {
    int64_t batch, heads, groups, queries, keys, d;
    int64_t q[3], k[3], v[3], out[3];  // of a row of the batch, a head, a token
    int64_t bias[3], seen[3];          // of a row of the batch, a head, a query; keys side by side
    float scale;
    int32_t threads;
};

namespace {

constexpr int ROWS = 5, BLOCKS = 4;  // of a tile: its 20 sums and 4 blocks stay in registers
constexpr int CHUNK = 40;            // queries whose scores are held at once
constexpr float NEVER = -std::numeric_limits<float>::infinity();

inline Floats multiply_add(Floats sum, float one, const float* sixteen) {
    return sum + load(sixteen) * one;
}

#ifdef __AVX512BF16__
template <class T> using Unit = std::conditional_t<std::is_same_v<T, BFloat>, Pair, float>;

inline Floats multiply_add(Floats sum, Pair one, const Pair* sixteen) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(one.bits),
                                    (__m512bh)_mm512_loadu_si512(sixteen));
}
#else
template <class T> using Unit = float;
#endif

inline Floats exponential(Floats x) {  // of x <= 0, to 1e-7
    Floats y = x * 1.44269504f;
    Floats shifted = y + 12582912.0f;  // 1.5 * 2^23: the whole part stands in the lowest bits
    Floats rest = y - (shifted - 12582912.0f);
    Floats power = rest * 1.54035304e-4f + 1.33335581e-3f;
    power = power * rest + 9.61812911e-3f;
    power = power * rest + 5.55041087e-2f;
    power = power * rest + 2.40226507e-1f;
    power = power * rest + 6.93147181e-1f;
    power = power * rest + 1.0f;
    // The difference is zero, but keeps what is not a number. What is very small is zero.
    Floats found = (Floats)((Ints)power + ((Ints)shifted << 23)) + (x - x);
    return (Floats)((Ints)found & ~(Ints)(y <= -126.0f));
}

// to[ROWS][BLOCKS_] = left[ROWS][steps] x right[steps][BLOCKS_], in blocks of lanes.
template <int BLOCKS_, class U>
void tile(const U* const* left, const U* right, int width, int steps, float* to) {
    Floats sums[ROWS][BLOCKS_] = {};
    for (int step = 0; step < steps; step++)
        for (int block = 0; block < BLOCKS_; block++)
            for (int row = 0; row < ROWS; row++)
                sums[row][block] = multiply_add(sums[row][block], left[row][step],
                                                right + step * width + block * LANES);
    for (int row = 0; row < ROWS; row++)
        for (int block = 0; block < BLOCKS_; block++)
            store(to + row * width + block * LANES, sums[row][block]);
}

// Products of `rows` rows; what fills up the last tile repeats the last row.
template <class U>
void product(const U* left, int64_t stride, int rows, const U* right, int width, int steps,
             float* to) {
    for (int row = 0; row < rows; row += ROWS) {
        const U* from[ROWS];
        for (int i = 0; i < ROWS; i++) from[i] = left + std::min(row + i, rows - 1) * stride;
        for (int lane = 0; lane < width; lane += BLOCKS * LANES) {
            float* place = to + row * width + lane;
            switch (std::min(BLOCKS, (width - lane) / LANES)) {
                case 1: tile<1>(from, right + lane, width, steps, place); break;
                case 2: tile<2>(from, right + lane, width, steps, place); break;
                case 3: tile<3>(from, right + lane, width, steps, place); break;
                default: tile<4>(from, right + lane, width, steps, place);
            }
        }
    }
}

// One head of a row. T: what is read and written. U: what is multiplied, floats or pairs of bf16.
template <class T> class Head {
    typedef Unit<T> U;
    static constexpr int WIDTH = std::is_same_v<U, Pair> ? 2 : 1;
    static constexpr bool WIDENS = WIDTH == 1 && sizeof(T) == 2;

    const Shape& s;
    const int d, padded, key_steps;
    char *memory, *free;
    float *scores, *answers;
    U *keys, *values, *shares, *queries;

    template <class X> X* take(int64_t count) {
        char* at = free;
        free += (count * 4 + 63) / 64 * 64;
        return reinterpret_cast<X*>(at);
    }

public:
    explicit Head(const Shape& shape)
        : s(shape), d(int(s.d)), padded(int((s.keys + LANES - 1) / LANES * LANES)),
          key_steps(int((s.keys + WIDTH - 1) / WIDTH)) {
        int64_t rows = CHUNK + ROWS;
        int64_t count = rows * (padded + d) * 2 + int64_t(padded) * d * 2;
        memory = free = (char*)::operator new(count * 4, std::align_val_t(64));
        scores = take<float>(rows * padded);
        answers = take<float>(rows * d);
        shares = take<U>(rows * padded);
        queries = take<U>(rows * d);
        keys = take<U>(int64_t(padded) * d);
        values = take<U>(int64_t(padded) * d);
    }
    ~Head() { ::operator delete(memory, std::align_val_t(64)); }
    Head(const Head&) = delete;

    void run(const T* q, const T* k, const T* v, const T* bias, const uint8_t* seen, T* out) {
        lay_out_keys(k);
        lay_out_values(v);
        for (int64_t first = 0; first < s.queries; first += CHUNK) {
            int rows = int(std::min<int64_t>(CHUNK, s.queries - first));
            score(q + first * s.q[2], rows);
            float scale[CHUNK];
            for (int row = 0; row < rows; row++)
                scale[row] = share(row, bias ? bias + (first + row) * s.bias[2] : nullptr,
                                   seen ? seen + (first + row) * s.seen[2] : nullptr);
            product(shares, padded / WIDTH, rows, values, d, key_steps, answers);
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < d; i += LANES)
                    store(out + (first + row) * s.out[2] + i,
                          load(answers + row * d + i) * scale[row]);
        }
    }

private:
    // keys[step][key], zero where there is none.
    void lay_out_keys(const T* k) {
        for (int block = 0; block < padded; block += LANES) {
            int there = int(std::min<int64_t>(LANES, s.keys - block));
            for (int step = 0; step < d / WIDTH; step++) {
                U* to = keys + step * padded + block;
                for (int i = 0; i < there; i++) to[i] = unit(k + (block + i) * s.k[2], step);
                for (int i = there; i < LANES; i++) to[i] = U();
            }
        }
    }

    static U unit(const T* row, int step) {
        if constexpr (WIDENS) {
            uint32_t bits = uint32_t(row[step].bits) << 16;
            U wide;
            std::memcpy(&wide, &bits, sizeof(wide));
            return wide;
        } else {
            return reinterpret_cast<const U*>(row)[step];
        }
    }

    // values[step][channel]; a pair is of two keys that follow each other.
    void lay_out_values(const T* v) {
        for (int step = 0; step < key_steps; step++) {
            const T* row = v + step * WIDTH * s.v[2];
            bool has_second = step * WIDTH + 1 < s.keys;
            for (int i = 0; i < d; i += LANES) {
                U* to = values + step * d + i;
                if constexpr (WIDTH == 1)
                    store(to, load(row + i));
                else if (has_second)
                    store(to, load_bits(row + i) | load_bits(row + s.v[2] + i) << 16);
                else
                    store(to, load_bits(row + i));
            }
        }
    }

    void score(const T* q, int rows) {
        const U* left = reinterpret_cast<const U*>(q);
        int64_t stride = s.q[2] / WIDTH;
        if constexpr (WIDENS) {
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < d; i += LANES)
                    store(queries + row * d + i, load(q + row * s.q[2] + i));
            left = queries;
            stride = d;
        }
        product(left, stride, rows, keys, padded, d / WIDTH, scores);
    }

    // A row of scores becomes exponentials; returns one over their sum, zero where none counts.
    float share(int row, const T* bias, const uint8_t* seen) {
        float* at = scores + row * padded;
        const Floats never = Floats{} + NEVER;
        Floats most = never;
        auto settle = [&](int key, Floats x, Ints keep) {
            x = (Floats)(((Ints)x & keep) | ((Ints)never & ~keep));
            store(at + key, x);
            most = most > x ? most : x;
        };
        int whole = int(s.keys / LANES * LANES), rest = int(s.keys - whole);
        for (int key = 0; key < whole; key += LANES) {
            Floats x = load(at + key) * s.scale;
            if (bias) x += load(bias + key);
            if (seen) {
                settle(key, x, load(seen + key) != 0);
            } else {
                store(at + key, x);
                most = most > x ? most : x;
            }
        }
        if (rest) {
            Floats x = load(at + whole) * s.scale;
            if (bias) x += load_some(bias + whole, rest);
            Ints keep = Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} < rest;
            if (seen) keep &= load_some(seen + whole, rest) != 0;
            settle(whole, x, keep);
        }
        float top = largest(most);
        bool is_blind = top == NEVER;
        Floats sum = {};
        for (int key = 0; key < padded; key += LANES) {
            Floats x = is_blind ? Floats{} : exponential(load(at + key) - top);
            sum += x;
            if constexpr (WIDENS)
                store(shares + row * padded + key, x);
            else
                store(reinterpret_cast<T*>(shares) + row * padded + key, x);
        }
        return is_blind ? 0.0f : 1.0f / total(sum);
    }
};

template <class T>
void attend(const Shape& s, const T* q, const T* k, const T* v, const T* bias, const uint8_t* seen,
            T* out) {
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
                     out + b * s.out[0] + h * s.out[1]);
        }
    }
}

}  // namespace

extern "C" {

void attend_float32(const Shape* s, const float* q, const float* k, const float* v,
                    const float* bias, const uint8_t* seen, float* out) {
    attend(*s, q, k, v, bias, seen, out);
}

void attend_bfloat16(const Shape* s, const BFloat* q, const BFloat* k, const BFloat* v,
                     const BFloat* bias, const uint8_t* seen, BFloat* out) {
    attend(*s, q, k, v, bias, seen, out);
}

}
