// The tile of products.h one number at a time, where there are no vectors that we know.

#pragma once

namespace {

template <Kind KIND, int N>
inline void tile(const uint8_t* at, const Rounded& x, int64_t token, Floats (*found)[PARTS]) {
    float* out = (float*)found;
    std::fill(out, out + N * ROWS, 0.0f);
    int64_t place = x.first(token), apart = x.apart(token);
    for (int64_t group = 0; group < x.groups; group++, place += apart, at += block_bytes<KIND>())
        for (int row = 0; row < ROWS; row++) {
            float scale = KIND == INT8_ROWS ? 1.0f : half(at + 2 * row);
            float least = KIND == INT4_GROUPS ? half(at + 2 * (ROWS + row)) : scale;
            uint8_t codes[GROUP];
            read_codes<KIND>(at, row, codes);
            for (int n = 0; n < N; n++) {
                float& to = out[n * ROWS + row];
                for (int part = 0; part < SCALES<KIND>; part++) {
                    constexpr int COUNT = GROUP / SCALES<KIND>;
                    const int8_t* own = x.codes + (place + n) * GROUP + part * COUNT;
                    int32_t sum = 0;
                    for (int i = 0; i < COUNT; i++) sum += codes[part * COUNT + i] * own[i];
                    to += sum * (scale * x.scales[(place + n) * SCALES<KIND> + part]);
                }
                to += least * x.sums[place + n];
            }
        }
}

}  // namespace
