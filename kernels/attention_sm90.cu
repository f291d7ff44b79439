// Causal attention (math, layouts and contract in kernels/attention.cu) on Hopper's own units, sm_90a, for bf16 and
// fp16, for heads of 64 or 128 and any T: TMA brings tiles of the packed tensors into shared memory, wgmma multiplies
// them from there. kernels/hopper.cuh has the roles and the ring of stages.
//
// Each consumer has 64 of the 128 rows that the block owns. These rows (forward: q; dq: q and dout; dkv: k and v) it
// holds in registers, as a fragments; the tiles that it walks over are b, read by wgmma from the stages. The rounded
// sums of a product are the a fragments of the next product, so scores and probabilities never leave the registers.
// Blocks stay, one on each multiprocessor. The 128-row blocks of a head have unequal work. They are taken in pairs, the
// first with the last, the second with the last but one, and so on: all pairs of a launch have the same work. Pairs of
// one head follow each other: they read the same tiles, from L2.
//
// forward: a consumer starts the scores of the next tile together with the sums over the values of this one. It takes
//   exponentials as soon as the scores are there, beside its own sums and the other consumer's products.
// backward: as in attention.cu, dq comes from one kernel, dk and dv from another that computes the scores transposed.
//   That makes seven products instead of five, but needs neither atomics nor an fp32 dq in memory: to sum dq over
//   blocks of keys would cost more. The gradients' sums of a tile are started with the scores of the next, and run
//   beside its exponentials.
//
// Rung 4 of the ladder; production for bf16 and fp16 at compute capability 9.0. TFLOP/s on an H200 at B = 32, T = 1024,
// NH = 12, HS = 64, bf16 (the causal half of 4 or 10 B NH T T HS FLOPs), 2026-11-26:
//            forward              | backward
//   expected 330-400              | 230-300
//   measured 349 (148 us)         | 354 (364 us)
//   cuDNN    154 us               | 530 us
//   T = 4096: 451, 447; T = 16384: 485, 435
// Its products alone would run at 790 and 560. The exponentials, 16 a cycle, take 130 us beside 63 and 230 us of
// products.
//
// Source: Shah et al. 2024 (FlashAttention-3, arXiv:2407.08608) for the overlap inside a warpgroup. Its turns of the
// warpgroups at the tensor cores lost here: dev/LOG.md.
#include "hopper.cuh"

// llmc/cuda/attention.py decides and gives by -D:
//   HEAD_SIZE
//   ROWS       a block's own rows, 64 for each consumer; forward: also the rows of a tile
//   COLUMNS    backward: rows of a tile, which are columns of the scores
//   FORWARD_STAGES, DQ_STAGES, DKV_STAGES, THREADS, FORWARD_SHARED_BYTES, DQ_SHARED_BYTES, DKV_SHARED_BYTES
constexpr int HS = HEAD_SIZE, STEPS = HS / 16, BOXES = HS / 64;
constexpr float LOG2E = 1.4426950408889634f;
static_assert(HS == 64 || HS == 128, "a row of a head is one or two boxes of 64");
static_assert(ROWS == 128 && COLUMNS == 64, "two consumers of 64 rows; two backward tiles make a block");
static_assert(THREADS == BLOCK_THREADS, "a producer and two consumers");

constexpr int Q = 0, K = 1, V = 2;
constexpr int OWN = ROWS * HS * 2;    // bytes of a block's own rows
constexpr int STAGING = 16 * HS * 2;  // bytes of the 16 rows of a warp

// Where a thread that comes by every stage is in the ring: the next stage, and the parity of its uses so far.
struct Ring {
    int stage, phase;

    __device__ void next(int stages) {
        if (++stage == stages) { stage = 0, phase ^= 1; }
    }
};

// Calls f(head, block) for the blocks of ROWS rows that this thread block works on. `head` counts over (B, NH).
template <class F> __device__ inline void each_block(int T, int heads, F f) {
    int blocks = ceil_div(T, ROWS), pairs = (blocks + 1) / 2;
    for (int item = blockIdx.x; item < pairs * heads; item += gridDim.x) {
        int head = item / pairs, pair = item % pairs;
#pragma unroll 1
        for (int block = blocks - 1 - pair;; block = pair) {
            f(head, block);
            if (block == pair) { break; }
        }
    }
}

