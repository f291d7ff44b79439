// Token and position embeddings and their gradient, rung 1: one thread per element, no sorting.
//
// Idea        Forward, one thread per element. Backward, one block for each row of the vocabulary, which reads all N tokens
//             and adds up the rows of dout that are its own, in the order of positions; one thread for each (t, c) of dwpe.
// Prediction  None was written down. Backward reads N tokens Vp times, 6.6 GB of L2, and dout once.
// Measured    Forward 111 us, backward 1.7 s. H200, B=32, T=1024, C=768, bf16, tokens as frequent as in text, 2026-11-24.
// Lesson      The block of a frequent token adds a tenth of all rows up alone, one after the other; and every block reads
//             every token. See encoder_02_sorted.cu.
//
// The formulas and the arrays stand in kernels/encoder.cu.
#include "common.cuh"

// One thread per element of out. grid ceil(N*C / block), any block.
extern "C" __global__ void encoder_forward_naive(floatX* out, const int* inp, const floatX* wte, const floatX* wpe,
                                                   int T, int C, i64 elements) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= elements) { return; }
    i64 position = i / C;
    int c = i % C, t = position % T;
    out[i] = (floatX)((float)wte[(i64)inp[position] * C + c] + (float)wpe[(i64)t * C + c]);
}

#define WTE 0  // the two tables round with different noise
#define WPE 1

// *address += sum, rounded with noise that depends on (seed, table, element) alone.
__device__ inline void accumulate(floatG* table, i64 element, float sum, u32 seed) {
    table[element] = stochastic_round<floatG>((float)table[element] + sum, noise(element, seed));
}

// One thread per (t, c), looping over the batch. grid ceil(T*C / block).
extern "C" __global__ void wpe_backward_naive(floatG* dwpe, const floatX* dout, const u32* seed, int B, int T, int C) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (i64)T * C) { return; }
    float sum = 0.0f;
    for (int b = 0; b < B; b++) { sum += (float)dout[(i64)b * T * C + i]; }
    accumulate(dwpe, i, sum, noise(WPE, seed[0]));
}

// One block per vocabulary row, threads over its channels; each reads all N tokens. grid Vp, any block.
extern "C" __global__ void wte_backward_naive(floatG* dwte, const floatX* dout, const int* inp, const u32* seed,
                                                int N, int C) {
    int token = blockIdx.x;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = 0.0f;
        bool found = false;
        for (int position = 0; position < N; position++) {
            if (inp[position] == token) {
                sum += (float)dout[(i64)position * C + c];
                found = true;
            }
        }
        if (found) { accumulate(dwte, (i64)token * C + c, sum, noise(WTE, seed[0])); }
    }
}
