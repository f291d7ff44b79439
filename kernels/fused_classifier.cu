// Softmax, cross-entropy and their gradient, in place on the logits. The probabilities are never stored.
//
//   p = softmax(logits[row, :V]);  losses[row] += -log p[target];  logits[row, :V] = (p - onehot(target)) dloss
//
//   logits (N, Vp) floatX, N = B*T    losses (N,) f32    targets (N,) i32    1 <= V <= Vp
//   Columns V..Vp are neither read nor written. With write_dlogits = 0 the logits are read only (validation).
//
// At V = 50257 this is the largest pass over memory in the whole step: 2 N V elements when the row is read once.
//
// Measured on an H200, B=32, T=1024, V=50257, bf16, microseconds (% of copy speed). Rungs 1 to 3 are
// ladder/fused_classifier_0N_*.cu; 4 serves GPUs with less shared memory, and rows too wide for it; 5 serves the others.
// rung | idea                                                                                    | moved | measured
// 1    | thread per row, three sweeps                                                            | 4 NV  | 38353 (4 %)
// 2    | block per row, three sweeps, element by element                                         | 4 NV  | 5685 (28 %)
// 3    | maximum and sum in one sweep, 16-byte packs; the second sweep finds the row in L2       | 3 NV  | 1945 (80 %)
// 4    | the row waits in registers (768 threads, up to 9 packs each); what does not fit is read | 2 NV  | 2323 (67 %)
//      | again                                                                                   |       |
// 5    | the row waits in shared memory, two blocks of a multiprocessor take turns; 12           | 2 NV  | 1614 (97 %),
//      | instructions an element                                                                 |       | goal 88 %
// 4 is slower than 3, probably as registers hold one block per multiprocessor: while it computes nothing is loaded. Two
// rows of one block that stays, the next on its way, were predicted to be best and reached 87 %.
//
// A row starts at 16 bytes only if Vp % x128::size == 0, and V need not be a multiple of a pack: both kernels take the
// packs in between as such and the ragged elements on both sides one by one. llm.c's kernel 5 assumes alignment, and its
// loop bound wraps around for small V.
//
// REGISTERS_BLOCK and SHARED_BLOCK, the largest blocks of the two kernels, come from llmc/cuda/fused_classifier.py.
//
// Source: llm.c llmc/fused_classifier.cuh; Milakov and Gimelshein 2018 (online softmax), arXiv:1805.02867, algorithm 3.
#include "ptx.cuh"

static_assert(REGISTERS_BLOCK % 32 == 0 && SHARED_BLOCK % 32 == 0 && SHARED_BLOCK <= 1024, "whole warps, at most 32");

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

// ---------------------------------------------------------------------------------------------------------------------
// the row in registers
// ---------------------------------------------------------------------------------------------------------------------

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

#define KEPT 9  // packs that a thread keeps: 768 threads hold 55296 columns in 16 bits, 27648 in fp32

// One block per row, and the row waits in registers; columns past KEPT packs per thread are read three times. The last row
// comes first: the end of the logits, which the matmul has just written, may still be in L2.
// grid N, block a multiple of 32 up to REGISTERS_BLOCK: 1024 threads had 64 registers each, too few on some GPUs.
extern "C" __global__ void __launch_bounds__(REGISTERS_BLOCK)
fused_classifier_registers_kernel(floatX* logits, float* losses, const int* targets, float dloss, int N, int V, int Vp,
                         int write_dlogits) {
    int r = N - 1 - blockIdx.x, target = targets[r];
    Row row(logits, r, V, Vp);
    // this thread's packs: at x + j * stride for j * blockDim.x < left
    floatX* x = row.x + row.column(threadIdx.x);
    int left = row.packs - threadIdx.x, stride = blockDim.x * x128::size;
    x128 kept[KEPT];
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        if (j * (int)blockDim.x < left) { kept[j] = load128cs(x + j * stride); }
    }
    float top = threadIdx.x < row.ragged ? (float)row.x[row.ragged_column(threadIdx.x)] : -INFINITY;
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        if (j * (int)blockDim.x < left) {
            for (int k = 0; k < x128::size; k++) { top = fmaxf(top, (float)kept[j][k]); }
        }
    }
    for (int j = KEPT; j * (int)blockDim.x < left; j++) {
        x128 pack = load128(x + j * stride);
        for (int k = 0; k < x128::size; k++) { top = fmaxf(top, (float)pack[k]); }
    }
    top = blockReduceMax(top);

    float sum = threadIdx.x < row.ragged ? exp_below((float)row.x[row.ragged_column(threadIdx.x)], top) : 0.0f;
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        if (j * (int)blockDim.x < left) {
            forget128(kept[j]);
            for (int k = 0; k < x128::size; k++) { sum += exp_below((float)kept[j][k], top); }
        }
    }
    for (int j = KEPT; j * (int)blockDim.x < left; j++) {
        x128 pack = load128(x + j * stride);
        for (int k = 0; k < x128::size; k++) { sum += exp_below((float)pack[k], top); }
    }
    sum = blockReduceSum(sum);

    if (threadIdx.x == 0) { losses[r] += logf(sum) - ((float)row.x[target] - top); }
    if (!write_dlogits) { return; }
    __syncthreads();  // thread 0 has read the target's logit
    float scale = dloss / sum;
    int column = row.column(threadIdx.x);
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        if (j * (int)blockDim.x < left) {
            forget128(kept[j]);
            write_pack(x + j * stride, kept[j], top, scale, column + j * stride, target, dloss);
        }
    }
    for (int j = KEPT; j * (int)blockDim.x < left; j++) {
        write_pack(x + j * stride, load128cs(x + j * stride), top, scale, column + j * stride, target, dloss);
    }
    write_ragged(row, top, scale, target, dloss);
}

