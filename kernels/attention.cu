// Causal self-attention on packed queries, keys and values; no T x T matrix is ever stored.
//
//   forward   s[i, j] = scale * q[i] . k[j] for j <= i, scale = 1 / sqrt(HS);  att[i] = log sum_j exp(s[i, j])
//             out[i] = sum_j exp(s[i, j] - att[i]) * v[j]
//   backward  p[i, j] = exp(s[i, j] - att[i]);  D[i] = dout[i] . out[i];  ds[i, j] = p[i, j] * (dout[i] . v[j] - D[i])
//             dv[j] = sum_i p[i, j] dout[i];  dk[j] = scale * sum_i ds[i, j] q[i];  dq[i] = scale * sum_j ds[i, j] k[j]
//
//   qkvr, dqkvr (B, T, 3C) = (B, T, 3, NH, HS): the row of token t holds q, k, v of all heads, so a head's q, k or v is
//   a (T, HS) matrix with row stride 3C, read and written in place: no permutes.
//   out, dout (B, T, C) = (B, T, NH, HS)    att, D (B, NH, T) fp32    statistics and sums in fp32
//
// HS = HEAD_SIZE is a compile-time number: any multiple of 8 for naive, up to 128 for ffma and mma. T is arbitrary.
// Exponentials are taken in base 2 with log2(e) folded into the scale: one FMA and one ex2 per score.
//
// Backward has no atomics: dk and dv of a key tile are summed by the one block that owns it, over the query tiles at or
// below it, and dq likewise in a second kernel, which computes p and ds again (7 products instead of 5).
// No kernel needs anything zeroed. All tensors are 16-byte aligned.
//
// Rungs 1, 2 and 3 of the ladder are all in production here; rung 4 is kernels/attention_sm90.cu. TFLOP/s on an H200 at
// B = 32, T = 1024, NH = 12, HS = 64 (the causal half of 4 or 10 B NH T T HS FLOPs), forward and backward, 2026-11-23:
//
//   1  naive: one thread for each query (backward: for each query, then for each key), a running softmax, everything
//      else from global memory. It teaches, and is production for heads that no tile holds.
//      expected 0.3 and 0.2, measured 0.8 and 0.3
//   2  ffma: tiles in shared memory, 4 x 4 scores in a thread's registers, multiplied by FFMA. Production for fp32.
//      expected 20 and 15, measured 29 and 21
//   3  mma: tensor cores; tiles come by cp.async into two buffers; scores, softmax and results stay in registers.
//      Production for bf16 and fp16 where rung 4 is not.
//      expected 200-260 and 120-170, measured 225 and 138
//
// Source: llm.c dev/cuda/attention_forward.cu, attention_backward.cu, llmc/attention.cuh; Milakov and Gimelshein 2018
// (arXiv:1805.02867) for the running softmax; Dao et al. 2022, 2023 (FlashAttention, arXiv:2205.14135, 2307.08691).
#include "common.cuh"
#include "ptx.cuh"

// llmc/cuda/attention.py decides and gives by -D:
//   HEAD_SIZE
//   NAIVE_THREADS                       of a block
//   FFMA_ROWS, FFMA_BACKWARD_ROWS       rows of scores that a block of ffma owns; a block has twice as many threads
//   FFMA_COLUMNS                        columns of a tile of scores
//   QUERIES, KEYS                       mma, forward: rows that a block owns, and columns of a tile of scores
//   ROWS, COLUMNS                       mma, backward: the same
//   MMA_THREADS                         of a block
//   FFMA_SHARED_BYTES, FFMA_BACKWARD_SHARED_BYTES, FORWARD_SHARED_BYTES, DQ_SHARED_BYTES, DKV_SHARED_BYTES   dynamic
constexpr int HS = HEAD_SIZE;
[[maybe_unused]] constexpr float LOG2E = 1.4426950408889634f;

static_assert(HS % 8 == 0 && HS > 0, "HEAD_SIZE must be a multiple of 8");

// One head's q, k, v or out, or the gradient of one: a (T, HS) matrix in the rows of a larger tensor. 32-bit numbers
// until the last moment: a 64-bit start per matrix would cost the large kernels registers that they do not have.
template <class X> struct Matrix {
    X* columns;  // the head's columns of token 0 of the batch
    int stride, first, T;

    __device__ X* row(int t) const { return columns + (i64)(first + t) * stride; }
};

constexpr int Q = 0, K = 1, V = 2;

// A head's matrix in qkvr or dqkvr. `head` counts over (B, NH).
template <class X> __device__ inline Matrix<X> packed(X* qkvr, int which, int head, int T, int NH) {
    return {qkvr + (which * NH + head % NH) * HS, 3 * NH * HS, head / NH * T, T};
}

// A head's matrix in out or dout.
template <class X> __device__ inline Matrix<X> plain(X* out, int head, int T, int NH) {
    return {out + head % NH * HS, NH * HS, head / NH * T, T};
}

// ---------------------------------------------------------------------------------------------------------------------
// naive: one thread for each query, or for each key. Grid ceil(B*NH*T / NAIVE_THREADS), block NAIVE_THREADS.
// ---------------------------------------------------------------------------------------------------------------------

__device__ inline float dot(const floatX* a, const floatX* b) {
    float sum = 0.0f;
    for (int d = 0; d < HS; d++) { sum += (float)a[d] * (float)b[d]; }
    return sum;
}

