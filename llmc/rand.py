"""Random numbers of llm.c: MT19937 (weight init, data shuffling) and xorshift64* (sampling, stochastic rounding seeds).

What is exact. The 32-bit draws, the uniforms, the permutations and the 2520-byte state equal llm.c's (and PyTorch's CPU
generator) bit for bit everywhere. `normal_` gives the bits of an llm.c built with glibc >= 2.28. NumPy's own float32
log, cos and sin differ from glibc's in the last bit in 12 to 22 % of the cases, and between processors, so logf, cosf
and sinf are evaluated here in float64: equal to glibc 2.36 for each of the 2^24 values that a uniform can take.
PyTorch (n >= 16, ATEN_CPU_CAPABILITY=default) has other last digits in about 7 values of a million, because it does not
add 1e-12 before the logarithm. Its AVX2 and AVX512 paths approximate log, cos and sin in their own way: the last digits
of about a third of the values differ (by less than 3e-6 for std = 1).

Source: llm.c llmc/rand.h (manual_seed, randint32, normal_, random_permutation) and llmc/sampler.h (random_u32). The
coefficients of logf, sinf and cosf are those of Arm Optimized Routines (MIT licence), which glibc uses.
"""

import collections
import concurrent.futures
import functools
import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from llmc.errors import UserError

N = 624  # words of MT19937 state
LOG_EPSILON = np.float32(1e-12)  # llm.c's guard against log(0)
MANY = (os.cpu_count() or 1) >= 4  # on fewer cores, several threads would only take turns at the interpreter
BLOCK = 1 << (18 if MANY else 16)  # normals that one thread transforms at a time
DRAWS = 1 << (22 if MANY else 18)  # draws that are made at a time; other threads transform them meanwhile
Pending = collections.deque[tuple[concurrent.futures.Future, int]]  # work that other threads have, and its elements

STATE_STRUCT = np.dtype(  # llm.c's mt19937_state, as its train-state files have it: 2520 bytes
    [("seed_", "<u8"), ("left_", "<i4"), ("next_", "<u4"), ("state_", "<u4", (N,)), ("MATRIX_A", "<u4", (2,))]
)


class MT19937:
    """The 32-bit Mersenne Twister, seeded as in llm.c. NumPy's bit generator does the twisting and tempering."""

    def __init__(self, seed: int) -> None:
        key = [seed & 0xFFFFFFFF]
        for j in range(1, N):
            key.append((1812433253 * (key[-1] ^ key[-1] >> 30) + j) & 0xFFFFFFFF)
        self.seed = seed
        self._bits = np.random.MT19937(0)
        self._set(key, N)

    def _set(self, key: ArrayLike, position: int) -> None:
        self._bits.state = {"bit_generator": "MT19937", "state": {"key": np.array(key, np.uint32), "pos": position}}
        self._fresh = position == N  # nothing has been drawn from this block of 624 words: it is still to be made

    def random_u32s(self, n: int) -> np.ndarray:
        """The next n draws, as a uint32 array (n,)."""
        self._fresh = self._fresh and n == 0
        return self._bits.random_raw(n).astype(np.uint32)

    def random_u32(self) -> int:
        """The next draw, as an int."""
        return int(self.random_u32s(1)[0])

    def to_bytes(self) -> bytes:
        """The 2520-byte struct of llm.c's train-state files; seed_, which llm.c leaves uninitialised, is the seed."""
        state = self._bits.state["state"]
        struct = np.zeros((), STATE_STRUCT)
        struct["seed_"] = self.seed
        struct["next_"] = 0 if self._fresh else state["pos"]
        struct["left_"] = 1 if self._fresh else N + 1 - state["pos"]
        struct["state_"] = state["key"]
        struct["MATRIX_A"] = 0, 0x9908B0DF
        return struct.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "MT19937":
        """The generator that to_bytes() or llm.c saved. Errors: UserError if the bytes cannot be such a struct."""
        if len(data) != STATE_STRUCT.itemsize:
            raise UserError(f"random state of {len(data)} bytes, expected {STATE_STRUCT.itemsize}. HINT: damaged file?")
        struct = np.frombuffer(data, STATE_STRUCT)[0]
        left, position = int(struct["left_"]), int(struct["next_"])
        fresh = (left, position) == (1, 0)
        if tuple(struct["MATRIX_A"]) != (0, 0x9908B0DF) or not (fresh or 1 <= left == N + 1 - position <= N):
            raise UserError(
                f"random state has left_ {left}, next_ {position}, MATRIX_A {struct['MATRIX_A'].tolist()}, which no "
                "MT19937 generator has. HINT: file damaged?"
            )
        mt = cls(int(struct["seed_"]))
        mt._set(struct["state_"], N if fresh else position)
        mt._fresh = fresh
        return mt