// ---------------------------------------------------------------------------------------------------------------------
// the row in shared memory
// ---------------------------------------------------------------------------------------------------------------------

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define LOWEST -3.402823466e38f  // finite: a logit of -inf is then 2^-inf = 0, not NaN

// 2^(x log2(e) - base): exp(x - top) where base is top log2(e). Sums and probabilities share the rounding of base.
__device__ inline float exp_over(float x, float base) { return exp2f(fmaf(x, LOG2E, -base)); }

// One block per row, and the row waits in shared memory. Two blocks fit a multiprocessor at V = 50257 in 16 bits: one loads
// while the other computes or writes. A thread copies the packs that it will itself use, so the copies need no barrier.
// Maximum and sum are found in one sweep: a new maximum, rare after the first packs, rescales the sum.
// grid N, block a multiple of 32 up to SHARED_BLOCK, dynamic shared memory ceil(V / x128::size) * 16 bytes.
extern "C" __global__ void __launch_bounds__(SHARED_BLOCK)
fused_classifier_shared_kernel(floatX* logits, float* losses, const int* targets, float dloss, int N, int V, int Vp,
                         int write_dlogits) {
    extern __shared__ __align__(16) char memory[];
    __shared__ float bases[32];
    __shared__ float sums[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int r = N - 1 - blockIdx.x;  // the last row first: it may still be in L2
    Row row(logits, r, V, Vp);
    x128* packs = reinterpret_cast<x128*>(memory);
    for (int i = threadIdx.x; i < row.packs; i += blockDim.x) { cp_async_16(packs + i, row.x + row.column(i), true); }
    cp_async_commit();
    int target = targets[r], edge = threadIdx.x < row.ragged ? row.ragged_column(threadIdx.x) : -1;
    float edge_logit = edge >= 0 ? (float)row.x[edge] : 0.0f;
    cp_async_wait<0>();

    float base = LOWEST, sum = 0.0f, logit[x128::size];  // of this thread's elements
#pragma unroll 2
    for (int i = threadIdx.x; i < row.packs; i += blockDim.x) {
        to_floats(logit, packs[i]);
        float top = logit[0];
        for (int k = 1; k < x128::size; k++) { top = fmaxf(top, logit[k]); }
        top *= LOG2E;
        if (top > base) {
            sum *= exp2f(base - top);
            base = top;
        }
        for (int k = 0; k < x128::size; k++) { sum += exp_over(logit[k], base); }
    }
    if (edge >= 0) {
        float top = fmaxf(edge_logit * LOG2E, base);
        sum = sum * exp2f(base - top) + exp_over(edge_logit, top);
        base = top;
    }
    // of the warp, then of the block
    float warp_base = warpReduceMax(base);
    sum = warpReduceSum(sum * exp2f(base - warp_base));
    if (lane == 0) {
        bases[warp] = warp_base;
        sums[warp] = sum;
    }
    __syncthreads();
    float other = lane < warps ? bases[lane] : LOWEST;
    base = warpReduceMax(other);
    sum = warpReduceSum(lane < warps ? sums[lane] * exp2f(other - base) : 0.0f);

    // the thread that has the target's logit adds the loss
    int place = target - row.head, pack = place / x128::size;
    bool in_packs = place >= 0 && pack < row.packs;
    bool mine = in_packs ? pack % blockDim.x == threadIdx.x : target == edge;
    float target_logit = mine ? (in_packs ? (float)packs[pack][place % x128::size] : edge_logit) : 0.0f;
    if (mine) { losses[r] += LN2 * (log2f(sum) - fmaf(target_logit, LOG2E, -base)); }
    if (!write_dlogits) { return; }
    float scale = dloss / sum;
#pragma unroll 2
    for (int i = threadIdx.x; i < row.packs; i += blockDim.x) {
        to_floats(logit, packs[i]);
        for (int k = 0; k < x128::size; k++) { logit[k] = exp_over(logit[k], base) * scale; }
        store128cs(row.x + row.column(i), to_pack(logit));
    }
    if (edge >= 0) { row.x[edge] = (floatX)(exp_over(edge_logit, base) * scale); }
    if (mine) { row.x[target] = (floatX)(exp_over(target_logit, base) * scale - dloss); }
}
