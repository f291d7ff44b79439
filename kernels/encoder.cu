// Token and position embeddings, and the gradient that flows back into both tables.
//
//   forward   out[b,t,:] = wte[inp[b,t],:] + wpe[t,:]
//   backward  dwte[v,:] += sum of dout[b,t,:] over all (b,t) with inp[b,t] = v       dwpe[t,:] += sum over b of dout[b,t,:]
//
//   out, dout (B,T,C) floatX    inp (B,T) i32, ids below Vp    wte (Vp,C), wpe (maxT,C) floatX, T <= maxT
//   dwte, dwpe floatG    N = B*T.  Sums are fp32, in the order of positions; the += is rounded stochastically in bf16.
//
// The hard part is dwte: many positions hold the same token. llm.c sorts on the host; float atomics would be simple, but
// the order of additions and so the bits would change from run to run. Here the device sorts, and no step is atomic.
//
// PIECE (entries of the sorted list that one block sums), BLOCK and SORT_BLOCK (threads) come from llmc/cuda/encoder.py.
//
// Measured on an H200, B=32, T=1024, C=768, bf16, tokens as frequent as in text, microseconds. Rungs below production are
// ladder/encoder_0N_*.cu:
// op               | rung | idea                                          | bytes moved                 | measured
// encoder_forward  | 1    | thread per element                            | (2N + T) C                  | 111
// encoder_forward  | 2    | thread per 16 bytes                           | same, 8x fewer accesses     | 24.2 (117 %)
// encoder_backward | 1    | block per vocabulary row reads all N tokens   | 4 N Vp (L2) + N C           | 1.7 s
// encoder_backward | 2    | sort positions by token, block per token      | N C, but one block sums a   | 4064
//                  |      | that occurs                                   | frequent token's rows alone |
// encoder_backward | 3    | sort, blocks sum equal pieces of the sorted   | N C + partials              | 162
//                  |      | list; tokens that span pieces are put together|                             |
// encoder_backward | 5    | tokens sorted along, digits of 6, 5 and 5     | same; a quarter of the      | 97.7 (27 %),
//                  |      | bits; rows of dwte loaded ahead; both tables  | sort's reads from L2        | predicted 70
//                  |      | in one launch; 16 sums ahead                  |                             |
// Of rung 5, predicted: sort 17 (3 passes of 64, 32 and 32 blocks read 34 MB of L2), both tables 45, which is their bytes at
// half of a copy's speed, combination 10. Which of the three takes longer than that has not been measured.
//
// Source: llm.c llmc/encoder.cuh (encoder_forward_kernel3, wpe_backward_kernel, wte_backward_kernel).
#include "common.cuh"

static_assert(PIECE > 0 && BLOCK % 32 == 0 && SORT_BLOCK % 32 == 0 && SORT_BLOCK <= 1024, "sizes of llmc/cuda/encoder.py");

// ---------------------------------------------------------------------------------------------------------------------
// forward
// ---------------------------------------------------------------------------------------------------------------------

// One thread per 16 bytes of out. grid ceil(packs / block), packs = N*C / x128::size < 2^31; C % x128::size == 0.
extern "C" __global__ void encoder_forward_kernel(floatX* out, const int* inp, const floatX* wte, const floatX* wpe,
                                                   int T, int C, int packs) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) { return; }
    int row_packs = C / x128::size;
    int position = i / row_packs, c = i % row_packs * x128::size, t = position % T;
    x128 token = load128(wte + (i64)inp[position] * C + c);
    x128 place = load128(wpe + (i64)t * C + c);
    for (int k = 0; k < x128::size; k++) { token[k] = (floatX)((float)token[k] + (float)place[k]); }
    store128(out + (i64)i * x128::size, token);
}

// ---------------------------------------------------------------------------------------------------------------------
// backward: what both tables need
// ---------------------------------------------------------------------------------------------------------------------

#define WTE 0  // the two tables round with different noise
#define WPE 1

// table[element..] += x128::size sums, which in a table of fp32 are two packs, each rounded with noise that depends on
// (seed, table, element) alone.
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

// ---------------------------------------------------------------------------------------------------------------------
// backward: the tokens sorted
// ---------------------------------------------------------------------------------------------------------------------

#define BATCH 8  // tokens of a lane that are loaded before any is looked at