def random_permutation(array: np.ndarray, mt: MT19937) -> None:
    """Shuffle a 1-D array in place: for i = n-1 .. 1 swap array[i] with array[u32 % (i + 1)], with n - 1 draws."""
    last = np.arange(len(array) - 1, 0, -1)
    picked = mt.random_u32s(last.size) % (last + 1)
    values = array.tolist()
    for i, j in zip(last.tolist(), picked.tolist(), strict=True):
        values[i], values[j] = values[j], values[i]
    array[:] = values


# ----------------------------------------------------------------------------
# normal distribution


def normal_(array: np.ndarray, mean: float, std: float, mt: MT19937) -> None:
    """Fill a C-contiguous float32 array with normal(mean, std) draws by Box-Muller, in llm.c's order of draws.

    n >= 16: n uniforms u = (u32 mod 2^24) / 2^24; in each full group of 16, for t = 0..7, elements t and t + 8 become
    rho cos(theta) and rho sin(theta) with rho = sqrt(-2 ln(1 - u[t] + 1e-12)), theta = 2 pi u[t + 8]. If n % 16 != 0,
    16 fresh uniforms are drawn for the last 16 elements.
    n < 16: pairs from two 53-bit uniforms u1, u2 with rho = sqrt(-2 ln(1 - u2 + 1e-12)), theta = 2 pi u1.
    """
    normals_([(array, mean, std)], mt)


def normals_(jobs: Iterable[tuple[np.ndarray, float, float]], mt: MT19937) -> None:
    """normal_() for each (array, mean, std) in turn.

    The draws have to be made one after another, their transforms have not: other threads have these, while the next
    draws are made.
    """
    pending: Pending = collections.deque()
    waiting = 0  # elements of what is pending
    for array, array_mean, array_std in jobs:
        assert array.dtype == np.float32 and array.flags.c_contiguous, (array.dtype, array.flags.c_contiguous)
        flat, mean, std = array.reshape(-1), np.float32(array_mean), np.float32(array_std)
        if flat.size < 16:
            _normal_small(flat, mean, std, mt)
            continue
        full = flat.size - flat.size % 16
        for start in range(0, full, DRAWS):
            out = flat[start : min(start + DRAWS, full)]
            draws = mt.random_u32s(out.size)
            for b in (slice(at, at + BLOCK) for at in range(0, out.size, BLOCK)):
                work = _pool().submit(_normal_groups_of_16, out[b], draws[b], mean, std)
                pending.append((work, out[b].size))
            waiting += out.size
            while waiting > 2 * DRAWS:
                waiting -= _done(pending)
        if full < flat.size:
            while pending:
                waiting -= _done(pending)  # then no thread writes to the last group, which is made again
            mt.random_u32s(flat.size - full)  # llm.c draws these uniforms and overwrites them
            _normal_groups_of_16(flat[-16:], mt.random_u32s(16), mean, std)
    while pending:
        _done(pending)


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(None if MANY else 1)


def _done(pending: Pending) -> int:
    """Wait for the oldest piece of work; returns its size."""
    work, size = pending.popleft()
    work.result()
    return size


