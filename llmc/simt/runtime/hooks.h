// What g++ calls: -fsanitize=thread before every load and store, -fsanitize=undefined at undefined operations.

extern "C" {
#define HOOKS(N)                                                                        \
    void __tsan_read##N(void* p) { hook<N, false>(p, RETURN_ADDRESS); }                 \
    void __tsan_write##N(void* p) { hook<N, true>(p, RETURN_ADDRESS); }                 \
    void __tsan_unaligned_read##N(void* p) { hook_range(p, N, false, RETURN_ADDRESS); } \
    void __tsan_unaligned_write##N(void* p) { hook_range(p, N, true, RETURN_ADDRESS); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16) void __tsan_read_range(void* p, size_t size) {
    hook_range(p, size, false, RETURN_ADDRESS);
}
void __tsan_write_range(void* p, size_t size) { hook_range(p, size, true, RETURN_ADDRESS); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// Calls that g++ did not expand; the kernel library is linked with --wrap.
void* __wrap_memcpy(void* to, const void* from, size_t size) {
    hook_range(from, size, false, RETURN_ADDRESS);
    hook_range(to, size, true, RETURN_ADDRESS);
    return memcpy(to, from, size);
}
void* __wrap_memmove(void* to, const void* from, size_t size) {
    hook_range(from, size, false, RETURN_ADDRESS);
    hook_range(to, size, true, RETURN_ADDRESS);
    return memmove(to, from, size);
}
void* __wrap_memset(void* to, int value, size_t size) {
    hook_range(to, size, true, RETURN_ADDRESS);
    return memset(to, value, size);
}

// Undefined behaviour. The layouts are those of g++'s -fsanitize=undefined; every record starts with the position.
struct UbLocation {
    const char* file;
    u32 line, column;
};
struct UbType {
    uint16_t kind, info;
    char name[1];
};
struct UbRecord {
    UbLocation at;
    const UbType *type, *other;
};
struct UbMismatch {
    UbLocation at;
    const UbType* type;
    unsigned char log_alignment, check;
};

static const char* ub_value(const UbType* type, u64 value) {
    static char text[2][40];
    static int next;
    char* out = text[next++ & 1];
    int bits = 1 << (type->info >> 1);
    if (type->info & 1) {
        snprintf(out, 40, "%lld", bits >= 64 ? (long long)value : (long long)(value << (64 - bits)) >> (64 - bits));
    } else {
        snprintf(out, 40, "%llu", (unsigned long long)value);
    }
    return out;
}
static const char UB[] = "undefined behaviour";
#define UB_BINARY(operation, sign)                                                                     \
    void __ubsan_handle_##operation##_overflow_abort(UbRecord* r, u64 a, u64 b) {                      \
        fail(UB, At{r->at.file, (int)r->at.line}, "%s %s %s overflows %s", ub_value(r->type, a), sign, \
             ub_value(r->type, b), r->type->name);                                                     \
    }
UB_BINARY(add, "+")
UB_BINARY(sub, "-") UB_BINARY(mul, "*")
    UB_BINARY(divrem, "/ or %") void __ubsan_handle_negate_overflow_abort(UbRecord* r, u64 a) {
    fail(UB, At{r->at.file, (int)r->at.line}, "-(%s) overflows %s", ub_value(r->type, a), r->type->name);
}
void __ubsan_handle_shift_out_of_bounds_abort(UbRecord* r, u64 a, u64 b) {
    fail(UB, At{r->at.file, (int)r->at.line}, "shift of %s (%s) by %s", ub_value(r->type, a), r->type->name,
         ub_value(r->other, b));
}
void __ubsan_handle_out_of_bounds_abort(UbRecord* r, u64 index) {
    fail("out of bounds, array", At{r->at.file, (int)r->at.line}, "index %s of an array %s", ub_value(r->other, index),
         r->type->name);
}
void __ubsan_handle_type_mismatch_v1_abort(UbMismatch* r, uintptr_t a) {
    At at{r->at.file, (int)r->at.line};
    char array[80] = "";
    long long index = -1;
    const char* where = describe_address(a, array, &index);
    if (a & (((uintptr_t)1 << r->log_alignment) - 1)) {
        report("misaligned access", self, at, "access as %s, which needs %u-byte alignment, to %s", r->type->name,
               1u << r->log_alignment, where);
    } else {
        report("out of bounds", self, at, "access as %s to %s", r->type->name, where);
    }
    memcpy(fault.array, array, sizeof array);
    fault.index = index;
    leave();
}
#define UB_PLAIN(name, text) \
    void __ubsan_handle_##name(UbRecord* r) { fail(UB, At{r->at.file, (int)r->at.line}, text); }
UB_PLAIN(builtin_unreachable, "unreachable code is reached")
UB_PLAIN(missing_return, "a function that has a result ends without return")
UB_PLAIN(vla_bound_not_positive_abort, "array of no positive size")
UB_PLAIN(invalid_builtin_abort, "count of leading or trailing zeros of 0")
UB_PLAIN(load_invalid_value_abort, "a bool or enum holds an invalid value")
UB_PLAIN(float_cast_overflow_abort, "float to integer conversion out of range")

// An index of an array of class type, or of a pack of kernels/common.cuh.
void simt_bad_index(long long index, u64 size) {
    report("out of bounds, array", self, At{}, "index %lld of an array of %llu", index, (unsigned long long)size);
    fault.pc = (uintptr_t)RETURN_ADDRESS - image_begin;
    leave();
}
}  // extern "C"