extern "C" __global__ void __launch_bounds__(NAIVE_THREADS) attention_forward_naive(
    floatX* out, float* att, const floatX* qkvr, float scale, int B, int T, int NH) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (i64)B * NH * T) { return; }
    int head = i / T, t = i % T;
    float o[HS] = {}, top = -INFINITY, sum = 0.0f;
    const floatX* q = packed(qkvr, Q, head, T, NH).row(t);
    for (int j = 0; j <= t; j++) {
        const floatX *k = packed(qkvr, K, head, T, NH).row(j), *v = packed(qkvr, V, head, T, NH).row(j);
        float s = scale * dot(q, k), old = top;
        top = fmaxf(top, s);
        float keep = expf(old - top), p = expf(s - top);
        sum = sum * keep + p;
        for (int d = 0; d < HS; d++) { o[d] = o[d] * keep + p * (float)v[d]; }
    }
    floatX* out_t = plain(out, head, T, NH).row(t);
    for (int d = 0; d < HS; d++) { out_t[d] = (floatX)(o[d] / sum); }
    att[i] = top + logf(sum);
}

// D (B, NH, T) = dout . out, for naive and ffma. Grid and block as above.
extern "C" __global__ void __launch_bounds__(NAIVE_THREADS) attention_backward_dot(
    float* D, const floatX* dout, const floatX* out, int B, int T, int NH) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (i64)B * NH * T) { return; }
    int head = i / T, t = i % T;
    size_t at = (((size_t)(head / NH) * T + t) * NH + head % NH) * HS;
    float sum = 0.0f;
#pragma unroll
    for (int d = 0; d < HS; d += x128::size) {
        x128 a = load128(dout + at + d), b = load128(out + at + d);
#pragma unroll
        for (int e = 0; e < x128::size; e++) { sum += (float)a[e] * (float)b[e]; }
    }
    D[i] = sum;
}

extern "C" __global__ void __launch_bounds__(NAIVE_THREADS) attention_backward_dq_naive(
    floatX* dqkvr, const float* D, const floatX* dout, const floatX* qkvr, const float* att, float scale, int B, int T,
    int NH) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (i64)B * NH * T) { return; }
    int head = i / T, t = i % T;
    const floatX* q = packed(qkvr, Q, head, T, NH).row(t);
    const floatX* dout_t = plain(dout, head, T, NH).row(t);
    float dq[HS] = {};
    for (int j = 0; j <= t; j++) {
        const floatX *k = packed(qkvr, K, head, T, NH).row(j), *v = packed(qkvr, V, head, T, NH).row(j);
        float p = expf(scale * dot(q, k) - att[i]), ds = p * (dot(dout_t, v) - D[i]);
        for (int d = 0; d < HS; d++) { dq[d] += ds * (float)k[d]; }
    }
    floatX* at = dqkvr + (q - qkvr);
    for (int d = 0; d < HS; d++) { at[d] = (floatX)(scale * dq[d]); }
}

extern "C" __global__ void __launch_bounds__(NAIVE_THREADS) attention_backward_dkv_naive(
    floatX* dqkvr, const float* D, const floatX* dout, const floatX* qkvr, const float* att, float scale, int B, int T,
    int NH) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (i64)B * NH * T) { return; }
    int head = i / T, j = i % T;
    const floatX *k = packed(qkvr, K, head, T, NH).row(j), *v = packed(qkvr, V, head, T, NH).row(j);
    float dk[HS] = {}, dv[HS] = {};
    for (int t = j; t < T; t++) {
        const floatX* q = packed(qkvr, Q, head, T, NH).row(t);
        const floatX* dout_t = plain(dout, head, T, NH).row(t);
        float p = expf(scale * dot(q, k) - att[(i64)head * T + t]);
        float ds = p * (dot(dout_t, v) - D[(i64)head * T + t]);
        for (int d = 0; d < HS; d++) { dv[d] += p * (float)dout_t[d], dk[d] += ds * (float)q[d]; }
    }
    floatX *dk_at = dqkvr + (k - qkvr), *dv_at = dqkvr + (v - qkvr);
    for (int d = 0; d < HS; d++) { dk_at[d] = (floatX)(scale * dk[d]), dv_at[d] = (floatX)dv[d]; }
}

#if HEAD_SIZE <= 128

// Which tile of which head a block works on. Tile 0 has the most work and should start first, so that the short tiles
// fill the gaps at the end. But all tiles of a head read the same keys and values, which should still be in L2.
// Therefore heads are taken in groups of 32 (a few MB), and within a group tile by tile.
__device__ inline void choose_work(int tiles, int heads, int& tile, int& head) {
    constexpr int GROUP = 32;
    int group = blockIdx.x / (GROUP * tiles), rest = blockIdx.x % (GROUP * tiles);
    int size = min(GROUP, heads - group * GROUP);
    tile = rest / size, head = group * GROUP + rest % size;
}

// ---------------------------------------------------------------------------------------------------------------------
// ffma: tiles in shared memory, multiplied by FFMA
//
// A block owns OWN rows (queries, or keys for dk and dv) and walks over tiles of 32 columns. Thread (y, x), x < 8, has
// the 4 x 4 scores of rows y + Y*i and columns x + 8*j, and of a result row the elements 4x .. 4x+3 of every 32. A row
// is shared by 8 lanes of one warp: row statistics are shuffles, and probabilities pass between lanes with __syncwarp.
// All tiles hold fp32. Their row stride, HS + 4, is 4 times an odd number for every HS: any 8 rows then lie in
// different 16-byte columns of the banks.
// Grid ceil(T / OWN) * B*NH, block 2 * OWN, dynamic shared memory FFMA_SHARED_BYTES or FFMA_BACKWARD_SHARED_BYTES.
// ---------------------------------------------------------------------------------------------------------------------

