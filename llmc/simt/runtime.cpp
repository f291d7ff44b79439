// Runs one kernel launch on the CPU. A block's threads are fibers of one OS thread: each runs until it waits at a
// barrier or a warp function, and the last one to arrive releases the others. Blocks run one after another.
//
// In checked mode the kernel was compiled with -fsanitize=thread and -fsanitize=undefined, but without their libraries:
// g++ emits a call before every load and store (__tsan_read4, __tsan_write16 ...) and at every undefined operation
// (__ubsan_handle_...), and this file defines them.
//
// This file has what the parts share; the parts, in runtime/, are one after the other the same translation unit.
#include <algorithm>
#include <array>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <dlfcn.h>
#include <link.h>
#include <set>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <unordered_map>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define FAST_SWITCH  // otherwise fibers are ucontexts, which is slow but portable
#endif

typedef uint32_t u32;
typedef uint64_t u64;
#define RETURN_ADDRESS __builtin_return_address(0)
#define unlikely(x) __builtin_expect(!!(x), 0)

struct At {
    const char* file;
    int line;
};
struct uint3 {
    u32 x, y, z;
};

// Exchanged with the Python layer. Keep in step with the ctypes structures in launch.py.
struct Access {  // one of the two sides of a race
    u32 time, tid;
    int write;
    u64 granule;
};
struct Fault {
    char kind[40];
    char text[1000];
    char file[400];  // source position, if known without addr2line
    int line;
    int has_thread;
    u32 block[3], thread[3];
    u64 pc;  // otherwise: the hook's return address, relative to the kernel library
    char array[80];
    long long index;  // element of `array`, -1 if unknown
    Access other;     // of a race: what to watch for in a second run to find its line
    u64 other_pc;     // filled by that run
};
struct Region {      // one array argument
    u64 begin, end;  // addresses
    char name[64];
    int item_size;
    int read_only;
};
struct Launch {
    void (*entry)(void**);
    void** args;
    u32 grid[3], block[3];
    u64 dynamic_bytes, dynamic_align, declared_bytes;  // declared: kernel(..., smem=)
    int order;  // 0 forward, 1 reverse, 2 random
    u32 seed;
    int late;  // Hopper's units do their work as late as the waits allow, not at once
    int checked;
    int hopper;       // a kernel for sm_90a
    int followed;     // its accesses are checked (ordered.h)
    double timeout;   // seconds of CPU time
    double patience;  // the same, without progress
    int counting;    // count traffic
    int watching;
    Access watched;
    const Region* regions;
    int region_count;
};

struct Traffic {  // of one instruction on one array, all warps and blocks together
    u64 pc;
    int write, array;  // array: number of the region, -1 for shared memory
    u64 requests, bytes, units, ideal;  // units: 32-byte sectors of global, wavefronts of shared memory
};

static const size_t MAX_THREADS = 1024, STACK = 128 * 1024, SHARED_LIMIT = 227 * 1024, STATIC_LIMIT = 48 * 1024;

// All memory a kernel may touch: the block's shared memory first, then copies of the launch's arrays with gaps between.
static const size_t ARENA = 1 << 20, STATICS = 1 << 19, MEMORY = (size_t)8 << 30;
static char* memory;

#include "runtime/fibers.h"
#include "runtime/faults.h"
#include "runtime/shadow.h"
#include "runtime/traffic.h"
#include "runtime/ordered.h"
#include "runtime/accesses.h"
#include "runtime/hooks.h"
#include "runtime/warp.h"
#include "runtime/tensor_cores.h"
#include "runtime/async_copies.h"
#include "runtime/hopper.h"
#include "runtime/shared.h"
#include "runtime/launch.h"
