"""llmc/buffers.py: tables, the flat buffer and its views, against offsets that are worked out here by hand."""

import re

import ml_dtypes
import numpy as np
import pytest

from llmc.buffers import TensorSpec, carve, dtypes, offsets, plan

SPECS = [
    TensorSpec("whole", (5, 3)),  # 15 elements
    TensorSpec("shared", (7,), "f32", 1),  # 7, one for all layers
    TensorSpec("each", (2, 3), "X", 4),  # 4 * 6
    TensorSpec("ids", (3,), "i32"),
    TensorSpec("seeds", (2,), "u32"),
]
LAYERS = 4


def flat(specs, dtype="float32", align=1):
    """A buffer of exactly the right size, full of garbage."""
    return np.full(offsets(specs, dtype, align)[1], 0xA5, np.uint8)


def address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize(
    "dtype, align, starts, total",
    [
        ("float32", 1, [0, 60, 88, 184, 196], 204),  # rows back to back: the layout of a checkpoint
        ("float32", 64, [0, 64, 128, 256, 320], 384),
        ("float32", 256, [0, 256, 512, 768, 1024], 1280),
        (ml_dtypes.bfloat16, 4, [0, 32, 60, 108, 120], 128),  # X takes two bytes, the others still four
        (np.float16, 256, [0, 256, 512, 768, 1024], 1280),
    ],
)
def test_offsets(dtype, align, starts, total):
    assert offsets(SPECS, dtype, align) == (starts, total)


def test_offsets_of_an_empty_table_and_of_rows_without_elements():
    assert offsets([], "float32", 256) == ([], 0)
    nothing = [TensorSpec("a", (0,), "i32"), TensorSpec("b", (3,)), TensorSpec("c", (0, 4))]
    assert offsets(nothing, "float32", 16) == ([0, 0, 16], 16)


def test_sizes():
    assert [spec.size for spec in SPECS] == [15, 7, 24, 3, 2]
    assert isinstance(TensorSpec("wte", (100000, 100000)).size, int)  # 10^10 elements do not wrap


def test_dtype_letters():
    letters = dtypes(np.float16)
    assert letters == {"X": np.float16, "f32": np.float32, "i32": np.int32, "u32": np.uint32, "i64": np.int64}
    assert dtypes(ml_dtypes.bfloat16)["X"].itemsize == 2


@pytest.mark.parametrize("align", [1, 256])
def test_views_are_the_flat_buffer(align):
    buffer = flat(SPECS, align=align)
    views = carve(buffer, SPECS, LAYERS, "float32", align)
    starts, _ = offsets(SPECS, "float32", align)
    shapes = {"whole": (5, 3), "shared": (1, 7), "each": (4, 2, 3), "ids": (3,), "seeds": (2,)}
    for i, (spec, start) in enumerate(zip(SPECS, starts, strict=True)):
        view = getattr(views, spec.name)
        assert view.shape == shapes[spec.name] and view.dtype == dtypes("float32")[spec.dtype]
        assert view.flags.c_contiguous and view.flags.writeable and view.flags.aligned
        assert address(view) == address(buffer) + start
        view[...] = i + 1
        inside = buffer[start : start + view.nbytes].view(view.dtype)  # written through the view, read from the buffer
        assert (inside == i + 1).all()
        buffer[start : start + view.nbytes] = 0
        assert not view.any()
        buffer[start : start + view.nbytes] = 0xA5
    assert (buffer == 0xA5).all()  # nothing outside its own bytes was written


def test_rows_do_not_overlap():
    buffer = flat(SPECS, align=256)
    views = carve(buffer, SPECS, LAYERS, "float32", 256)
    for i, spec in enumerate(SPECS):
        getattr(views, spec.name)[...] = i
    for i, spec in enumerate(SPECS):
        assert (getattr(views, spec.name) == i).all(), spec.name


def test_layers():
    views = carve(flat(SPECS), SPECS, LAYERS, "float32")
    assert len(views.h) == LAYERS
    for layer, h in enumerate(views.h):
        assert sorted(vars(h)) == ["each", "shared"]  # a row of the whole model (layers 0) has no view in h
        assert h.each.shape == (2, 3) and h.shared.shape == (7,)
        assert address(h.each) == address(views.each) + layer * 6 * 4
        assert address(h.shared) == address(views.shared)  # layers 1: all layers share one
        h.each[...] = layer
        h.shared[...] = layer
    assert [views.each[i].ravel().tolist() for i in range(LAYERS)] == [[float(i)] * 6 for i in range(LAYERS)]
    assert (views.shared == LAYERS - 1).all()


def test_a_model_of_one_layer():
    specs = [TensorSpec("each", (2, 3), "X", 1)]
    views = carve(flat(specs), specs, 1, "float32")
    assert views.each.shape == (1, 2, 3) and views.h[0].each.shape == (2, 3)


def batch(B, T):
    return [TensorSpec("a", (B, T), "i32"), TensorSpec("b", (B, T, 5), "X", 3), TensorSpec("c", (B, T), "f32", 3)]


def test_a_smaller_batch_lives_in_the_same_memory():
    buffer = flat(batch(4, 9), align=256)
    for B, T in ((4, 9), (1, 9), (4, 1), (3, 7), (1, 1)):
        views = carve(buffer, batch(B, T), 3, "float32", 256)
        starts, total = offsets(batch(B, T), "float32", 256)
        assert total <= buffer.size
        for name, start in zip("abc", starts, strict=True):
            assert address(getattr(views, name)) == address(buffer) + start  # rows move: they are packed anew
        assert views.b.shape == (3, B, T, 5) and views.h[2].b.shape == (B, T, 5) and views.h[2].b.flags.c_contiguous


def test_a_larger_batch_does_not_fit():
    with pytest.raises(AssertionError):
        carve(flat(batch(4, 9), align=256), batch(5, 9), 3, "float32", 256)


@pytest.mark.parametrize("dtype, align", [("float32", 1), ("float32", 256), (ml_dtypes.bfloat16, 256)])
def test_plan_lines_sum_up(dtype, align):
    *rows, last = plan("my buffer", SPECS, dtype, align)
    assert len(rows) == len(SPECS)
    found = [re.fullmatch(r"  (\w+) +([\d x]+?) +(\w+) +([\d,]+) bytes", row).groups() for row in rows]
    names, shapes, kinds, nbytes = zip(*found, strict=True)
    assert names == ("whole", "shared", "each", "ids", "seeds")
    assert shapes == ("5 x 3", "1 x 7", "4 x 2 x 3", "3", "2")
    assert kinds == (np.dtype(dtype).name, "float32", np.dtype(dtype).name, "int32", "uint32")
    size = np.dtype(dtype).itemsize
    assert [int(n.replace(",", "")) for n in nbytes] == [15 * size, 28, 24 * size, 12, 8]
    title, total = re.fullmatch(r"  (my buffer) +([\d,]+) bytes", last).groups()
    total = int(total.replace(",", ""))
    assert total == offsets(SPECS, dtype, align)[1]
    padding = total - (39 * size + 48)
    assert padding == 0 if align == 1 else 0 <= padding < len(SPECS) * align
    assert len({len(line) for line in [*rows, last]}) == 1  # one column of numbers
