/* Coverage for the fuzzer. It is linked into an extension that gcc compiled with -fsanitize-coverage=trace-pc: then each
 * basic block calls the function below. Not itself compiled that way. One thread runs instrumented code at a time. */

#include <stdint.h>

enum { EDGES = 1 << 16, MAX_TEXT_NBYTES = 1 << 20 };

static unsigned char hits[EDGES], seen[EDGES], ran[MAX_TEXT_NBYTES];
static uint32_t touched[EDGES], count, before;
static int edges, blocks;

extern const char __ehdr_start __attribute__((visibility("hidden"))); /* where this very extension begins in memory */

__attribute__((visibility("hidden"))) void __sanitizer_cov_trace_pc(void) {
    uint64_t at = (uint64_t)((uintptr_t)__builtin_return_address(0) - (uintptr_t)&__ehdr_start);
    if (at < MAX_TEXT_NBYTES && !ran[at]) ran[at] = 1, blocks++;
    uint32_t here = (uint32_t)(at * 0x9E3779B97F4A7C15u >> 48), edge = here ^ before;
    before = here >> 1;
    if (hits[edge] == 0) touched[count++] = edge;
    if (hits[edge] < 255) hits[edge]++;
}

/* Whether anything new ran since the last time: an edge, or one that ran 2, 4, 8 ... times as often as before. */
int fuzz_take(void) {
    int found = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t edge = touched[i];
        unsigned char often = (unsigned char)(1u << (31 - __builtin_clz(hits[edge])));
        if (seen[edge] == 0) edges++;
        if (!(seen[edge] & often)) found = 1;
        seen[edge] |= often;
        hits[edge] = 0;
    }
    count = before = 0;
    return found;
}

int fuzz_edges(void) { return edges; }
int fuzz_blocks(void) { return blocks; }
