// A decode step: its parts one after another in one parallel region. See step.py.

#include <omp.h>

#include <sched.h>

#include <atomic>
#include <vector>

#include "step_attend.h"
#include "step_products.h"
#include "step_rows.h"

namespace {

struct Part {
    void (*run)(const void* fields, const Thread& thread);
    const char* fields;
    int64_t apart;  // how far apart those of each thread stand; 0: all have the same
    int64_t waits;  // until every thread is done with what stands before it
    int64_t alone;  // each thread does all of it, for itself
};

// Threads that meet often spin; on a machine with too few cores they give way after a while.
class Meeting {
    std::atomic<int> here{0}, round{0};

public:
    void wait(int threads) {
        int before = round.load(std::memory_order_relaxed);
        if (here.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            here.store(0, std::memory_order_relaxed);
            round.store(before + 1, std::memory_order_release);
            return;
        }
        for (int tries = 0; round.load(std::memory_order_acquire) == before; tries++) {
#ifdef __x86_64__
            __builtin_ia32_pause();
#endif
            if (tries > 4000) sched_yield();
        }
    }
};

}  // namespace

extern "C" void step(const Part* parts, int64_t count, int32_t threads) {
    Meeting meeting;
    std::vector<std::atomic<int64_t>> taken(count);
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num(), many = omp_get_num_threads();
        for (int64_t i = 0; i < count; i++) {
            const Part& part = parts[i];
            if (part.waits) meeting.wait(many);
            const char* fields = part.fields + thread * part.apart;
            part.alone ? part.run(fields, {0, 1, &taken[i]})
                       : part.run(fields, {thread, many, &taken[i]});
        }
    }
}

STEPS(norm, Norm)
STEPS(sum, Sum)
STEPS(product, Product)
STEPS(silu, SiluOf)
STEPS(gelu, GeluOf)
STEPS(gelu_tanh, GeluTanhOf)
STEPS(relu, ReluOf)
STEPS(sigmoid, SigmoidOf)
STEPS(lookup, Lookup)
STEPS(turn, Turn)
STEPS(copy, Copy)
STEPS(likeliest, Likeliest)
STEPS(round_int4, RoundInt4)
STEPS(round_int8, RoundInt8)
STEPS(round_int8_rows, RoundInt8Rows)
STEPS(round_int8_twice, RoundInt8Twice)
STEPS(round_int8_rows_twice, RoundInt8RowsTwice)
STEPS(dense, Dense)
STEPS(packed_int4, PackedInt4)
STEPS(packed_int8, PackedInt8)
STEPS(packed_int8_rows, PackedInt8Rows)
STEPS(packed_int8_twice, PackedInt8Twice)
STEPS(packed_int8_rows_twice, PackedInt8RowsTwice)
STEPS(unpacked_int4, UnpackedInt4)
STEPS(unpacked_int8, UnpackedInt8)
STEPS(unpacked_int8_rows, UnpackedInt8Rows)
STEPS(choose, Choose)
STEPS(gather, Gather)
STEPS(combine, Combine)
STEP(keep_float32, Keep<float, float>)
STEP(keep_bfloat16, Keep<BFloat, BFloat>)
STEP(keep_fp16_float32, Keep<float, Half>)
STEP(keep_fp16_bfloat16, Keep<BFloat, Half>)
STEP(keep_int8_float32, Keep<float, int8_t>)
STEP(keep_int8_bfloat16, Keep<BFloat, int8_t>)
STEPS(join, Join)
STEP(attend_float32, Attend<float, float>)
STEP(attend_bfloat16, Attend<BFloat, BFloat>)
STEP(attend_fp16_float32, Attend<float, Half>)
STEP(attend_fp16_bfloat16, Attend<BFloat, Half>)
STEP(attend_int8_float32, Attend<float, int8_t>)
STEP(attend_int8_bfloat16, Attend<BFloat, int8_t>)
