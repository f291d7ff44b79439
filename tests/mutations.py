"""Damaged files for tests: seeded changes of the bytes of a good one, and what a command may do with them.

    for case, raw in mutations(good, seed=1, count=200):
        path.write_bytes(raw)
        assert_one_line(main, ["command", str(path)], capfd, case)

A command may take a changed file for a good one, as no format here has a checksum over all of it; but when it does not,
it says so in one line with a hint and exit code 2. A traceback is never right.
"""

import random
import struct

# numbers that go wrong where they are taken for sizes, counts or ids
WORDS = [0, 1, -1, 2, 255, 256, 257, 65535, 65536, 2**31 - 1, -(2**31), 2**30, 10**9, 20240520, 0x7F800000, 0x7FC00000]
TEXTS = [
    b"[" * 5000, b'{"a":' * 2000, b"9" * 5000, b"1e999", b"-1e999", b"NaN", b"-1", b"null", b"true", b'""', b"[]",
    b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\x00", b"\x1b[2J", b'"', b"\\", b"\n", b",", b"1" * 400, b"0.5", b"{}",
]  # fmt: skip


def mutated(good, rng):
    """(what was done, the bytes): one to three changes of `good`."""
    raw, done = bytearray(good), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.choice(("bit", "byte", "word", "word", "cut", "cut", "repeat", "remove", "insert", "text", "swap"))
        at = rng.randrange(len(raw)) if raw else 0
        if rng.random() < 0.5:
            at = min(at, rng.randrange(64))  # where a header is
        size = rng.choice((1, 2, 4, 7, 64, 1024))
        if kind == "bit" and raw:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == "byte" and raw:
            raw[at] = rng.randrange(256)
        elif kind == "word":
            struct_at = at // 4 * 4
            raw[struct_at : struct_at + 4] = struct.pack("<i", rng.choice(WORDS))
        elif kind == "cut":
            del raw[at:]
        elif kind == "repeat":
            raw[at:at] = raw[at : at + size] * rng.choice((1, 3, 50))
        elif kind == "remove":
            del raw[at : at + size]
        elif kind == "insert":
            raw[at:at] = rng.randbytes(size)
        elif kind == "text":
            raw[at : at + rng.choice((0, 1, size))] = rng.choice(TEXTS)
        elif kind == "swap":
            raw[at : at + size], raw[:size] = raw[:size], raw[at : at + size]
        done.append(f"{kind} at {at}, {size}")
    return "; ".join(done), bytes(raw)


def mutations(good, seed, count):
    """Yield `count` times what mutated() returns; each can be made again from its seed, which is in its name."""
    for number in range(count):
        done, raw = mutated(good, random.Random(f"{seed} {number}"))
        yield f"seed {seed}, number {number}: {done}", raw


def assert_one_line(main, argv, capfd, case):
    """Run a command: it ends with 0, or with 2 and a line on stderr that has a hint and no control characters.

    Returns the exit code.
    """
    capfd.readouterr()
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as error:  # of argparse
        code = error.code
    except Exception as error:
        raise AssertionError(f"{case}: a traceback, {type(error).__name__}: {error}") from error
    err = capfd.readouterr().err
    assert code in (0, 2), f"{case}: exit code {code}, {err}"
    if code == 2:
        assert err.count("\n") == 1 and err.endswith("\n") and "HINT: " in err, f"{case}: {err!r}"
        assert err[:-1].isprintable(), f"{case}: {err!r}"
        assert len(err) < 1000, f"{case}: a line of {len(err)} characters, {err[:200]!r}"
    return code