// Asks TMA for a tile of TILE_ROWS rows x HS columns, from a row and column on. Its boxes of 64 columns lie one after
// the other, as wgmma wants them.
template <int BOX_ROWS, int TILE_ROWS>
__device__ inline void load_tile(char* tile, const TensorMap& map, int column, int row, u64* full) {
#pragma unroll
    for (int box = 0; box < BOXES; box++) {
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r += BOX_ROWS) {
            tma_load(tile + (box * TILE_ROWS + r) * 128, map, column + box * 64, row + r, full);
        }
    }
}

// Loads the a fragment number `step`, 16 columns, of this warp's 16 rows among the block's own rows.
__device__ inline void load_fragment(u32 (&a)[4], char* own, int row0, int step) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4(a, swizzled(own + step / 4 * ROWS * 128, row0 + lane % 16, step % 4 * 2 + lane / 16));
}

// Starts sums = a @ tile^T: for each row the dot products over HS with the tile's rows, of which there are 2 * SIZE.
template <int SIZE> __device__ inline void start_dots(float (&sums)[SIZE], const u32 (&a)[STEPS][4], const char* tile) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u64 b = wgmma_operand(tile + step / 4 * SIZE * 2 * 128, 0) + step % 4 * 2;
        wgmma<false>(sums, a[step], b, step > 0);
    }
    wgmma_commit();
}

// The same with a in shared memory, where the block's own rows are.
template <int SIZE> __device__ inline void start_dots(float (&sums)[SIZE], const char* own, const char* tile) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u64 a = wgmma_operand(own + step / 4 * ROWS * 128, 0) + step % 4 * 2;
        u64 b = wgmma_operand(tile + step / 4 * SIZE * 2 * 128, 0) + step % 4 * 2;
        wgmma<false, false>(sums, a, b, step > 0);
    }
    wgmma_commit();
}

// Starts result = p @ tile, summed over the tile's 16 * DEPTH rows, or result += if `add`.
template <int DEPTH>
__device__ inline void start_sums(float (&result)[HS / 2], const u32 (&p)[DEPTH][4], const char* tile, bool add) {
    u64 b = wgmma_operand(tile, DEPTH * 16 * 128);
#pragma unroll
    for (int k = 0; k < DEPTH; k++) { wgmma<true>(result, p[k], b + k * 128, add || k > 0); }
    wgmma_commit();
}

// A product's sums, rounded, as a fragments of the next product: each lane has the elements that it needs.
template <int SIZE> __device__ inline void round_to_a(u32 (&a)[SIZE / 8][4], const float (&sums)[SIZE]) {
#pragma unroll
    for (int i = 0; i < SIZE / 2; i++) { a[i / 4][i % 4] = pack2(sums[2 * i], sums[2 * i + 1]); }
}

// The column of a product's sums[j], and whether it belongs to the second of this thread's two rows.
__device__ inline int column_of(int j) { return j / 4 * 8 + threadIdx.x % 4 * 2 + j % 2; }
constexpr __device__ int second_row(int j) { return j / 2 % 2; }

// Stores this warp's 16 rows of a result. The first goes to `to`; only `rows` of them lie inside the tensor. This
// thread's two rows are multiplied by factor[0] and factor[1]. They pass through the warp's staging, so that a row is
// written in 128-byte lines.
__device__ inline void store_rows(floatX* to, int stride, int rows, const float (&values)[HS / 2],
                                  const float (&factor)[2], char* staging) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 packed[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* pair = &values[step * 8 + 2 * i];
            packed[i] = pack2(pair[0] * factor[i % 2], pair[1] * factor[i % 2]);
        }
        stmatrix_x4(swizzled(staging + step / 4 * 16 * 128, lane % 16, step % 4 * 2 + lane / 16), packed);
    }
    __syncwarp();
