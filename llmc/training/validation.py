"""The validation loss of a model, in the training loop and in llmc.evaluate."""

from typing import Any

import numpy as np

from llmc.data.loader import EveryPair
from llmc.parallel.communicators import total


def validate(model: Any, pairs: EveryPair) -> float:
    """Mean loss in nats over every (input, target) pair of a set, each counted once; the same on all ranks.

    pairs: this rank's share of the set. No batch of it is larger than the model's B x T; some may be smaller.
    """
    loss = 0.0
    for inputs, targets in pairs:
        loss += float(model.token_losses(inputs, targets).sum(dtype=np.float64))
    return total(model.ranks, loss) / pairs.num_pairs