constexpr int FFMA_STRIDE = HS + 4, P_STRIDE = FFMA_COLUMNS + 4;               // of rows of tiles and of probabilities
constexpr int FORWARD_Y = FFMA_ROWS / 4, BACKWARD_Y = FFMA_BACKWARD_ROWS / 4;  // rows of threads
constexpr int PARTS = ceil_div(HS, 32);                                        // float4s of a result row per thread

// Floats in shared memory: own tiles, two tiles that are walked over, probabilities.
__host__ __device__ constexpr int ffma_floats(int own, int rows) {
    return (own * rows + 2 * FFMA_COLUMNS) * FFMA_STRIDE + rows * P_STRIDE;
}

static_assert(FFMA_COLUMNS == 32, "eight lanes have four columns each");
static_assert(ffma_floats(1, FFMA_ROWS) * 4 == FFMA_SHARED_BYTES, "the launcher asks for as much");
static_assert(ffma_floats(2, FFMA_BACKWARD_ROWS) * 4 == FFMA_BACKWARD_SHARED_BYTES, "the launcher asks for as much");

// Loads rows row0 .. row0 + N - 1 of a (T, HS) matrix into a tile; rows from T on are zeros.
template <int N, int Y>
__device__ inline void load_rows_ffma(float* tile, const Matrix<const floatX>& matrix, int row0) {
    constexpr int PACKS = HS / x128::size;
    for (int i = threadIdx.x; i < N * PACKS; i += Y * 8) {
        int row = i / PACKS, d = i % PACKS * x128::size;
        x128 pack = row0 + row < matrix.T ? load128(matrix.row(row0 + row) + d) : zeros128<floatX>();
#pragma unroll
        for (int e = 0; e < x128::size; e += 4) {
            *(float4*)(tile + row * FFMA_STRIDE + d + e) =
                make_float4((float)pack[e], (float)pack[e + 1], (float)pack[e + 2], (float)pack[e + 3]);
        }
    }
}

// s[i][j] = row (y + Y*i) of a times row (x + 8*j) of b, a dot product over HS.
template <int Y> __device__ inline void dots_ffma(float (&s)[4][4], const float* a, const float* b) {
    int y = threadIdx.x / 8, x = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) { s[i][j] = 0.0f; }
    }
#pragma unroll 4
    for (int d = 0; d < HS; d += 4) {
        float4 u[4], w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) { u[i] = *(const float4*)(a + (y + Y * i) * FFMA_STRIDE + d); }
#pragma unroll
        for (int j = 0; j < 4; j++) { w[j] = *(const float4*)(b + (x + 8 * j) * FFMA_STRIDE + d); }
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] += u[i].x * w[j].x + u[i].y * w[j].y + u[i].z * w[j].z + u[i].w * w[j].w;
            }
        }
    }
}

// result[i] += sum over the 32 columns c of p[i][c] * row c of m. p goes through p_tile, which only this warp uses.
template <int Y>
__device__ inline void accumulate_ffma(float (&result)[4][PARTS][4], const float (&p)[4][4], float* p_tile,
                                   const float* m) {
    int y = threadIdx.x / 8, x = threadIdx.x % 8;
    __syncwarp();  // the previous use is over
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) { p_tile[(y + Y * i) * P_STRIDE + x + 8 * j] = p[i][j]; }
    }
    __syncwarp();
#pragma unroll 2
    for (int c = 0; c < FFMA_COLUMNS; c += 4) {
        float w[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float4 four = *(const float4*)(p_tile + (y + Y * i) * P_STRIDE + c);
            w[i][0] = four.x, w[i][1] = four.y, w[i][2] = four.z, w[i][3] = four.w;
        }
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            if (HS % 32 != 0 && part * 32 + x * 4 >= HS) { continue; }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float4 four = *(const float4*)(m + (c + e) * FFMA_STRIDE + part * 32 + x * 4);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    result[i][part][0] += w[i][e] * four.x, result[i][part][1] += w[i][e] * four.y;
                    result[i][part][2] += w[i][e] * four.z, result[i][part][3] += w[i][e] * four.w;
                }
            }
        }
    }
}

// Stores this thread's elements of a result row, times a factor, in the row at `at` of a (T, HS) matrix.
__device__ inline void store_row_ffma(floatX* at, const float (&result)[PARTS][4], float factor) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        int d = part * 32 + threadIdx.x % 8 * 4;
        if (d < HS) {
#pragma unroll
            for (int e = 0; e < 4; e++) { at[d + e] = (floatX)(result[part][e] * factor); }
        }
    }
}

extern "C" __global__ void __launch_bounds__(FFMA_ROWS * 2, 2) attention_forward_ffma(
    floatX* out, float* att, const floatX* qkvr, float scale, int B, int T, int NH) {
    constexpr int Y = FORWARD_Y, OWN = FFMA_ROWS;
    extern __shared__ int4 dynamic_shared[];
    float *q_tile = (float*)dynamic_shared, *k_tile = q_tile + OWN * FFMA_STRIDE;
    float *v_tile = k_tile + FFMA_COLUMNS * FFMA_STRIDE, *p_tile = v_tile + FFMA_COLUMNS * FFMA_STRIDE;
    int tiles = ceil_div(T, OWN), tile, head, y = threadIdx.x / 8, x = threadIdx.x % 8;
    choose_work(tiles, B * NH, tile, head);
    int t0 = (tiles - 1 - tile) * OWN;  // the last queries see the most keys
    float to_base2 = scale * LOG2E, top[4], sum[4], o[4][PARTS][4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) { top[i] = -INFINITY, sum[i] = 0.0f; }

    load_rows_ffma<OWN, Y>(q_tile, packed(qkvr, Q, head, T, NH), t0);
    for (int k0 = 0; k0 < min(T, t0 + OWN); k0 += FFMA_COLUMNS) {
        __syncthreads();
        load_rows_ffma<FFMA_COLUMNS, Y>(k_tile, packed(qkvr, K, head, T, NH), k0);
        load_rows_ffma<FFMA_COLUMNS, Y>(v_tile, packed(qkvr, V, head, T, NH), k0);
        __syncthreads();
        float s[4][4];
        dots_ffma<Y>(s, q_tile, k_tile);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = t0 + y + Y * i;
            float old = top[i], tile_sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (k0 + x + 8 * j > row) { s[i][j] = -INFINITY; }
                top[i] = fmaxf(top[i], s[i][j]);
            }
#pragma unroll
            for (int lanes = 4; lanes > 0; lanes /= 2) { top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], lanes)); }
            // top is finite from the first tile on: it contains key 0
            float keep = exp2f((old - top[i]) * to_base2);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] = exp2f(fmaf(s[i][j], to_base2, -top[i] * to_base2));
                tile_sum += s[i][j];
            }
            sum[i] = sum[i] * keep + tile_sum;  // of this lane's columns
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
#pragma unroll
                for (int e = 0; e < 4; e++) { o[i][part][e] *= keep; }
            }
        }
        accumulate_ffma<Y>(o, s, p_tile, v_tile);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = t0 + y + Y * i;
