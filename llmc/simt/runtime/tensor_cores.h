// Tensor cores. Layouts: PTX ISA, "Warp-level matrix instructions". g = lane / 4, t = lane % 4.

static float bf16_value(u32 h) {
    u32 x = h << 16;
    float f;
    memcpy(&f, &x, 4);
    return f;
}
static float f16_value(u32 h) {
    u32 sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 0x3ffu, x;
    if (exponent == 31u) {
        x = sign | 0x7f800000u | mantissa << 13;
    } else if (exponent) {
        x = sign | (exponent + 112u) << 23 | mantissa << 13;
    } else {  // subnormal: mantissa * 2^-24
        float f = (float)mantissa * 5.9604644775390625e-8f;
        return sign ? -f : f;
    }
    float f;
    memcpy(&f, &x, 4);
    return f;
}
static float tf32_value(u32 x) {
    x &= 0xffffe000u;  // the hardware ignores the low 13 bits
    float f;
    memcpy(&f, &x, 4);
    return f;
}

extern "C" void simt_mma(int shape, float* d, const u32* a, const u32* b, const float* c, At at) {
    self->operand = shape;
    self->pointers[0] = d, self->pointers[1] = (void*)a, self->pointers[2] = (void*)b, self->pointers[3] = (void*)c;
    gather(MMA, ~0u, 32, at);
}

static void finish_mma(Fiber* lanes) {
    int shape = lanes[0].operand, k = shape == MMA_16816_BF16 || shape == MMA_16816_F16 ? 16 : 8;
    float A[16][16], B[16][8], D[16][8];
    for (u32 lane = 0; lane < 32; ++lane) {
        Fiber& f = lanes[lane];
        if (f.operand != shape) {
            report("divergent warp", &f, f.at, "lanes 0 and %u of warp %u call different mma shapes", lane, f.warp);
            return;
        }
        const u32 *a = (const u32*)f.pointers[1], *b = (const u32*)f.pointers[2];
        const float* c = (const float*)f.pointers[3];
        u32 g = lane / 4, t = lane % 4;
        if (shape == MMA_1688_TF32) {
            for (u32 i = 0; i < 4; ++i) { A[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32_value(a[i]); }
            for (u32 i = 0; i < 2; ++i) { B[t + 4 * i][g] = tf32_value(b[i]); }
        } else {
            auto value = shape == MMA_16816_BF16 ? bf16_value : f16_value;
            for (u32 i = 0; i < (u32)k / 4; ++i) {  // a register holds two neighbouring columns
                for (u32 half = 0; half < 2; ++half) {
                    A[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = value(a[i] >> 16 * half & 0xffffu);
                }
            }
            for (u32 i = 0; i < (u32)k / 8; ++i) {
                for (u32 half = 0; half < 2; ++half) {
                    B[2 * t + 8 * i + half][g] = value(b[i] >> 16 * half & 0xffffu);
                }
            }
        }
        for (u32 i = 0; i < 4; ++i) { D[g + 8 * (i / 2)][2 * t + i % 2] = c[i]; }
    }
    for (int m = 0; m < 16; ++m) {
        for (int kk = 0; kk < k; ++kk) {
            for (int n = 0; n < 8; ++n) { D[m][n] += A[m][kk] * B[kk][n]; }
        }
    }
    for (u32 lane = 0; lane < 32; ++lane) {
        float* d = (float*)lanes[lane].pointers[0];
        for (u32 i = 0; i < 4; ++i) { d[i] = D[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]; }
    }
}

static void check_shared(void* p, void* pc) {
    if ((size_t)((char*)p - memory) >= ARENA) {
        fail_at("out of bounds", (uintptr_t)p, pc, "shared-memory access to", "");
    }
}

static void generic_read(const void* row, void* pc);

extern "C" void simt_ldmatrix(u32* r, const void* row, int matrices, int transposed, At at) {
    if (launch.hopper && (int)self->lane < 8 * matrices) { generic_read(row, RETURN_ADDRESS); }
    self->operand = matrices * 2 + transposed;
    self->pointers[0] = r, self->pointers[1] = (void*)row, self->pc = RETURN_ADDRESS;
    gather(LDMATRIX, ~0u, 32, at);
}

static void finish_ldmatrix(Fiber* lanes) {
    int matrices = lanes[0].operand / 2, transposed = lanes[0].operand % 2;
    for (u32 lane = 0; lane < 32; ++lane) {
        Fiber& f = lanes[lane];
        if (f.operand != lanes[0].operand) {
            report("divergent warp", &f, f.at, "lanes 0 and %u of warp %u call different ldmatrix forms", lane, f.warp);
            return;
        }
    }
    if (launch.checked) {
        Fiber* running = self;
        for (int lane = 0; lane < 8 * matrices; ++lane) {
            become(&lanes[lane]);
            check_shared(lanes[lane].pointers[1], lanes[lane].pc);
            hook<16, false>(lanes[lane].pointers[1], lanes[lane].pc);
        }
        become(running);
    }
    if (launch.followed) {  // each lane reads what it gets
        Fiber* running = self;
        for (u32 lane = 0; lane < 32; ++lane) {
            become(&lanes[lane]);
            u32 g = lane / 4, t = lane % 4, pc = (u32)((uintptr_t)lanes[lane].pc - image_begin);
            for (int i = 0; i < matrices; ++i) {
                for (u32 half = 0; half < 2; ++half) {
                    u32 row = transposed ? 2 * t + half : g, column = transposed ? g : 2 * t + half;
                    size_t offset = (char*)lanes[8 * i + row].pointers[1] - memory + 2 * column;
                    follow_shared(offset, 2, false, pc);
                    self->matrix_reads.push_back((u32)offset);
                }
            }
        }
        become(running);
    }
    for (int i = 0; i < matrices; ++i) {
        uint16_t M[8][8];
        for (int row = 0; row < 8; ++row) { memcpy(M[row], lanes[8 * i + row].pointers[1], 16); }
        for (u32 lane = 0; lane < 32; ++lane) {
            u32 g = lane / 4, t = lane % 4;
            u32 low = transposed ? M[2 * t][g] : M[g][2 * t], high = transposed ? M[2 * t + 1][g] : M[g][2 * t + 1];
            ((u32*)lanes[lane].pointers[0])[i] = low | high << 16;
        }
    }
}