#pragma unroll
    for (int box = 0; box < BOXES; box++) {
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            int row = i + lane / 8, piece = lane % 8;
            if (row < rows) {
                int4 bits = *(int4*)swizzled(staging + box * 16 * 128, row, piece);
                *(int4*)(to + (i64)row * stride + box * 64 + piece * 8) = bits;
            }
        }
    }
    __syncwarp();
}

// The sum over the four lanes that share a row.
__device__ inline float sum_of_row(float value) {
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}
__device__ inline float max_of_row(float value) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
    return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

template <class Shared> __device__ inline Shared& shared_memory() {
    extern __shared__ char dynamic_shared[];
    return *(Shared*)(dynamic_shared + to_1024(dynamic_shared));
}

// The kernel: one thread calls produce(), two warpgroups call consume(0) and consume(1).
template <class Shared, class P, class C> __device__ inline void run(Shared& shared, P produce, C consume) {
    if (threadIdx.x == 0) {
        init_ring(shared.full, shared.empty, Shared::STAGES, 8);  // both consumers read a stage
        mbarrier_init(&shared.own_full, 1), mbarrier_init(&shared.own_empty, 8);
        mbarrier_init_done();
    }
    divide_roles(produce, consume);
}

// ---------------------------------------------------------------------------------------------------------------------
// forward. The own rows are queries. A stage holds a tile of 128 keys, or one of their values, in the order in which
// they are needed: from the diagonal, which alone is masked, back to the first keys. A tile has the number of the block
// of its rows.
// ---------------------------------------------------------------------------------------------------------------------

struct ForwardShared {
    static constexpr int STAGES = FORWARD_STAGES;
    char stages[STAGES][OWN];
    char own[OWN];
    char staging[8][STAGING];
    u64 full[STAGES], empty[STAGES], own_full, own_empty;
};

static_assert(sizeof(ForwardShared) + 1024 == FORWARD_SHARED_BYTES, "the launcher asks for as much; 1024 to align it");

// Called by one thread.
__device__ inline void forward_produce(ForwardShared& shared, const TensorMap& qkvr, int B, int T, int NH) {
    Ring ring = {0, 0};
    int own_phase = 0;
    each_block(T, B * NH, [&](int head, int block) {
        int row = head / NH * T, column = head % NH * HS;
        auto load = [&](int which, int tile) {
            u64* full = &shared.full[ring.stage];
            mbarrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
            mbarrier_expect(full, OWN);
            load_tile<ROWS, ROWS>(shared.stages[ring.stage], qkvr, which * NH * HS + column, row + tile * ROWS, full);
            ring.next(ForwardShared::STAGES);
        };
        mbarrier_wait(&shared.own_empty, own_phase ^ 1);
        own_phase ^= 1;
        mbarrier_expect(&shared.own_full, OWN);
        load_tile<ROWS, ROWS>(shared.own, qkvr, Q * NH * HS + column, row + block * ROWS, &shared.own_full);
        load(K, block);
        for (int tile = block; tile > 0; tile--) { load(K, tile - 1), load(V, tile); }
        load(V, 0);
    });
}