#pragma unroll
        for (int lanes = 4; lanes > 0; lanes /= 2) { sum[i] += __shfl_xor_sync(~0u, sum[i], lanes); }
        if (row < T) {
            store_row_ffma(plain(out, head, T, NH).row(row), o[i], 1.0f / sum[i]);
            if (x == 0) { att[(i64)head * T + row] = top[i] * scale + logf(sum[i]); }
        }
    }
}

extern "C" __global__ void __launch_bounds__(FFMA_BACKWARD_ROWS * 2, 2) attention_backward_dq_ffma(
    floatX* dqkvr, const float* D, const floatX* dout, const floatX* qkvr, const float* att, float scale, int B, int T,
    int NH) {
    constexpr int Y = BACKWARD_Y, OWN = FFMA_BACKWARD_ROWS;
    extern __shared__ int4 dynamic_shared[];
    float *q_tile = (float*)dynamic_shared, *dout_tile = q_tile + OWN * FFMA_STRIDE;
    float* k_tile = dout_tile + OWN * FFMA_STRIDE;
    float *v_tile = k_tile + FFMA_COLUMNS * FFMA_STRIDE, *p_tile = v_tile + FFMA_COLUMNS * FFMA_STRIDE;
    int tiles = ceil_div(T, OWN), tile, head, y = threadIdx.x / 8, x = threadIdx.x % 8;
    choose_work(tiles, B * NH, tile, head);
    int t0 = (tiles - 1 - tile) * OWN;
    float to_base2 = scale * LOG2E, lse[4], D_row[4], dq[4][PARTS][4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = t0 + y + Y * i;
        lse[i] = row < T ? att[(i64)head * T + row] * LOG2E : INFINITY;
        D_row[i] = row < T ? D[(i64)head * T + row] : 0.0f;
    }

    load_rows_ffma<OWN, Y>(q_tile, packed(qkvr, Q, head, T, NH), t0);
    load_rows_ffma<OWN, Y>(dout_tile, plain(dout, head, T, NH), t0);
    for (int k0 = 0; k0 < min(T, t0 + OWN); k0 += FFMA_COLUMNS) {
        __syncthreads();
        load_rows_ffma<FFMA_COLUMNS, Y>(k_tile, packed(qkvr, K, head, T, NH), k0);
        load_rows_ffma<FFMA_COLUMNS, Y>(v_tile, packed(qkvr, V, head, T, NH), k0);
        __syncthreads();
        float s[4][4], dp[4][4];
        dots_ffma<Y>(s, q_tile, k_tile);
        dots_ffma<Y>(dp, dout_tile, v_tile);
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                bool hidden = k0 + x + 8 * j > t0 + y + Y * i;
                float p = hidden ? 0.0f : exp2f(fmaf(s[i][j], to_base2, -lse[i]));
                s[i][j] = p * (dp[i][j] - D_row[i]);
            }
        }
        accumulate_ffma<Y>(dq, s, p_tile, k_tile);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = t0 + y + Y * i;
        if (row < T) { store_row_ffma(packed(dqkvr, Q, head, T, NH).row(row), dq[i], scale); }
    }
}

