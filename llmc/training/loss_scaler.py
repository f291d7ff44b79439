"""Dynamic loss scaling for fp16: by how much the gradients are multiplied so that they neither vanish nor overflow.

fp16 holds magnitudes from 6e-8 to 65504. Most gradients of a loss averaged over many tokens are smaller. Therefore the
loss is multiplied by a power of two, and AdamW divides by it again in fp32 (llmc/model.py loss_scale). This changes the
bits only of gradients that fp16 could not hold otherwise. Source: Micikevicius et al. 2018, arXiv:1710.03740, section
3.2; the constants are those of torch.amp.GradScaler.
"""

from typing import Any

from llmc.files import parse

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000


class LossScaler:
    """The scale, halved for each overflow and doubled after GROWTH_INTERVAL steps in a row without one.

    A step that overflowed is done again with half the scale, on the same batch and with the same random numbers, until
    it fits. The weights and everything else go on as if the scale had been right from the start. (GradScaler drops the
    batch instead.) A scale of 1 is not halved: gradients that overflow there are themselves not finite.
    """

    def __init__(self, scale: float = INITIAL_SCALE) -> None:
        self.scale, self.good_steps = scale, 0

    def overflow(self) -> bool:
        """Halve the scale; False where it is 1 already."""
        if self.scale <= 1.0:
            return False
        self.scale, self.good_steps = self.scale / 2, 0
        return True

    def good_step(self) -> None:
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = self.scale * 2, 0

    def state(self) -> dict[str, Any]:
        """Everything as a dict that JSON can hold exactly."""
        return dict(scale=self.scale, good_steps=self.good_steps)

    def load_state(self, state: dict[str, Any] | None, what: str = "the state") -> None:
        """Continue from state(); None, as of a checkpoint of another precision, starts afresh. Errors: UserError."""
        if state is None:
            return
        found = parse.dictionary(state, what)
        self.scale = parse.number(found.get("scale"), f"{what}.scale", 1.0, 2.0**127)
        self.good_steps = parse.integer(found.get("good_steps"), f"{what}.good_steps", 0, GROWTH_INTERVAL - 1)