def _normal_groups_of_16(out: np.ndarray, draws: np.ndarray, mean: np.float32, std: np.float32) -> None:
    """out (16 n,) = normals of as many 32-bit draws."""
    uniform = (draws & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
    u1, u2 = uniform.reshape(-1, 2, 8).swapaxes(0, 1)  # (groups, 8) each
    rho, cos, sin = _box_muller(np.float32(1) - u1, u2)
    out = out.reshape(-1, 2, 8)
    out[:, 0] = rho * cos * std + mean
    out[:, 1] = rho * sin * std + mean


def _normal_small(out: np.ndarray, mean: np.float32, std: np.float32, mt: MT19937) -> None:
    """out, fewer than 16 elements, = normals of pairs of 53-bit uniforms."""
    high, low = mt.random_u32s(4 * ((out.size + 1) // 2)).astype(np.uint64).reshape(-1, 2).T
    uniform = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) * 2.0**-53
    u1, u2 = uniform.astype(np.float32).reshape(-1, 2).T
    rho, cos, sin = _box_muller(np.float32(1) - u2, u1)
    out[0::2] = rho * cos * std + mean
    out[1::2] = ((rho * sin).astype(np.float64) * std + mean)[: out.size // 2]  # llm.c keeps these as double


def _box_muller(u1: np.ndarray, u2: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """sqrt(-2 ln(u1 + 1e-12)), cos(2 pi u2), sin(2 pi u2), each rounded to float32 where llm.c rounds."""
    rho = np.sqrt(np.float32(-2) * _logf(u1 + LOG_EPSILON))
    cos, sin = _cosf_sinf((2 * np.pi * u2.astype(np.float64)).astype(np.float32))
    return rho, cos, sin


# ----------------------------------------------------------------------------
# logf, cosf, sinf: float32 in and out, float64 inside

# logf: x = 2^k z with z in [0.699, 1.398). This range is cut into 16 pieces; piece i has a centre c, |z/c - 1| < 1/32.
# ln x = k ln 2 + ln c + r - r^2 (1/2 - r/3 + r^2/4), r = z/c - 1. The piece that holds 1 has c = 1: it is exact there.
LOG_FIRST = 0x3F330000  # bits of the lowest z
LOG_START = np.arange(LOG_FIRST, LOG_FIRST + (1 << 23), 1 << 19).astype(np.uint32)  # bits of the lowest z of a piece
LOG_CENTRE = (LOG_START.view(np.float32).astype(np.float64) + (LOG_START + 0x7FFFF).view(np.float32)) / 2
LOG_CENTRE[9] = 1.0
LOG_CENTRE[10] = 1 / float.fromhex("0x1.e608cfd9a47acp-1")
LOG_INVERSE, LOG_LOG = 1 / LOG_CENTRE, np.log(LOG_CENTRE)
LOG_A0, LOG_A1, LOG_A2 = map(float.fromhex, ("-0x1.00ea348b88334p-2", "0x1.5575b0be00b6ap-2", "-0x1.ffffef20a4123p-2"))
# sin r = r + s1 r^3 + s2 r^5 + s3 r^7 and cos r = 1 + c1 r^2 + c2 r^4 + c3 r^6 + c4 r^8 for |r| <= pi/4
S1, S2, S3 = map(float.fromhex, ("-0x1.555545995a603p-3", "0x1.1107605230bc4p-7", "-0x1.994eb3774cf24p-13"))
C1, C2, C3, C4 = map(
    float.fromhex,
    ("-0x1.ffffffd0c621cp-2", "0x1.55553e1068f19p-5", "-0x1.6c087e89a359dp-10", "0x1.99343027bf8c3p-16"),
)


def _logf(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of normal positive float32 numbers."""
    bits = x.view(np.int32)
    offset = bits - LOG_FIRST
    z = (bits - (offset & -(1 << 23))).view(np.float32).astype(np.float64)
    piece = offset >> 19 & 15
    r = z * LOG_INVERSE.take(piece) - 1
    r2 = r * r
    y = (offset >> 23) * np.log(2.0) + LOG_LOG.take(piece) + r
    return ((LOG_A0 * r2 + (LOG_A1 * r + LOG_A2)) * r2 + y).astype(np.float32)


def _cosf_sinf(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of float32 angles in 0 .. 100: theta = n pi/2 + r, and the quadrant n says which is which."""
    x = theta.astype(np.float64)
    n = np.rint(x * (2 / np.pi))
    r = x - n * (np.pi / 2)
    n = n.astype(np.int32)
    r2 = r * r
    r4 = r2 * r2
    sin = r + r * r2 * S1 + r * r4 * (S2 + r2 * S3)
    cos = 1 + r2 * C1 + r4 * C2 + r4 * r2 * (C3 + r2 * C4)
    # Sine and cosine change places where n is odd; then the signs follow. The places change by an exclusive or of the
    # bits, as np.where and ufuncs with where= take ten times as long.
    sin_bits, cos_bits = sin.view(np.int64), cos.view(np.int64)
    swapped = (sin_bits ^ cos_bits) & -(n & 1).astype(np.int64)
    sin, cos = (sin_bits ^ swapped).view(np.float64), (cos_bits ^ swapped).view(np.float64)
    return (cos * (1 - (n + 1 & 2))).astype(np.float32), (sin * (1 - (n & 2))).astype(np.float32)


# ----------------------------------------------------------------------------
# xorshift64*


def random_u32(state: int) -> tuple[int, int]:
    """One xorshift64* step of a 64-bit state: (32-bit value, next state)."""
    state ^= state >> 12
    state ^= state << 25 & 0xFFFFFFFFFFFFFFFF
    state ^= state >> 27
    return (state * 0x2545F4914F6CDD1D & 0xFFFFFFFFFFFFFFFF) >> 32, state


def random_f32(state: int) -> tuple[float, int]:
    """A float in [0, 1), exact in float32, from one xorshift64* step: (value, next state)."""
    value, state = random_u32(state)
    return (value >> 8) / 16777216.0, state