extern "C" __global__ void __launch_bounds__(FFMA_BACKWARD_ROWS * 2, 2) attention_backward_dkv_ffma(
    floatX* dqkvr, const float* D, const floatX* dout, const floatX* qkvr, const float* att, float scale, int B, int T,
    int NH) {
    constexpr int Y = BACKWARD_Y, OWN = FFMA_BACKWARD_ROWS;
    extern __shared__ int4 dynamic_shared[];
    float *k_tile = (float*)dynamic_shared, *v_tile = k_tile + OWN * FFMA_STRIDE, *q_tile = v_tile + OWN * FFMA_STRIDE;
    float *dout_tile = q_tile + FFMA_COLUMNS * FFMA_STRIDE, *p_tile = dout_tile + FFMA_COLUMNS * FFMA_STRIDE;
    int tiles = ceil_div(T, OWN), tile, head, y = threadIdx.x / 8, x = threadIdx.x % 8;
    choose_work(tiles, B * NH, tile, head);
    int j0 = tile * OWN;  // the first keys are seen by the most queries
    float to_base2 = scale * LOG2E, dk[4][PARTS][4] = {}, dv[4][PARTS][4] = {};

    load_rows_ffma<OWN, Y>(k_tile, packed(qkvr, K, head, T, NH), j0);
    load_rows_ffma<OWN, Y>(v_tile, packed(qkvr, V, head, T, NH), j0);
    for (int t0 = j0; t0 < T; t0 += FFMA_COLUMNS) {
        __syncthreads();
        load_rows_ffma<FFMA_COLUMNS, Y>(q_tile, packed(qkvr, Q, head, T, NH), t0);
        load_rows_ffma<FFMA_COLUMNS, Y>(dout_tile, plain(dout, head, T, NH), t0);
        __syncthreads();
        float s[4][4], dp[4][4];  // transposed: rows are keys, columns queries
        dots_ffma<Y>(s, k_tile, q_tile);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int t = t0 + x + 8 * j;
            float lse = t < T ? att[(i64)head * T + t] * LOG2E : INFINITY;  // p = 0 past the end
#pragma unroll
            for (int i = 0; i < 4; i++) {
                bool hidden = j0 + y + Y * i > t;
                s[i][j] = hidden ? 0.0f : exp2f(fmaf(s[i][j], to_base2, -lse));
            }
        }
        accumulate_ffma<Y>(dv, s, p_tile, dout_tile);
        dots_ffma<Y>(dp, v_tile, dout_tile);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int t = t0 + x + 8 * j;
            float D_column = t < T ? D[(i64)head * T + t] : 0.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) { s[i][j] *= dp[i][j] - D_column; }
        }
        accumulate_ffma<Y>(dk, s, p_tile, q_tile);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = j0 + y + Y * i;
        if (row < T) {
            store_row_ffma(packed(dqkvr, K, head, T, NH).row(row), dk[i], scale);
            store_row_ffma(packed(dqkvr, V, head, T, NH).row(row), dv[i], 1.0f);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// mma: tensor cores
//
// A block has 4 warps. A warp owns 16 rows (forward: ROW_TILES x 16) of the scores and all columns of the tile: softmax
// statistics stay inside groups of 4 lanes, and the accumulators of one product, rounded, are the a fragments of the
// next one, so scores and probabilities never leave the registers. What a block keeps fixed (q; q and dout; k and v) is
// in registers as a fragments. What it walks over comes through two buffers in shared memory by cp.async: there is one
// barrier for each tile, and the copy of the next tile runs during the products of this one. A row in shared memory has
// an odd number of 16-byte pieces: the 8 rows of a matrix that ldmatrix reads lie in different 16-byte columns of the
// banks.
// Grid ceil(T / QUERIES) * B*NH, backward ceil(T / ROWS) * B*NH, block MMA_THREADS, dynamic shared memory as the
// *_SHARED_BYTES.
// ---------------------------------------------------------------------------------------------------------------------

#ifdef TENSOR_CORES

constexpr int DEPTH = ceil_div(HS, 16) * 16;        // HS as the products see it, zero beyond HS
constexpr int STEPS = DEPTH / 16;                   // k steps of a product over HS; 16-column groups of a result
constexpr int STRIDE = DEPTH + 8;                   // elements of a row in shared memory
constexpr int ROW_TILES = QUERIES / 64;             // forward: 16-row fragments of a warp, as many as registers allow
constexpr bool KEEP = HS <= 96;                     // dkv: k and v stay in registers; else they are in shared memory

static_assert(MMA_THREADS == 128 && QUERIES % 64 == 0 && ROWS == 64, "four warps share out the rows");
static_assert(KEYS % 16 == 0 && COLUMNS % 16 == 0 && 2 * COLUMNS <= MMA_THREADS, "fragments; a statistic for a thread");
static_assert(4 * KEYS * STRIDE * 2 == FORWARD_SHARED_BYTES && QUERIES <= 4 * KEYS, "two buffers, then staging");
static_assert(4 * COLUMNS * STRIDE * 2 == DQ_SHARED_BYTES && 2 * ROWS <= 4 * COLUMNS, "two buffers, then staging");
static_assert((4 * COLUMNS + (KEEP ? 0 : 2 * ROWS)) * STRIDE * 2 == DKV_SHARED_BYTES, "and keys and values");

// Starts the copy of rows row0 .. row0 + N - 1 of a matrix, with zeros from T and from HS on. A thread's pieces lie at
// constant distances from one address: to compute each anew costs 20 registers.
template <int N> __device__ inline void copy_rows(floatX* tile, const Matrix<const floatX>& matrix, int row0) {
    constexpr int PIECES = DEPTH / 8;
    int row = threadIdx.x / 8, piece = threadIdx.x % 8;
    const floatX* from = matrix.row(row0 + row) + piece * 8;
    tile += row * STRIDE + piece * 8;
#pragma unroll
    for (int i = 0; i < N; i += 16) {
#pragma unroll
        for (int j = 0; j < PIECES; j += 8) {
            if (j + 8 > PIECES && j + piece >= PIECES) { break; }
            bool inside = row0 + row + i < matrix.T && (j + piece) * 8 < HS;
            cp_async_16(tile + i * STRIDE + j * 8, from + (i64)i * matrix.stride + j * 8, inside);
        }
    }
}

// Loads the a fragments of rows row0 .. row0 + 15 of a matrix from global memory, with zeros from T and from HS on.
__device__ inline void load_rows(u32 (&a)[STEPS][4], const Matrix<const floatX>& matrix, int row0) {
    int lane = threadIdx.x % 32, row = row0 + lane / 4;
    const floatX* from = matrix.row(row) + lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int down = i % 2 * 8, right = step * 16 + i / 2 * 8;
            bool inside = row + down < matrix.T && right < HS;
            a[step][i] = inside ? *(const u32*)(from + (i64)down * matrix.stride + right) : 0;
        }
    }
}

