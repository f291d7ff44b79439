"""What llm.c's kernels get wrong (train_gpt2.cu and llmc/*.cuh at f1e2ace), each with a test that ours get it right.

The tests run on every op set, with every rung that production can choose. The checks are those of the op's test file.
"""

import pytest
import reference as ref
import test_attention
import test_fused_classifier
import test_layernorm
import test_matmul
from test_gpt2_cuda import CONFIG, SETS, B, T, batches, build, to_host

SMALL_VOCABULARIES = [(2, 3, 1, 128), (1, 5, 3, 128), (1, 3, 65, 128), (1, 2, 257, 384), (1, 2, 1023, 1024)]


@pytest.mark.full
@pytest.mark.op("matmul_backward", public=True, shapes=[(1, 3, 8, 8456)], big=[(2, 33, 40, 8456)])
def test_bias_gradient_accumulates_at_many_output_channels(op, shape):
    """Above 8448 output channels (H100) llm.c's bias kernel has one block a column and overwrites instead of adding:
    of several micro-steps only the last one counts."""
    test_matmul.check_backward(op, shape, calls=3)


@pytest.mark.op("fused_classifier", public=True, shapes=SMALL_VOCABULARIES)
def test_classifier_with_a_small_vocabulary(op, shape):
    """Below 1024 vectors of logits llm.c's loop for the maximum wraps around zero, and with V no multiple of the vector
    width its tail loop lets several threads write one logit."""
    test_fused_classifier.check(op, shape)


@pytest.mark.op("layernorm_backward", public=True, shapes=[(1, 2, 4104)], big=[(1, 33, 5120), (1, 5, 12288)])
def test_layernorm_backward_above_4096_channels(op, shape):
    """llm.c's kernel needs 8 C + 15,360 bytes of shared memory and never asks for more than 48 KiB."""
    test_layernorm.check_backward(op, shape)


@pytest.mark.op("attention_forward", public=True, shapes=[(2, t, 2, 16) for t in (1, 2, 3, 5)])
def test_attention_forward_at_small_T(op, shape):
    """llm.c needs T % 4 == 0 without cuDNN, and its samples a multiple of 256."""
    test_attention.check_forward(op, shape)


@pytest.mark.op("attention_backward", public=True, shapes=[(2, t, 2, 16) for t in (1, 2, 3, 5)])
def test_attention_backward_at_small_T(op, shape):
    test_attention.check_backward(op, shape)


@pytest.mark.op("attention_backward", public=True, shapes=[(1, 70, 1, 64)])
def test_softmax_backward_has_no_reduction_hazard(op, shape):
    """llm.c's softmax backward calls a block reduction for four rows in turn without the barrier that keeps the next
    from overwriting the sums of the last. The executor reports such a race; on a GPU repeated calls give the same bits.
    """
    test_attention.check_backward(op, shape)


@pytest.mark.op("fused_residual_forward", public=True, shapes=[(1, 1, 8), (1, 7, 24), (3, 5, 40)])
def test_fused_residual_stays_in_bounds_when_rows_are_few(op, shape):
    """llm.c's guard is idx > N where it has to be idx >= N: one row too many unless B*T is a multiple of 8. On the
    executor an access outside an array is a fault."""
    test_layernorm.test_fused_residual_forward(op, shape)


@SETS
def test_validation_does_not_write_dlogits(ops):
    """llm.c's constant named False is true: its validation overwrites the logits with their gradient."""
    model, ((x, y),) = build(ops, "bf16"), batches(CONFIG, B, T, 1)
    logits = to_host(model.forward(x).output).copy()
    loss = model.validate(x, y)
    ref.assert_bits("validate", "logits", to_host(model.acts.output), logits)
    model.forward(x)
    model.backward(x, y)
    assert model.mean_loss() == loss
    assert (to_host(model.acts.output) != logits).any()  # training does write them
