// The gradient of token and position embeddings, rung 3: equal pieces of the sorted list.
//
// Idea        Each block adds up the rows of PIECE entries of the sorted list, whichever tokens they belong to. A token that
//             spans several pieces leaves fp32 sums, which a further kernel adds up in the order of the pieces.
// Prediction  None was written down.
// Measured    162 us. H200, B=32, T=1024, C=768, bf16, tokens as frequent as in text, 2026-11-24.
// Lesson      Time hardly depends on the most frequent token any more. What is left is waiting: tokens are looked up by
//             position, and rows of dwte are asked for when the sum is there. Rung 4 (which is gone) sorted the tokens along
//             and loaded rows of dwte ahead: 101.5 us, predicted 75 to 80. Rung 5 is kernels/encoder.cu.
//
// PIECE, the entries of the sorted list that one block sums, is that of llmc/cuda/encoder.py.
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
wpe_backward_pieces(floatG* dwpe, const floatX* dout, const u32* seed, int B, int T, int C) {
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

#define AHEAD 8  // rows whose loads are on their way at once

__device__ inline void add_partial(float* sum, const float* address) {
    for (int k = 0; k < x128::size; k += f128::size) {
        f128 part = load128(address + k);
        for (int e = 0; e < f128::size; e++) { sum[k + e] += part[e]; }
    }
}

// Block (p, y) walks piece p of the sorted list and sums the rows of each token in it. A token that lies within the piece
// is finished here. What continues from piece p-1 is left in partials[p][0], what begins here and goes on in piece p+1 in
// partials[p][1]; wte_combine adds those up.
// grid (ceil(N / PIECE), ceil(C / x128::size / block)); partials (pieces, 2, C) f32; C % x128::size == 0.
extern "C" __global__ void wte_backward_pieces(floatG* dwte, float* partials, const floatX* dout, const int* inp,
                                                const int* sorted, const u32* seed, int N, int C) {
    __shared__ int positions[PIECE];
    __shared__ int tokens[PIECE + 2];  // with the neighbours on both sides; -1 past the ends of the list
    int begin = blockIdx.x * PIECE, count = min(PIECE, N - begin);
    for (int i = threadIdx.x; i < count + 2; i += blockDim.x) {
        int j = begin + i - 1;
        int position = j >= 0 && j < N ? sorted[j] : -1;
        tokens[i] = position >= 0 ? inp[position] : -1;
        if (i >= 1 && i <= count) { positions[i - 1] = position; }
    }
    __syncthreads();
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * x128::size;
    if (c >= C) { return; }

    float* partial = partials + (i64)blockIdx.x * 2 * C + c;
    bool continued = tokens[0] == tokens[1];  // the first token here began in an earlier piece
    u32 key = noise(WTE, seed[0]);
    float sum[x128::size] = {};
    for (int i = 0; i < count; i += AHEAD) {
        x128 rows[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (i + a < count) { rows[a] = load128cs(dout + (i64)positions[i + a] * C + c); }
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (i + a >= count) { break; }
            for (int k = 0; k < x128::size; k++) { sum[k] += (float)rows[a][k]; }
            int token = tokens[i + a + 1];
            bool last = i + a == count - 1, goes_on = tokens[i + a + 2] == token;
            if (goes_on && !last) { continue; }
            if (continued) {
                store_floats<x128::size>(partial, sum);
            } else if (goes_on) {
                store_floats<x128::size>(partial + C, sum);
            } else {
                accumulate128(dwte, (i64)token * C + c, sum, key);
            }
            continued = false;
            for (int k = 0; k < x128::size; k++) { sum[k] = 0.0f; }
        }
    }
}

// Block (p, y) finishes the token that begins in piece p and goes on in piece p+1, if there is one: partials[p][1] and then
// partials[q][0] for every following piece that the token reaches. Same grid and block as wte_backward_pieces.
extern "C" __global__ void wte_combine(floatG* dwte, const float* partials, const int* inp, const int* sorted,
                                               const u32* seed, int N, int C) {
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * x128::size;
    int begin = blockIdx.x * PIECE, next = begin + PIECE;
    if (c >= C || next >= N) { return; }
    int token = inp[sorted[next - 1]];
    if (inp[sorted[next]] != token) { return; }                                     // nothing goes on
    if (inp[sorted[begin]] == token && !begins_at(sorted, inp, begin)) { return; }  // it began in an earlier piece
    float sum[x128::size] = {};
    add_partial(sum, partials + ((i64)blockIdx.x * 2 + 1) * C + c);
    for (int piece = blockIdx.x + 1; piece * PIECE < N && inp[sorted[piece * PIECE]] == token; piece++) {
        add_partial(sum, partials + (i64)piece * 2 * C + c);
    }
    accumulate128(dwte, (i64)token * C + c, sum, noise(WTE, seed[0]));
}