// s[n] = a times rows 8n .. 8n+7 of the tile: dot products over HS, for N groups of 8 columns.
template <int N, int R>
__device__ inline void dots(float (&s)[R][N][4], const u32 (&a)[R][STEPS][4], const floatX* tile) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
        for (int n = 0; n < N; n++) { s[r][n][0] = s[r][n][1] = s[r][n][2] = s[r][n][3] = 0.0f; }
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 b[4];
            ldmatrix_x4(b, tile + (n * 8 + lane % 8 + lane / 16 * 8) * STRIDE + step * 16 + lane / 8 % 2 * 8);
#pragma unroll
            for (int r = 0; r < R; r++) { mma(s[r][n], a[r][step], b), mma(s[r][n + 1], a[r][step], b + 2); }
        }
    }
}

// The same with the 16 rows of a in shared memory.
template <int N> __device__ inline void dots(float (&s)[N][4], const floatX* a_tile, const floatX* tile) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; n++) { s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f; }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 a[4], b[4];
        ldmatrix_x4(a, a_tile + lane % 16 * STRIDE + step * 16 + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            ldmatrix_x4(b, tile + (n * 8 + lane % 8 + lane / 16 * 8) * STRIDE + step * 16 + lane / 8 % 2 * 8);
            mma(s[n], a, b), mma(s[n + 1], a, b + 2);
        }
    }
}

// result += p @ tile: p has 8N columns, as many as the tile has rows; result has HS columns.
template <int N, int R>
__device__ inline void accumulate(float (&result)[R][2 * STEPS][4], const u32 (&p)[R][N / 2][4], const floatX* tile) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 b[4];
            ldmatrix_x4_trans(b, tile + (k * 16 + lane % 16) * STRIDE + step * 16 + lane / 16 * 8);
#pragma unroll
            for (int r = 0; r < R; r++) {
                mma(result[r][2 * step], p[r][k], b), mma(result[r][2 * step + 1], p[r][k], b + 2);
            }
        }
    }
}

// Rounds accumulators to a fragments, of which every lane has the same elements.
template <int N> __device__ inline void round_to_a(u32 (&a)[N / 2][4], const float (&s)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        a[n / 2][n % 2 * 2] = pack2(s[n][0], s[n][1]), a[n / 2][n % 2 * 2 + 1] = pack2(s[n][2], s[n][3]);
    }
}

// Stores 16 result rows as rows row0 .. row0 + 15 of a (T, HS) matrix, 16 bytes at a time. staging: 16 rows of this
// warp alone. Row g of the fragments is multiplied by factor[0], row g + 8 by factor[1].
__device__ inline void store_rows(const Matrix<floatX>& matrix, int row0, const float (&result)[2 * STEPS][4],
                                  const float (&factor)[2], floatX* staging) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < 2 * STEPS; n++) {
        floatX* at = staging + lane / 4 * STRIDE + n * 8 + lane % 4 * 2;
        *(u32*)at = pack2(result[n][0] * factor[0], result[n][1] * factor[0]);
        *(u32*)(at + 8 * STRIDE) = pack2(result[n][2] * factor[1], result[n][3] * factor[1]);
    }
    __syncwarp();
    constexpr int PIECES = HS / 8;
    for (int i = lane; i < 16 * PIECES; i += 32) {
        int row = i / PIECES, d = i % PIECES * 8;
        if (row0 + row < matrix.T) { store128(matrix.row(row0 + row) + d, load128(staging + row * STRIDE + d)); }
    }
}

extern "C" __global__ void __launch_bounds__(MMA_THREADS) attention_forward_mma(
    floatX* out, float* att, const floatX* qkvr, float scale, int B, int T, int NH) {
    extern __shared__ int4 dynamic_shared[];
    floatX* shared = (floatX*)dynamic_shared;  // 2 x {keys, values}; afterwards staging for out
    constexpr int N = KEYS / 8, SIZE = KEYS * STRIDE;
    int tiles = ceil_div(T, QUERIES), tile, head, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    choose_work(tiles, B * NH, tile, head);
    int t0 = (tiles - 1 - tile) * QUERIES;  // the last queries see the most keys
    int row0 = t0 + warp * 16 * ROW_TILES;  // this warp's first query
    float to_base2 = scale * LOG2E;

    int key_tiles = ceil_div(min(T, t0 + QUERIES), KEYS);
    auto copy = [&](int j) {
        floatX* buffer = shared + j % 2 * 2 * SIZE;
        copy_rows<KEYS>(buffer, packed(qkvr, K, head, T, NH), j * KEYS);
        copy_rows<KEYS>(buffer + SIZE, packed(qkvr, V, head, T, NH), j * KEYS);
        cp_async_commit();
    };
    copy(0);

    u32 q[ROW_TILES][STEPS][4];
    float o[ROW_TILES][2 * STEPS][4] = {}, top[ROW_TILES][2], sum[ROW_TILES][2];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        load_rows(q[r], packed(qkvr, Q, head, T, NH), row0 + r * 16);
        top[r][0] = top[r][1] = -INFINITY, sum[r][0] = sum[r][1] = 0.0f;
    }

    for (int j = 0; j < key_tiles; j++) {
        cp_async_wait<0>();  // this thread's part of tile j has arrived
        __syncthreads();     // everybody's has, and everybody is done with tile j - 1
        if (j + 1 < key_tiles) { copy(j + 1); }
        int k0 = j * KEYS;
        if (k0 > row0 + 16 * ROW_TILES - 1) { continue; }  // all of it lies in this warp's future
        const floatX *k_tile = shared + j % 2 * 2 * SIZE, *v_tile = k_tile + SIZE;

        float s[ROW_TILES][N][4];
        dots(s, q, k_tile);
        if (k0 + KEYS - 1 > row0) {  // only the tiles on the diagonal
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
                for (int n = 0; n < N; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int key = k0 + n * 8 + lane % 4 * 2 + e % 2, row = row0 + r * 16 + lane / 4 + e / 2 * 8;
                        if (key > row) { s[r][n][e] = -INFINITY; }
                    }
                }
            }
        }
        u32 p[ROW_TILES][N / 2][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {  // rows g and g + 8 of the fragment
                float old = top[r][half], now = old, tile_sum = 0.0f;
#pragma unroll
                for (int n = 0; n < N; n++) { now = fmaxf(now, fmaxf(s[r][n][2 * half], s[r][n][2 * half + 1])); }
                now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
                now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
                top[r][half] = now;  // finite from the first tile on: it contains key 0
                float keep = exp2f((old - now) * to_base2), offset = -now * to_base2;
#pragma unroll
                for (int n = 0; n < N; n++) {
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        s[r][n][e] = exp2f(fmaf(s[r][n][e], to_base2, offset));
                        tile_sum += s[r][n][e];
                    }
                }
                sum[r][half] = sum[r][half] * keep + tile_sum;  // of this lane's columns
#pragma unroll
                for (int n = 0; n < 2 * STEPS; n++) { o[r][n][2 * half] *= keep, o[r][n][2 * half + 1] *= keep; }
            }
            round_to_a<N>(p[r], s[r]);
        }
        accumulate<N>(o, p, v_tile);
    }

    __syncthreads();  // the buffers are free
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[r][half];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            factor[half] = 1.0f / total;
            int row = row0 + r * 16 + lane / 4 + half * 8;
            if (row < T && lane % 4 == 0) { att[(i64)head * T + row] = top[r][half] * scale + logf(total); }
        }
        floatX* staging = shared + (warp * ROW_TILES + r) * 16 * STRIDE;
        store_rows(plain(out, head, T, NH), row0 + r * 16, o[r], factor, staging);
    }
}

