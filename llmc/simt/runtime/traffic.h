// Traffic: the accesses of a warp's lanes through one instruction, grouped by how often each lane has come there.
struct Request {
    int array;
    u32 lanes, offset[32];
};
struct Stream {
    int size, write;
    u32 count[32];
    std::vector<Request> requests;
};
static std::unordered_map<u64, Stream> streams;  // of the running block, by instruction and warp
static std::unordered_map<u64, Traffic> traffic;

static void count_access(size_t offset, int size, bool write, void* pc) {
    Stream& s = streams[(((uintptr_t)pc - image_begin) << 1 | write) << 5 | me / 32];  // cp.async reads and writes
    u32 n = s.count[me % 32]++;
    s.size = size, s.write = write;
    if (n >= s.requests.size()) {
        s.requests.resize(n + 1);
        int array = offset < ARENA ? -1 : 0;  // the region is the same for all lanes, but for an access out of bounds
        uintptr_t a = (uintptr_t)memory + offset;
        while (offset >= ARENA && array < launch.region_count - 1 &&
               !(launch.regions[array].begin <= a && a < launch.regions[array].end)) {
            ++array;
        }
        s.requests[n].array = array;
    }
    s.requests[n].lanes |= 1u << me % 32;
    s.requests[n].offset[me % 32] = (u32)offset;
}

static size_t distinct(u32* values, size_t n) {
    std::sort(values, values + n);
    return std::unique(values, values + n) - values;
}

// What the block's requests cost. Global: distinct 32-byte sectors. Shared: 32 banks of 4 bytes, one word each at a
// time; a request of 8 or 16 bytes per lane is served in 2 or 4 parts of 16 or 8 lanes.
static void count_block() {
    for (auto& entry : streams) {
        const Stream& s = entry.second;
        for (const Request& r : s.requests) {
            bool shared = r.array < 0;
            Traffic& t = traffic[(entry.first >> 5) * 64 + (r.array + 1)];
            t.pc = entry.first >> 6, t.write = s.write, t.array = r.array;
            u64 bytes = (u64)__builtin_popcount(r.lanes) * s.size;
            t.requests += 1, t.bytes += bytes;
            u32 part = shared && s.size > 4 ? 128 / s.size : 32;
            for (u32 begin = 0; begin < 32; begin += part) {
                u32 words[32], bank_words[32], n = 0, worst = 0;
                for (u32 lane = begin; lane < begin + part; ++lane) {
                    if (r.lanes >> lane & 1u) { words[n++] = r.offset[lane] / (shared ? 4 : 32); }
                }
                if (n == 0) { continue; }
                if (!shared) {
                    t.units += distinct(words, n), t.ideal += (bytes + 31) / 32;
                    continue;
                }
                for (u32 bank = 0; bank < 32; ++bank) {
                    u32 m = 0;
                    for (u32 i = 0; i < n; ++i) {
                        for (u32 w = 0; w < (s.size > 4 ? (u32)s.size / 4 : 1u); ++w) {
                            if ((words[i] + w) % 32 == bank) { bank_words[m++] = words[i] + w; }
                        }
                    }
                    worst = std::max(worst, (u32)distinct(bank_words, m));
                }
                t.units += worst, t.ideal += 1;
            }
        }
    }
    streams.clear();
}

extern "C" int simt_traffic(Traffic* out, int capacity) {
    int n = 0;
    for (auto& entry : traffic) {
        if (n < capacity) { out[n] = entry.second; }
        ++n;
    }
    return n;
}