// One pass of a stable radix sort of tokens and their positions: tokens, positions = those of in_tokens, in_positions (NULL:
// 0, 1, 2, ...), ordered by the digit (token >> shift) & mask, equal digits in the order in which they came. Passes from the
// low digit up sort by token and keep positions ascending within a token, which fixes the order of every sum.
// Block d owns digit d. It reads all N tokens, counts how many go before its own, and appends its own in order: no
// histogram, no atomics, N reads from L2 for each digit. Each warp owns a contiguous run of the list.
// The loads of a batch come before its stores: tokens[] might be in_tokens[] for all the compiler knows, so that otherwise
// every step would wait for the one before. grid mask + 1, block a multiple of 32 up to SORT_BLOCK.
extern "C" __global__ void __launch_bounds__(SORT_BLOCK)
sort_by_token_kernel(int* tokens, int* positions, const int* in_tokens, const int* in_positions, int N, int shift,
                      int mask) {
    __shared__ int run_matches[32];
    __shared__ int run_before[32];
    int digit = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int run = ceil_div(N, warps), begin = min(warp * run, N), end = min(begin + run, N);

    int matches = 0, before = 0;  // of this warp's run: tokens with our digit, and with a smaller one
    for (int i = begin + lane; i - lane < end; i += 32 * BATCH) {
        int token[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++) { token[b] = i + 32 * b < end ? in_tokens[i + 32 * b] : 0; }
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int found = i + 32 * b < end ? (token[b] >> shift) & mask : digit + 1;
            matches += __popc(__ballot_sync(0xffffffffu, found == digit));
            before += __popc(__ballot_sync(0xffffffffu, found < digit));
        }
    }
    if (lane == 0) {
        run_matches[warp] = matches;
        run_before[warp] = before;
    }
    __syncthreads();
    int place = 0;  // where this run's first match goes: after all smaller digits and the matches of earlier runs
    for (int w = 0; w < warps; w++) { place += run_before[w] + (w < warp ? run_matches[w] : 0); }

    for (int i = begin + lane; i - lane < end; i += 32 * BATCH) {
        int token[BATCH], from[BATCH];  // from: -1 where the digit is another
#pragma unroll
        for (int b = 0; b < BATCH; b++) { token[b] = i + 32 * b < end ? in_tokens[i + 32 * b] : 0; }
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            bool match = i + 32 * b < end && ((token[b] >> shift) & mask) == digit;
            from[b] = !match ? -1 : in_positions ? in_positions[i + 32 * b] : i + 32 * b;
        }
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            u32 votes = __ballot_sync(0xffffffffu, from[b] >= 0);
            if (from[b] >= 0) {
                int to = place + __popc(votes & ((1u << lane) - 1));
                tokens[to] = token[b];
                positions[to] = from[b];
            }
            place += __popc(votes);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// backward: both tables
// ---------------------------------------------------------------------------------------------------------------------

#define AHEAD 8     // rows whose loads are on their way at once
#define AT_ONCE 16  // sums of pieces likewise

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

// Walks one piece of the sorted list and sums the rows of each token in it, for the channels of part y of C. A token that
// lies within the piece is finished here. What continues from the piece before is left in partials[piece][0], what begins
// here and goes on in the next piece in partials[piece][1]; wte_combine_kernel adds those up.
// The rows of dwte that a batch of loads will finish are read with it: most tokens of a piece occur once, and each would
// wait for its row otherwise. partials (pieces, 2, C) f32.
__device__ inline void add_piece(floatG* dwte, float* partials, const floatX* dout, const int* sorted_tokens,
                                 const int* positions, const u32* seed, int piece, int y, int N, int C) {
    constexpr int size = Packed128<floatG>::size, parts = x128::size / size;
    __shared__ int rows_at[PIECE];
    __shared__ int tokens[PIECE + 2];  // with the neighbours on both sides; -1 past the ends of the list
    int begin = piece * PIECE, count = min(PIECE, N - begin);
    for (int i = threadIdx.x; i < count + 2; i += blockDim.x) {
        int j = begin + i - 1;
        tokens[i] = j >= 0 && j < N ? sorted_tokens[j] : -1;
        if (i >= 1 && i <= count) { rows_at[i - 1] = positions[j]; }
    }
    __syncthreads();
    int c = (y * blockDim.x + threadIdx.x) * x128::size;
    if (c >= C) { return; }

    float* partial = partials + (i64)piece * 2 * C + c;
    int earlier = tokens[0];  // the token of the piece before: what it has here is not finished here
    u32 key = noise(WTE, seed[0]);
    float sum[x128::size] = {};
    for (int i = 0; i < count; i += AHEAD) {
        x128 rows[AHEAD];
        Packed128<floatG> table[AHEAD][parts];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (i + a >= count) { continue; }
            int token = tokens[i + a + 1];
            rows[a] = load128cs(dout + (i64)rows_at[i + a] * C + c);
            if (token != earlier && token != tokens[i + a + 2]) {
                for (int p = 0; p < parts; p++) { table[a][p] = load128(dwte + (i64)token * C + c + p * size); }
            }
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (i + a >= count) { continue; }
            float row[x128::size];
            to_floats(row, rows[a]);
            for (int k = 0; k < x128::size; k++) { sum[k] += row[k]; }
            int token = tokens[i + a + 1];
            bool last = i + a == count - 1, goes_on = tokens[i + a + 2] == token;
            if (goes_on && !last) { continue; }
            if (token == earlier) {
                store_floats<x128::size>(partial, sum);
            } else if (goes_on) {
                store_floats<x128::size>(partial + C, sum);
            } else {
                i64 element = (i64)token * C + c;
                for (int k = 0; k < x128::size; k++) {
                    floatG& entry = table[a][k / size][k % size];
                    entry = stochastic_round<floatG>((float)entry + sum[k], noise(element + k, key));
                }
                for (int p = 0; p < parts; p++) { store128(dwte + element + p * size, table[a][p]); }
            }
            for (int k = 0; k < x128::size; k++) { sum[k] = 0.0f; }
        }
    }
}