// dq of 64 queries, and D for the next kernel: this one has dout in registers already.
extern "C" __global__ void __launch_bounds__(MMA_THREADS) attention_backward_dq_mma(
    floatX* dqkvr, float* D, const floatX* dout, const floatX* out, const floatX* qkvr, const float* att, float scale,
    int B, int T, int NH) {
    extern __shared__ int4 dynamic_shared[];
    floatX* shared = (floatX*)dynamic_shared;  // 2 x {keys, values}; afterwards staging for dq
    constexpr int N = COLUMNS / 8, SIZE = COLUMNS * STRIDE;
    int tiles = ceil_div(T, 64), tile, head, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    choose_work(tiles, B * NH, tile, head);
    int t0 = (tiles - 1 - tile) * 64, row0 = t0 + warp * 16;
    float to_base2 = scale * LOG2E;

    int key_tiles = ceil_div(min(T, t0 + 64), COLUMNS);
    auto copy = [&](int j) {
        floatX* buffer = shared + j % 2 * 2 * SIZE;
        copy_rows<COLUMNS>(buffer, packed(qkvr, K, head, T, NH), j * COLUMNS);
        copy_rows<COLUMNS>(buffer + SIZE, packed(qkvr, V, head, T, NH), j * COLUMNS);
        cp_async_commit();
    };
    copy(0);

    u32 q[1][STEPS][4], d_out[1][STEPS][4], o[STEPS][4];
    load_rows(q[0], packed(qkvr, Q, head, T, NH), row0);
    load_rows(d_out[0], plain(dout, head, T, NH), row0);
    load_rows(o, plain(out, head, T, NH), row0);
    float lse[2], D_row[2] = {}, dq[1][2 * STEPS][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float a[2], b[2];
            unpack2(a, d_out[0][step][i]), unpack2(b, o[step][i]);
            D_row[i % 2] += a[0] * b[0] + a[1] * b[1];
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        D_row[half] += __shfl_xor_sync(~0u, D_row[half], 1);
        D_row[half] += __shfl_xor_sync(~0u, D_row[half], 2);
        int row = row0 + lane / 4 + half * 8;
        lse[half] = row < T ? att[(i64)head * T + row] * LOG2E : INFINITY;  // p = 0 past the end
        if (row < T && lane % 4 == 0) { D[(i64)head * T + row] = D_row[half]; }
    }

    for (int j = 0; j < key_tiles; j++) {
        cp_async_wait<0>();
        __syncthreads();
        if (j + 1 < key_tiles) { copy(j + 1); }
        int k0 = j * COLUMNS;
        if (k0 > row0 + 15) { continue; }
        const floatX *k_tile = shared + j % 2 * 2 * SIZE, *v_tile = k_tile + SIZE;

        float s[1][N][4], dp[1][N][4];
        dots(s, q, k_tile);
        dots(dp, d_out, v_tile);
        bool diagonal = k0 + COLUMNS - 1 > row0;
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = k0 + n * 8 + lane % 4 * 2 + e % 2, row = row0 + lane / 4 + e / 2 * 8;
                float p = exp2f(fmaf(s[0][n][e], to_base2, -lse[e / 2]));
                if (diagonal && key > row) { p = 0.0f; }
                s[0][n][e] = p * (dp[0][n][e] - D_row[e / 2]);
            }
        }
        u32 ds[1][N / 2][4];
        round_to_a<N>(ds[0], s[0]);
        accumulate<N>(dq, ds, k_tile);
    }
    __syncthreads();
    store_rows(packed(dqkvr, Q, head, T, NH), row0, dq[0], {scale, scale}, shared + warp * 16 * STRIDE);
}

