// cp.async: the bytes are read at the call and land when the thread waits for their group

extern "C" void simt_cp_async(void* shared, const void* global, int pred, At) {
    Copy copy{shared, RETURN_ADDRESS, self->group, {}};
    if (launch.followed) {
        follow_shared((char*)shared - memory, 16, true, (u32)((uintptr_t)copy.pc - image_begin));
    }
    if (!launch.checked) {
        if (pred) { memcpy(copy.bytes, global, 16); }
        memcpy(shared, copy.bytes, 16);
        return;
    }
    if (pred) {
        hook<16, false>((void*)global, copy.pc);
        memcpy(copy.bytes, global, 16);
    }
    check_shared(shared, copy.pc);
    hook<16, true>(shared, copy.pc);
    size_t offset = (char*)shared - memory;
    fill(offset, offset + 16, IN_FLIGHT);
    self->copies.push_back(copy);
}

extern "C" void simt_cp_async_commit() { ++self->group; }

extern "C" void simt_cp_async_wait(int pending) {
    size_t kept = 0;
    for (const Copy& copy : self->copies) {
        if (copy.group >= self->group - pending) {
            self->copies[kept++] = copy;
            continue;
        }
        size_t offset = (char*)copy.to - memory;
        memcpy(copy.to, copy.bytes, 16);
        fill(offset, offset + 16, now << 12 | me);
        if (launch.watching) { watch(offset, 16, true, copy.pc); }
    }
    self->copies.resize(kept);
}