// Both tables in one launch: the first `pieces * columns` blocks, which wait a lot, sum pieces for dwte, and the others sum
// positions for dwpe and fill the memory's idle time. dout comes from memory once more or less, for both.
// grid pieces * columns + ceil(T*C / x128::size / block), columns = ceil(C / x128::size / block); block up to BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK)
tables_backward_kernel(floatG* dwte, float* partials, floatG* dwpe, const floatX* dout, const int* sorted_tokens,
                       const int* positions, const u32* seed, int pieces, int columns, int B, int T, int C) {
    int block = blockIdx.x;
    if (block < pieces * columns) {
        add_piece(dwte, partials, dout, sorted_tokens, positions, seed, block / columns, block % columns, B * T, C);
    } else {
        i64 pack = (i64)(block - pieces * columns) * blockDim.x + threadIdx.x;
        add_positions(dwpe, dout, seed, pack * x128::size, B, T, C);
    }
}

__device__ inline void add_partial(float* sum, const float* address) {
    for (int k = 0; k < x128::size; k += f128::size) {
        f128 part = load128(address + k);
        for (int e = 0; e < f128::size; e++) { sum[k + e] += part[e]; }
    }
}

// Block (p, y) finishes the token that begins in piece p and goes on in piece p+1, if there is one: it adds partials[p][1]
// and then partials[q][0] of every following piece that the token reaches. All threads at once find out first how many
// pieces these are; their sums are then loaded AT_ONCE at a time. The second launch bound keeps ptxas from sinking those
// loads to save registers.
// grid (ceil(N / PIECE), ceil(C / x128::size / block)), block up to BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
wte_combine_kernel(floatG* dwte, const float* partials, const int* tokens, const u32* seed, int N, int C) {
    int begin = blockIdx.x * PIECE, next = begin + PIECE;
    if (next >= N) { return; }
    int token = tokens[next - 1];
    if (tokens[next] != token) { return; }                                           // nothing goes on
    if (begin > 0 && tokens[begin] == token && tokens[begin - 1] == token) { return; }  // it began in an earlier piece
    int pieces = 0, found;
    do {
        int first = (blockIdx.x + 1 + pieces + threadIdx.x) * PIECE;
        found = __syncthreads_count(first < N && tokens[first] == token);
        pieces += found;
    } while (found == blockDim.x);
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * x128::size;
    if (c >= C) { return; }
    constexpr int size = f128::size, parts = x128::size / size;
    float sum[x128::size] = {};
    partials += (i64)blockIdx.x * 2 * C + c;
    add_partial(sum, partials + C);
    for (int piece = 1; piece <= pieces; piece += AT_ONCE) {
        f128 values[AT_ONCE][parts];
#pragma unroll
        for (int a = 0; a < AT_ONCE; a++) {
            for (int p = 0; p < parts; p++) {
                bool there = piece + a <= pieces;
                values[a][p] = there ? load128(partials + (i64)(piece + a) * 2 * C + p * size) : zeros128<float>();
            }
        }
#pragma unroll
        for (int a = 0; a < AT_ONCE; a++) {
            for (int k = 0; k < x128::size; k++) { sum[k] += values[a][k / size][k % size]; }
        }
    }
    accumulate128(dwte, (i64)token * C + c, sum, noise(WTE, seed[0]));
}