// dk and dv of 64 keys. Scores are computed transposed, rows = keys and columns = queries, so that the rounded p and ds
// are a fragments of the products that sum over queries. D comes from attention_backward_dq_mma.
extern "C" __global__ void __launch_bounds__(MMA_THREADS) attention_backward_dkv_mma(
    floatX* dqkvr, const float* D, const floatX* dout, const floatX* qkvr, const float* att, float scale, int B, int T,
    int NH) {
    extern __shared__ int4 dynamic_shared[];
    floatX* shared = (floatX*)dynamic_shared;  // 2 x {queries, dout}, then keys and values if not KEEP
    constexpr int N = COLUMNS / 8, SIZE = COLUMNS * STRIDE;
    __shared__ float statistics[2][2][COLUMNS];  // of the queries of a buffer: att * log2(e), D
    int tiles = ceil_div(T, 64), tile, head, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    choose_work(tiles, B * NH, tile, head);
    int j0 = tile * 64, row0 = j0 + warp * 16;  // the first keys are seen by the most queries
    float to_base2 = scale * LOG2E;

    int first = j0 / COLUMNS, query_tiles = ceil_div(T, COLUMNS);
    auto copy = [&](int i) {
        floatX* buffer = shared + i % 2 * 2 * SIZE;
        copy_rows<COLUMNS>(buffer, packed(qkvr, Q, head, T, NH), i * COLUMNS);
        copy_rows<COLUMNS>(buffer + SIZE, plain(dout, head, T, NH), i * COLUMNS);
        cp_async_commit();
    };
    auto load_statistic = [&](int i) {  // one of tile i's 2 x COLUMNS for each of the first threads
        int t = i * COLUMNS + threadIdx.x % COLUMNS;
        if (threadIdx.x / COLUMNS == 0) { return t < T ? att[(i64)head * T + t] * LOG2E : INFINITY; }
        return threadIdx.x / COLUMNS == 1 && t < T ? D[(i64)head * T + t] : 0.0f;
    };
    auto place_statistic = [&](int i, float value) {
        if (threadIdx.x < 2 * COLUMNS) { statistics[i % 2][threadIdx.x / COLUMNS][threadIdx.x % COLUMNS] = value; }
    };
    u32 k[1][STEPS][4], v[1][STEPS][4];  // this warp's keys and values
    const floatX *k_rows = shared + 4 * SIZE + warp * 16 * STRIDE, *v_rows = k_rows + 64 * STRIDE;
    if constexpr (KEEP) {
        load_rows(k[0], packed(qkvr, K, head, T, NH), row0);
        load_rows(v[0], packed(qkvr, V, head, T, NH), row0);
    } else {
        copy_rows<64>(shared + 4 * SIZE, packed(qkvr, K, head, T, NH), j0);
        copy_rows<64>(shared + 4 * SIZE + 64 * STRIDE, packed(qkvr, V, head, T, NH), j0);
    }
    copy(first);
    place_statistic(first, load_statistic(first));
    float dk[1][2 * STEPS][4] = {}, dv[1][2 * STEPS][4] = {};

    for (int i = first; i < query_tiles; i++) {
        cp_async_wait<0>();
        __syncthreads();
        bool more = i + 1 < query_tiles;
        float next = 0.0f;
        if (more) {
            copy(i + 1);
            next = load_statistic(i + 1);  // in flight during the products, stored after them
        }
        int t0 = i * COLUMNS;
        if (t0 + COLUMNS - 1 >= row0) {  // else all of these queries lie before this warp's keys
            const floatX *q_tile = shared + i % 2 * 2 * SIZE, *dout_tile = q_tile + SIZE;
            const float *lse = statistics[i % 2][0], *D_tile = statistics[i % 2][1];
            bool diagonal = t0 < row0 + 15;
            float s[1][N][4], dp[1][N][4];
            u32 p[1][N / 2][4];
            if constexpr (KEEP) {
                dots(s, k, q_tile);
            } else {
                dots(s[0], k_rows, q_tile);
            }
#pragma unroll
            for (int n = 0; n < N; n++) {
                float2 lse2 = *(const float2*)(lse + n * 8 + lane % 4 * 2);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int t = t0 + n * 8 + lane % 4 * 2 + e % 2, key = row0 + lane / 4 + e / 2 * 8;
                    s[0][n][e] = exp2f(fmaf(s[0][n][e], to_base2, -(e % 2 ? lse2.y : lse2.x)));
                    if (diagonal && key > t) { s[0][n][e] = 0.0f; }
                }
            }
            round_to_a<N>(p[0], s[0]);
            accumulate<N>(dv, p, dout_tile);
            if constexpr (KEEP) {
                dots(dp, v, dout_tile);
            } else {
                dots(dp[0], v_rows, dout_tile);
            }
#pragma unroll
            for (int n = 0; n < N; n++) {
                float2 D2 = *(const float2*)(D_tile + n * 8 + lane % 4 * 2);
#pragma unroll
                for (int e = 0; e < 4; e++) { s[0][n][e] *= dp[0][n][e] - (e % 2 ? D2.y : D2.x); }
            }
            round_to_a<N>(p[0], s[0]);
            accumulate<N>(dk, p, q_tile);
        }
        if (more) { place_statistic(i + 1, next); }
    }
    __syncthreads();
    floatX* staging = shared + warp * 16 * STRIDE;
    store_rows(packed(dqkvr, K, head, T, NH), row0, dk[0], {scale, scale}, staging);
    store_rows(packed(dqkvr, V, head, T, NH), row0, dv[0], {1.0f, 1.0f}, staging + 64 * STRIDE);
}

#endif  // TENSOR_CORES

#endif  // HEAD_SIZE <= 128