__device__ inline void forward_consume(ForwardShared& shared, int consumer, floatX* out, float* att, float scale, int B,
                                       int T, int NH) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, own_row = consumer * 64 + warp * 16;
    float to_base2 = scale * LOG2E;
    Ring ring = {0, 0};
    int own_phase = 0;
    auto take = [&] {  // the number of the next stage, when it is full
        int stage = ring.stage;
        mbarrier_wait(&shared.full[stage], ring.phase);
        ring.next(ForwardShared::STAGES);
        return stage;
    };
    auto release = [&](u64* empty) { warp_arrive(empty, lane); };
    each_block(T, B * NH, [&](int head, int block) {
        u32 q[STEPS][4], p[ROWS / 16][4];
        float scores[ROWS / 2], o[HS / 2], top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, keep[2];
        mbarrier_wait(&shared.own_full, own_phase);
        own_phase ^= 1;
#pragma unroll
        for (int step = 0; step < STEPS; step++) { load_fragment(q[step], shared.own, own_row, step); }
        fence_async();  // without it TMA has brought the next rows while ldmatrix still read these: seen on an H200
        __syncwarp();
        release(&shared.own_empty);

        // Turns scores into probabilities, relative to the largest score so far. `keep` is what earlier ones are worth
        // now.
        auto exponentials = [&](bool diagonal) {
            if (diagonal) {  // keys and queries of the same block
#pragma unroll
                for (int j = 0; j < ROWS / 2; j++) {
                    if (column_of(j) > own_row + lane / 4 + second_row(j) * 8) { scores[j] = -INFINITY; }
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float now = top[half], tile_sum = 0.0f;
#pragma unroll
                for (int j = half * 2; j < ROWS / 2; j += 4) { now = fmaxf(now, fmaxf(scores[j], scores[j + 1])); }
                now = max_of_row(now);  // finite from the first tile on: it contains the query's own key
                keep[half] = exp2f((top[half] - now) * to_base2);
                top[half] = now;
                float offset = -now * to_base2;
#pragma unroll
                for (int j = half * 2; j < ROWS / 2; j += 4) {
#pragma unroll
                    for (int e = j; e < j + 2; e++) {
                        scores[e] = exp2f(fmaf(scores[e], to_base2, offset));
                        tile_sum += scores[e];
                    }
                }
                sum[half] = sum[half] * keep[half] + tile_sum;  // of this lane's columns
            }
        };

        int key_stage = take();
        wgmma_begin();
        start_dots(scores, q, shared.stages[key_stage]);
        wgmma_wait<0>();
        wgmma_tie(scores);
        release(&shared.empty[key_stage]);
        exponentials(true);
        round_to_a(p, scores);
        for (int tile = block; tile > 0; tile--) {
            key_stage = take();
            int value_stage = take();
            wgmma_begin();
            start_dots(scores, q, shared.stages[key_stage]);
            start_sums(o, p, shared.stages[value_stage], tile < block);
            wgmma_wait<1>();
            wgmma_tie(scores);
            release(&shared.empty[key_stage]);
            exponentials(false);
            hold_until(sum[0] + sum[1]);  // otherwise ptxas moves the exponentials behind the products they run beside
            wgmma_wait<0>();
            wgmma_tie(o), wgmma_tie(p);
            release(&shared.empty[value_stage]);
#pragma unroll
            for (int j = 0; j < HS / 2; j++) { o[j] *= keep[second_row(j)]; }
            round_to_a(p, scores);
        }
        int value_stage = take();
        wgmma_begin();
        start_sums(o, p, shared.stages[value_stage], block > 0);
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum_of_row(sum[half]);
            int t = block * ROWS + own_row + lane / 4 + half * 8;
            factor[half] = 1.0f / total;
            if (t < T && lane % 4 == 0) { att[(i64)head * T + t] = top[half] * scale + logf(total); }
        }
        wgmma_wait<0>();
        wgmma_tie(o);
        release(&shared.empty[value_stage]);
        int t0 = block * ROWS + own_row;
        floatX* to = out + ((i64)(head / NH) * T + t0) * (NH * HS) + head % NH * HS;
        store_rows(to, NH * HS, T - t0, o, factor, shared.staging[consumer * 4 + warp]);
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// backward. With KEYS the own rows are keys and values, a stage holds 64 queries and their dout, scores are transposed,
// and the results are dk and dv. Otherwise the own rows are queries and their dout, a stage holds 64 keys and their
// values, and the result is dq.
// ---------------------------------------------------------------------------------------------------------------------

constexpr int TILE = COLUMNS * HS * 2, STATISTICS = 2 * COLUMNS * 4;
constexpr bool FRAGMENTS = HS == 64;  // own rows are in registers; of larger heads wgmma reads them from shared memory

template <bool KEYS> struct BackwardShared {
    static constexpr int STAGES = KEYS ? DKV_STAGES : DQ_STAGES;
    char stages[STAGES][2][TILE];
    char own[KEYS ? 2 : 3][OWN];  // k, v, or q, dout, out
    char staging[8][STAGING];
    float statistics[STAGES][2][COLUMNS];  // KEYS: of the queries
    u64 full[STAGES], empty[STAGES], own_full, own_empty;
};

static_assert(sizeof(BackwardShared<false>) + 1024 == DQ_SHARED_BYTES, "the launcher asks for as much");
static_assert(sizeof(BackwardShared<true>) + 1024 == DKV_SHARED_BYTES, "the launcher asks for as much");

// The tiles that a block's rows meet: with KEYS those from the block's first key on, otherwise those up to its last
// query.
template <bool KEYS> __device__ inline int tiles_begin(int block) { return KEYS ? 2 * block : 0; }
template <bool KEYS> __device__ inline int tiles_end(int block, int T) {
    int tiles = ceil_div(T, COLUMNS);
    return KEYS ? tiles : min(2 * block + 2, tiles);
}

// Where dq leaves a tile's statistics for dkv: att * log2(e) of its 64 queries, then their D. For queries from T on
// these are infinity and 0, with which p and ds are 0.
__device__ inline i64 statistics_of(int head, int tile, int T) {
    return ((i64)head * ceil_div(T, COLUMNS) + tile) * (2 * COLUMNS);
}

// Called by one thread.
template <bool KEYS>
__device__ inline void backward_produce(BackwardShared<KEYS>& shared, const TensorMap& qkvr, const TensorMap& dout,
                                        const TensorMap& out, const float* statistics, int B, int T, int NH) {
    Ring ring = {0, 0};
    int own_phase = 0;
    each_block(T, B * NH, [&](int head, int block) {
        int row = head / NH * T, column = head % NH * HS;
        auto packed = [&](int which) { return which * NH * HS + column; };
        int own_row = row + block * ROWS;
        u64* full = &shared.own_full;
        mbarrier_wait(&shared.own_empty, own_phase ^ 1);
        own_phase ^= 1;
        mbarrier_expect(full, sizeof(shared.own));
        if constexpr (KEYS) {
            load_tile<COLUMNS, ROWS>(shared.own[0], qkvr, packed(K), own_row, full);
            load_tile<COLUMNS, ROWS>(shared.own[1], qkvr, packed(V), own_row, full);
        } else {
            load_tile<COLUMNS, ROWS>(shared.own[0], qkvr, packed(Q), own_row, full);
            load_tile<COLUMNS, ROWS>(shared.own[1], dout, column, own_row, full);
            load_tile<COLUMNS, ROWS>(shared.own[2], out, column, own_row, full);
        }
        int begin = tiles_begin<KEYS>(block), end = tiles_end<KEYS>(block, T);
        for (int i = 0; i < end - begin; i++) {
            int tile = KEYS ? begin + i : end - 1 - i;
            auto& stage = shared.stages[ring.stage];
            full = &shared.full[ring.stage];
            mbarrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
            mbarrier_expect(full, 2 * TILE + (KEYS ? STATISTICS : 0));
            if (KEYS) {
                const float* from = statistics + statistics_of(head, tile, T);
                bulk_load(shared.statistics[ring.stage], from, STATISTICS, full);
            }
            load_tile<COLUMNS, COLUMNS>(stage[0], qkvr, packed(KEYS ? Q : K), row + tile * COLUMNS, full);
            load_tile<COLUMNS, COLUMNS>(stage[1], KEYS ? dout : qkvr, KEYS ? column : packed(V), row + tile * COLUMNS,
                                        full);
            ring.next(shared.STAGES);
        }
    });
}

template <bool KEYS>
__device__ inline void backward_consume(BackwardShared<KEYS>& shared, int consumer, floatX* dqkvr, float* statistics,
                                        const float* att, float scale, int B, int T, int NH) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, own_row = consumer * 64 + warp * 16;
    float to_base2 = scale * LOG2E;
    Ring ring = {0, 0};
    int own_phase = 0;
    auto release = [&](u64* empty) {
        if (KEYS || !FRAGMENTS) { __syncwarp(); }  // lane 0 arrives for all: other lanes' own reads of it come before
        warp_arrive(empty, lane);
    };
    // Starts sums = own rows of kind `which` @ tile^T.
    auto start = [&](float(&sums)[COLUMNS / 2], const u32(&a)[STEPS][4], int which, const char* tile) {
        if (FRAGMENTS) {
            start_dots(sums, a, tile);
        } else {
            start_dots(sums, shared.own[which] + consumer * 64 * 128, tile);
        }
    };
    each_block(T, B * NH, [&](int head, int block) {
        int t0 = block * ROWS + own_row;  // this warp's first row
        float lse[2], D_row[2] = {};      // of this thread's rows, where they are queries
        if (!KEYS) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int t = t0 + lane / 4 + half * 8;
                lse[half] = t < T ? att[(i64)head * T + t] * LOG2E : INFINITY;
            }
        }
        u32 first[STEPS][4], second[STEPS][4];
        mbarrier_wait(&shared.own_full, own_phase);
        own_phase ^= 1;
        if (FRAGMENTS) {
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                load_fragment(first[step], shared.own[0], own_row, step);
                load_fragment(second[step], shared.own[1], own_row, step);
            }
        }
        if constexpr (!KEYS) {
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                u32 dout[4], out[4];
                load_fragment(dout, shared.own[1], own_row, step), load_fragment(out, shared.own[2], own_row, step);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float a[2], b[2];
                    unpack2(a, dout[i]), unpack2(b, out[i]);
                    D_row[i % 2] += a[0] * b[0] + a[1] * b[1];
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                D_row[half] = sum_of_row(D_row[half]);
                int row = warp * 16 + lane / 4 + half * 8;
                float* to = statistics + statistics_of(head, 2 * block + consumer, T) + row;
                if (lane % 4 == 0 && (2 * block + consumer) * COLUMNS < T) {
                    to[0] = lse[half];
                    to[COLUMNS] = t0 + lane / 4 + half * 8 < T ? D_row[half] : 0.0f;
                }
            }
        }
        fence_async();  // as in forward
        if (FRAGMENTS) {
            __syncwarp();
            release(&shared.own_empty);
        }

        float p[COLUMNS / 2], dp[COLUMNS / 2];
        float d_first[HS / 2] = {}, d_second[HS / 2] = {};  // dk and dv; or dq, and d_second is not used
        u32 rounded_p[COLUMNS / 16][4], rounded_ds[COLUMNS / 16][4];
        auto take = [&] {  // the number of the next stage, when it is full
            int stage = ring.stage;
            mbarrier_wait(&shared.full[stage], ring.phase);
            ring.next(shared.STAGES);
            return stage;
        };
        auto start_scores = [&](int stage) {
            start(p, first, 0, shared.stages[stage][0]);
            start(dp, second, 1, shared.stages[stage][1]);
        };
        auto start_gradients = [&](int stage) {
            if (KEYS) { start_sums(d_second, rounded_p, shared.stages[stage][1], true); }
            start_sums(d_first, rounded_ds, shared.stages[stage][0], true);
        };
        auto exponentials = [&](int stage, bool diagonal) {  // turns scores into probabilities
#pragma unroll
            for (int j = 0; j < COLUMNS / 2; j++) {
                float log_sum = KEYS ? shared.statistics[stage][0][column_of(j)] : lse[second_row(j)];
                p[j] = exp2f(fmaf(p[j], to_base2, -log_sum));
                int row = warp * 16 + lane / 4 + second_row(j) * 8, column = column_of(j);
                if (diagonal && (KEYS ? row > column : column > row)) { p[j] = 0.0f; }
            }
        };
        auto times_dp = [&](int stage) {  // turns p into ds
#pragma unroll
            for (int j = 0; j < COLUMNS / 2; j++) {
                p[j] *= dp[j] - (KEYS ? shared.statistics[stage][1][column_of(j)] : D_row[second_row(j)]);
            }
        };
        auto fragments = [&](int stage, bool diagonal) {  // makes rounded_p and rounded_ds of a tile
            wgmma_begin();
            start_scores(stage);
            wgmma_wait<1>();
            wgmma_tie(p);
            exponentials(stage, diagonal);
            wgmma_wait<0>();
            wgmma_tie(dp);
            if (KEYS) { round_to_a(rounded_p, p); }
            times_dp(stage);
            round_to_a(rounded_ds, p);
        };

        // A consumer begins with the tile on its diagonal. A block has two of these, and one of the consumers first
        // meets the other's, which lies outside its triangle: it passes that one on unread.
        int tiles = tiles_end<KEYS>(block, T) - tiles_begin<KEYS>(block);
        if (KEYS ? consumer == 1 && tiles > 1 : tiles > 2 * block + consumer + 1) {
            release(&shared.empty[take()]);
            tiles--;
        }
        int stage = take();
        fragments(stage, true);
        for (int i = 1; i < tiles; i++) {
            int before = stage;
            if constexpr (KEYS && !FRAGMENTS) {  // there are no registers for the overlap below
                wgmma_begin();
                start_gradients(before);
                wgmma_wait<0>();
                wgmma_tie(d_first), wgmma_tie(d_second);
                release(&shared.empty[before]);
                stage = take();
                fragments(stage, false);
                continue;
            }
            // The sums of a tile run beside the exponentials of the next.
            stage = take();
            wgmma_begin();
            start_scores(stage);
            start_gradients(before);
            wgmma_wait<KEYS ? 3 : 2>();
            wgmma_tie(p);
            exponentials(stage, false);
            wgmma_wait<1>();
            wgmma_tie(dp);
            if (KEYS) { wgmma_tie(d_second), wgmma_tie(rounded_p), round_to_a(rounded_p, p); }
            times_dp(stage);
            wgmma_wait<0>();
            wgmma_tie(d_first), wgmma_tie(rounded_ds);
            release(&shared.empty[before]);
            round_to_a(rounded_ds, p);
        }
        wgmma_begin();
        start_gradients(stage);
        wgmma_wait<0>();
        wgmma_tie(d_first), wgmma_tie(d_second);
        release(&shared.empty[stage]);
        if (!FRAGMENTS) { release(&shared.own_empty); }
        char* staging = shared.staging[consumer * 4 + warp];
        floatX* to = dqkvr + ((i64)(head / NH) * T + t0) * (3 * NH * HS) + head % NH * HS;
        store_rows(to + (KEYS ? K : Q) * NH * HS, 3 * NH * HS, T - t0, d_first, {scale, scale}, staging);
        if (KEYS) { store_rows(to + V * NH * HS, 3 * NH * HS, T - t0, d_second, {1.0f, 1.0f}, staging); }
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// entry points: grid at most one block for each multiprocessor, block THREADS, dynamic shared memory as the
// *_SHARED_BYTES. qkvr (B*T, 3C), dout and out (B*T, C) are tensor maps with boxes of 64 columns and of ROWS rows in
// forward, COLUMNS rows in backward. dq is launched before dkv. statistics:
// 2 * COLUMNS * ceil(T / COLUMNS) floats for each of the B * NH heads.
// ---------------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_forward_sm90(
    floatX* out, float* att, const __grid_constant__ TensorMap qkvr, float scale, int B, int T, int NH) {
    auto& shared = shared_memory<ForwardShared>();
    run(
        shared, [&] { forward_produce(shared, qkvr, B, T, NH); },
        [&](int consumer) { forward_consume(shared, consumer, out, att, scale, B, T, NH); });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_backward_dq_sm90(
    floatX* dqkvr, float* statistics, const __grid_constant__ TensorMap qkvr, const __grid_constant__ TensorMap dout,
    const __grid_constant__ TensorMap out, const float* att, float scale, int B, int T, int NH) {
    auto& shared = shared_memory<BackwardShared<false>>();
    run(
        shared, [&] { backward_produce<false>(shared, qkvr, dout, out, nullptr, B, T, NH); },
        [&](int consumer) { backward_consume<false>(shared, consumer, dqkvr, statistics, att, scale, B, T, NH); });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_backward_dkv_sm90(
    floatX* dqkvr, const float* statistics, const __grid_constant__ TensorMap qkvr,
    const __grid_constant__ TensorMap dout, float scale, int B, int T, int NH) {
    auto& shared = shared_memory<BackwardShared<true>>();
    run(
        shared, [&] { backward_produce<true>(shared, qkvr, dout, dout, statistics, B, T, NH); },
        [&](int consumer) { backward_consume<true>(shared, consumer, dqkvr, nullptr, nullptr, scale, B, T, NH); });
}
