/* How fast this machine reads memory: sums of 64-bit words, in rows that the threads share. */
#include <stddef.h>
#include <stdint.h>

uint64_t total(const uint64_t *words, size_t count) {
    uint64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (size_t i = 0; i < count; i++) sum += words[i];
    return sum;
}
