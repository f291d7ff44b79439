"""The validation loss of a model, in the training loop and in llmc.evaluate."""

from llmc.parallel.communicators import total


def validate(model, loader, batches, inputs, targets):
    """Mean loss in nats over the first batches of the validation data, on all ranks.

    inputs, targets (B, T) i32 are written (=) with each batch. Of the batches each rank does every P-th.
    """
    loader.reset()
    loss = 0.0
    for _ in range(model.rank, batches, model.num_ranks):
        loader.next_batch(inputs, targets)
        loss += model.validate(inputs, targets)
    return total(model.ranks, loss) / batches
