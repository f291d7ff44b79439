// Softmax, cross-entropy and their gradient, rung 3: maximum and sum in one sweep.
//
// Idea        A running maximum rescales the running sum whenever it grows (online softmax), so that one sweep finds both;
//             the second sweep, which writes the gradient, finds the row in L2. Accesses are of 16 bytes.
// Prediction  None was written down. 2 N V elements from memory are 1.6 ms at copy speed.
// Measured    1945 us (80 % of copy speed). H200, B=32, T=1024, V=50257, bf16, 2026-11-24.
// Lesson      The row is read twice. Kept in registers (rung 4) it is slower all the same, as one block then fills a
//             multiprocessor and nothing is loaded while it computes; kept in shared memory (rung 5) two blocks take turns.
//
// Source: Milakov and Gimelshein 2018 (online softmax), arXiv:1805.02867, algorithm 3.
// The formula, the arrays and what may be assumed of them stand in kernels/fused_classifier.cu.
#include "common.cuh"

// The V columns of a row as `head` elements up to the first 16-byte boundary, `packs` packs, and the rest.
struct Row {
    floatX* x;
    int head, packs, ragged;  // ragged = elements in front of and behind the packs, fewer than 2 * x128::size

    __device__ Row(floatX* logits, int row, int V, int Vp) {
        i64 start = (i64)row * Vp;
        x = logits + start;
        head = min(V, (int)((x128::size - start % x128::size) % x128::size));
        packs = (V - head) / x128::size;
        ragged = V - packs * x128::size;
    }
    __device__ int ragged_column(int i) const { return i < head ? i : i + packs * x128::size; }
    __device__ int column(int pack) const { return head + pack * x128::size; }
};

// exp(x - top) as 2^y: one multiplication and the hardware's own instruction. Relative error below |x - top| 2^-23.
__device__ inline float exp_below(float x, float top) { return exp2f((x - top) * 1.4426950408889634f); }

// dlogits of the pack whose first column is v.
__device__ inline void write_pack(floatX* address, x128 logits, float top, float scale, int v, int target, float dloss) {
    for (int k = 0; k < x128::size; k++) {
        logits[k] = (floatX)(exp_below((float)logits[k], top) * scale - (v + k == target ? dloss : 0.0f));
    }
    store128(address, logits);
}

__device__ inline void write_ragged(const Row& row, float top, float scale, int target, float dloss) {
    if (threadIdx.x < row.ragged) {
        int v = row.ragged_column(threadIdx.x);
        row.x[v] = (floatX)(exp_below((float)row.x[v], top) * scale - (v == target ? dloss : 0.0f));
    }
}

// One block per row, last row first: the end of the logits, which the matmul has just written, may still be in L2.
// grid N, block a multiple of 32 up to 1024.
extern "C" __global__ void __launch_bounds__(1024)
fused_classifier_online(floatX* logits, float* losses, const int* targets, float dloss, int N, int V, int Vp,
                         int write_dlogits) {
    int r = N - 1 - blockIdx.x, target = targets[r];
    Row row(logits, r, V, Vp);
    // Running maximum and the sum of exp(x - maximum) of this thread's elements; a new maximum rescales the sum.
    float top = -INFINITY, sum = 0.0f;
    if (threadIdx.x < row.ragged) {
        top = (float)row.x[row.ragged_column(threadIdx.x)];
        sum = 1.0f;
    }
    for (int i = threadIdx.x; i < row.packs; i += blockDim.x) {
        x128 pack = load128(row.x + row.column(i));
        float higher = top;
        for (int k = 0; k < x128::size; k++) { higher = fmaxf(higher, (float)pack[k]); }
        sum *= exp_below(top, higher);
        for (int k = 0; k < x128::size; k++) { sum += exp_below((float)pack[k], higher); }
        top = higher;
    }
    float block_top = blockReduceMax(top);
    sum = blockReduceSum(top > -INFINITY ? sum * exp_below(top, block_top) : 0.0f);
    top = block_top;
    if (threadIdx.x == 0) { losses[r] += logf(sum) - ((float)row.x[target] - top); }
    if (!write_dlogits) { return; }
    __syncthreads();  // thread 0 has read the target's logit
    float scale = dloss / sum;
    for (int i = threadIdx.x; i < row.packs; i += blockDim.x) {
        int v = row.column(i);
        write_pack(row.x + v, load128cs(row.x + v), top, scale, v, target, dloss);
    }
    write_ragged(row, top, scale, target, dloss);
}
