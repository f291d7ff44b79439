// The gradient of token and position embeddings, rung 2: positions sorted by token.
//
// Idea        The device sorts the positions by token, in two passes of a stable radix sort without atomics. One block for
//             each token that occurs then adds its rows of dout up, each read once, in the order of positions.
// Prediction  None was written down.
// Measured    4064 us. H200, B=32, T=1024, C=768, bf16, tokens as frequent as in text, 2026-11-24.
// Lesson      One block still adds a frequent token's rows up alone: see encoder_03_pieces.cu.
//
// The formulas and the arrays stand in kernels/encoder.cu.
#include "common.cuh"

#define WTE 0  // the two tables round with different noise
#define WPE 1

// *address += sum, rounded with noise that depends on (seed, table, element) alone.
__device__ inline void accumulate(floatG* table, i64 element, float sum, u32 seed) {
    table[element] = stochastic_round<floatG>((float)table[element] + sum, noise(element, seed));
}

// x128::size sums, which in a table of fp32 are two packs.
__device__ inline void accumulate128(floatG* table, i64 element, const float* sum, u32 seed) {
    constexpr int size = Packed128<floatG>::size;
    for (int first = 0; first < x128::size; first += size) {
        Packed128<floatG> pack = load128(table + element + first);
        for (int k = 0; k < size; k++) {
            u32 random = noise(element + first + k, seed);
            pack[k] = stochastic_round<floatG>((float)pack[k] + sum[first + k], random);
        }
        store128(table + element + first, pack);
    }
}

// dwpe[i..] += the sum over the batch, for the 16 bytes at element i of dwpe.
__device__ inline void add_positions(floatG* dwpe, const floatX* dout, const u32* seed, i64 i, int B, int T, int C) {
    if (i >= (i64)T * C) { return; }
    float sum[x128::size] = {};
#pragma unroll 8
    for (int b = 0; b < B; b++) {
        x128 pack = load128(dout + (i64)b * T * C + i);
        for (int k = 0; k < x128::size; k++) { sum[k] += (float)pack[k]; }
    }
    accumulate128(dwpe, i, sum, noise(WPE, seed[0]));
}

// One thread per 16 bytes of dwpe. grid ceil(T*C / x128::size / block), block up to 128; C % x128::size == 0.
extern "C" __global__ void __launch_bounds__(128, 1)
wpe_backward_sorted(floatG* dwpe, const floatX* dout, const u32* seed, int B, int T, int C) {
    add_positions(dwpe, dout, seed, ((i64)blockIdx.x * blockDim.x + threadIdx.x) * x128::size, B, T, C);
}

// One pass of a stable radix sort of positions by token: out = the positions of `in`, ordered by the digit
// (token >> shift) & mask, equal digits in the order of `in` (NULL: 0, 1, 2, ...). Two passes, low digit first, sort by
// token and keep positions ascending within a token, which fixes the order of every sum.
// Block d owns digit d. It reads all N tokens, counts how many go before its own, and appends its own in order: no
// histogram, no atomics, 2^digit_bits * N reads from L2. Each warp owns a contiguous run of `in`.
// grid mask + 1, block 1024.
extern "C" __global__ void __launch_bounds__(1024)
sort_by_token_kernel(int* out, const int* in, const int* inp, int N, int shift, int mask) {
    __shared__ int run_matches[32];
    __shared__ int run_before[32];
    int digit = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int run = ceil_div(N, warps), begin = min(warp * run, N), end = min(begin + run, N);

    int matches = 0, before = 0;  // of this warp's run: positions with our digit, and with a smaller one
#pragma unroll 4
    for (int i = begin; i < end; i += 32) {
        int position = i + lane < end ? (in ? in[i + lane] : i + lane) : -1;
        int found = position >= 0 ? (inp[position] >> shift) & mask : digit + 1;
        matches += __popc(__ballot_sync(0xffffffffu, found == digit));
        before += __popc(__ballot_sync(0xffffffffu, found < digit));
    }
    if (lane == 0) {
        run_matches[warp] = matches;
        run_before[warp] = before;
    }
    __syncthreads();
    int place = 0;  // where this run's first match goes: after all smaller digits and the matches of earlier runs
    for (int w = 0; w < warps; w++) { place += run_before[w] + (w < warp ? run_matches[w] : 0); }

#pragma unroll 4
    for (int i = begin; i < end; i += 32) {
        int position = i + lane < end ? (in ? in[i + lane] : i + lane) : -1;
        bool match = position >= 0 && ((inp[position] >> shift) & mask) == digit;
        u32 votes = __ballot_sync(0xffffffffu, match);
        if (match) { out[place + __popc(votes & ((1u << lane) - 1))] = position; }
        place += __popc(votes);
    }
}

// sorted[j] is where a token's occurrences begin if j = 0 or the entry before belongs to another token.
__device__ inline bool begins_at(const int* sorted, const int* inp, int j) {
    return j == 0 || inp[sorted[j]] != inp[sorted[j - 1]];
}

// Block (j, y) sums all rows of the token that begins at sorted[j], if one does, for 16 bytes of channels per thread.
// grid (N, ceil(C / x128::size / block)); C % x128::size == 0.
extern "C" __global__ void wte_backward_sorted(floatG* dwte, const floatX* dout, const int* inp, const int* sorted,
                                                const u32* seed, int N, int C) {
    int j = blockIdx.x, c = (blockIdx.y * blockDim.x + threadIdx.x) * x128::size;
    if (c >= C || !begins_at(sorted, inp, j)) { return; }
    int token = inp[sorted[j]];
    float sum[x128::size] = {};
    for (; j < N && inp[sorted[j]] == token; j++) {
        x128 row = load128cs(dout + (i64)sorted[j] * C + c);
        for (int k = 0; k < x128::size; k++) { sum[k] += (float)row[k]; }
    }
    accumulate128(dwte, (i64)token * C + c, sum, noise(WTE, seed[0]));
}
