"""The public API, for scripts and notebooks: what `import llmc` shows, and what the commands use themselves.

    import llmc
    ops = llmc.device("auto")                                  # the op set: CUDA kernels, or NumPy and BLAS
    data = llmc.DataLoader(llmc.dataset("shakespeare", "bytes"), B=12, T=96)
    model = llmc.GPT2("tiny:d4", ops, B=12, T=96, vocab_size=257)
    adamw = llmc.AdamW(lr=3e-3, weight_decay=0.1)              # numbers, no state
    for x, y in data.batches(200):
        loss = model.step(x, y, adamw)
    model.grads.h[0].qkvw, model.acts.h[3].atty                # every tensor by name, as arrays of the op set
    model.save("runs/nb")
    llmc.load("runs/nb").generate("ROMEO:")

A model is llmc.model.Model over the passes of llmc/gpt2.py. Here it gets what needs files and tokenizers.
"""

import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from llmc import gpt2, loading
from llmc.data import tokenizer as tokenizers
from llmc.data.loader import DataLoader
from llmc.data.prepare import dataset
from llmc.devices import check_dtype, model_dtype, pick_device, prepare_kernels
from llmc.errors import UserError
from llmc.files import checkpoints
from llmc.generation import generate, start_tokens
from llmc.gpt2 import GPT2Config
from llmc.model import AdamW, Model, memory_plan
from llmc.training import checkpointing

__all__ = ["AdamW", "DataLoader", "GPT2", "GPT2Config", "UserError", "dataset", "device", "load"]


def device(name: str = "auto", threads: int | None = None) -> ModuleType:
    """The op set for a device: the module llmc.cuda or llmc.cpu, whose ops take arrays that its `device` allocates.

    name: "auto" takes a GPU where a kernel can be launched, else the CPU; "cpu" or "cuda" asks for one.
    threads: of the CPU op set; None leaves them.
    Errors: UserError where "cuda" does not work.
    """
    return pick_device(name, threads)[0]


def is_cuda(ops: ModuleType) -> bool:
    """Whether the op set is the one of CUDA kernels."""
    return ops.__name__ == "llmc.cuda"


def precision_on(ops: ModuleType, dtype: str | None) -> Any:
    """NumPy's dtype for "fp32", "bf16" or "fp16" on an op set; None takes what is usual there. Errors: UserError."""
    return model_dtype(check_dtype(dtype, "cuda" if is_cuda(ops) else "cpu"))


class GPT2(Model):
    """A GPT-2 with fresh weights: `forward`, `backward`, `update`, or all of them as `step`; `save`, `generate`.

    size     a descriptor, "d12" or "tiny:d4" (gpt2.DESCRIPTORS), or a GPT2Config
    ops      the op set, of llmc.device()
    B, T     rows and tokens of the largest batch; smaller ones use the same memory
    dtype    "fp32", "bf16", "fp16"; None: bf16 on a GPU, fp32 on a CPU
    seed     of the weights, the same bits as llm.c's for a seed; None leaves them as they are, for weights to come
    options  as llmc.model.Model has them: recompute, training, graphs, use_master_weights, grad_dtype
    Errors: UserError for a size, T or dtype that cannot be had; MemoryError where the device has no room.
    """

    def __init__(
        self,
        size: str | GPT2Config,
        ops: ModuleType,
        B: int,
        T: int,
        *,
        vocab_size: int = 50257,
        dtype: str | None = None,
        seed: int | None = 42,
        **options: Any,
    ):
        config = gpt2.config_from_descriptor(size, vocab_size, T) if isinstance(size, str) else size
        precision = precision_on(ops, dtype)
        if is_cuda(ops):
            prepare_kernels(config, precision, grad_dtype=options.get("grad_dtype"))
        super().__init__(gpt2, ops, config, B, T, dtype=precision, **options)
        if seed is not None:
            self.init_weights(seed)

    def save(self, folder: str | os.PathLike[str]) -> str:
        """Write llm.c's files of a checkpoint of this step into a folder -> the model's; `load` finds it there.

        Errors: UserError for a model without optimizer state, and where the folder cannot be written; what was there
        is then as it was.
        """
        folder = os.fspath(folder)
        if not self.training:
            raise UserError(f"save({folder!r}): this model has no optimizer state. HINT: load(..., training=True).")
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}. HINT: choose another one.") from error
        checkpointing.save(folder, self.steps, self)
        return checkpoints.model_path(folder, self.steps)

    def generate(
        self, prompt: str = "", tokens: int = 256, temperature: float = 0.8, top_k: int = 0, seed: int = 1337,
        tokenizer: str | None = None,
    ) -> str:  # fmt: skip
        """The text that continues a prompt. The arguments are those of `stream`, which gives it piece by piece."""
        return "".join(self.stream(prompt, tokens, temperature, top_k, seed, tokenizer))

    def stream(
        self, prompt: str = "", tokens: int = 256, temperature: float = 0.8, top_k: int = 0, seed: int = 1337,
        tokenizer: str | None = None,
    ) -> Iterator[str]:  # fmt: skip
        """An iterator over the text that continues a prompt, token by token; the same seed gives the same text.

        tokens: how many to draw. temperature: 0 is greedy, 1 the model's own distribution. top_k: draw from the k most
        likely tokens only, 0 from all. tokenizer: "gpt2" or "bytes"; None takes the one of the model's vocabulary.
        Errors: UserError where no tokenizer has the model's vocabulary.
        """
        words = tokenizers.tokenizer_for(self.config.vocab_size, tokenizer)
        ids = [*start_tokens(words), *(words.encode(prompt) if prompt else [])]
        return words.stream(generate(self, ids, tokens, seed, temperature, top_k, words.n_vocab))


def load(
    path: str | os.PathLike[str],
    ops: ModuleType | None = None,
    B: int = 1,
    T: int | None = None,
    *,
    dtype: str | None = None,
    training: bool = False,
    **options: Any,
) -> GPT2:
    """The model in a run's folder (its newest checkpoint), a .bin file, or Hugging Face's: "hf:DIR" or "hf:NAME".

    ops: None takes llmc.device("auto"). T: None takes the longest that the model has, at most 1024.
    training: False makes it for forward passes alone; with True it has gradients and an optimizer state of zeros.
    Errors: UserError for a file that cannot be read, and where the device has no room.
    """
    found = loading.model_file(os.fspath(path))
    config = gpt2.config_from_header(loading.model_header(found))
    ops, T = ops or device("auto"), T or min(config.max_seq_len, 1024)
    options = {"recompute": 1 if training else 2, "training": training, **options}
    sizes = memory_plan(gpt2, ops, config, B, T, dtype=precision_on(ops, dtype), **options)
    needed, budget = sum(nbytes for *_, nbytes in sizes) + ops.device.scratch_bytes(), ops.device.budget()
    try:
        if budget is not None and needed > budget:
            raise MemoryError
        model = GPT2(config, ops, B, T, dtype=dtype, seed=None, **options)
    except MemoryError as error:
        need = f"{B} x {T} tokens at once need {needed / 2**20:,.1f} MiB on {ops.device.describe()}"
        raise UserError(f"{path}: {need}. HINT: lower B or T (-b, -t), or take the CPU.") from error
    loading.read_weights(model, found)
    return model
