"""The peer of bench_step.py: GPT-2 as a PyTorch user writes it, after nanoGPT's model.py, and its training step.

    python dev/torch_gpt2.py --compile -b 16 -t 1024 --steps 10        trains on random tokens and prints "step N/10"

fp32 weights, bf16 autocast on a GPU, F.scaled_dot_product_attention with the backend that PyTorch chooses (cuDNN on
Hopper, where it beats flash; else flash), cross-entropy over the padded vocabulary, clip_grad_norm_, fused AdamW. No
dropout, tied output layer.
"""

import argparse
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from llmc import gpt2

HYPER = dict(learning_rate=1e-5, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0)


class Block(nn.Module):
    def __init__(self, C, NH):
        super().__init__()
        self.NH = NH
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.NH, C // self.NH).transpose(1, 2) for y in self.qkv(self.ln1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2 whose forward pass gives the loss of a batch; config is an llmc.gpt2.GPT2Config."""

    def __init__(self, config):
        super().__init__()
        C = config.channels
        self.wte, self.wpe = nn.Embedding(config.padded_vocab_size, C), nn.Embedding(config.max_seq_len, C)
        self.h = nn.ModuleList(Block(C, config.num_heads) for _ in range(config.num_layers))
        self.lnf = nn.LayerNorm(C)
        self.head = nn.Linear(C, config.padded_vocab_size, bias=False)
        self.head.weight = self.wte.weight
        self.classes = config.padded_vocab_size  # as in nanoGPT; with vocab_size the loss is llmc's

    def forward(self, x, y):
        h = self.wte(x) + self.wpe.weight[: x.shape[1]]
        for block in self.h:
            h = block(h)
        logits = self.head(self.lnf(h))[..., : self.classes]
        return F.cross_entropy(logits.reshape(-1, self.classes), y.view(-1))


# llm.c's name of a tensor -> ours here, in a block or in the model
TENSORS = dict(
    ln1w="ln1.weight", ln1b="ln1.bias", qkvw="qkv.weight", qkvb="qkv.bias", attprojw="attproj.weight",
    attprojb="attproj.bias", ln2w="ln2.weight", ln2b="ln2.bias", fcw="fc.weight", fcb="fc.bias",
    fcprojw="fcproj.weight", fcprojb="fcproj.bias", wte="wte.weight", wpe="wpe.weight", lnfw="lnf.weight",
    lnfb="lnf.bias",
)  # fmt: skip


def load(net, params, config):
    """Copies an llmc model's weights: params {llm.c's name: NumPy array}; the blocks' have a leading dimension L."""
    with torch.no_grad():
        for spec in gpt2.parameter_specs(config):
            array, name = np.asarray(params[spec.name], np.float32), TENSORS[spec.name]
            for layer, part in enumerate(array if spec.layers else [array]):
                module = net.h[layer] if spec.layers else net
                module.get_parameter(name).copy_(torch.from_numpy(part.copy()))


class Trainer:
    """net and its optimizer; step(x, y) is a whole training step on NumPy arrays and returns the loss."""

    def __init__(self, config, device, compiled, params=None):
        torch.set_flush_denormal(True)
        self.device = device
        self.net = GPT2(config)
        if params is not None:
            load(self.net, params, config)
        else:
            for p in self.net.parameters():
                nn.init.normal_(p, 0.0, 0.02 if p.dim() > 1 else 0.0)
        self.net.to(device)
        parameters = list(self.net.parameters())
        groups = [
            dict(params=[p for p in parameters if (p.dim() > 1) == matrix], weight_decay=decay)
            for matrix, decay in ((True, HYPER["weight_decay"]), (False, 0.0))
        ]
        betas = (HYPER["beta1"], HYPER["beta2"])
        self.optimizer = torch.optim.AdamW(groups, HYPER["learning_rate"], betas, HYPER["eps"], fused=True)
        self.call = torch.compile(self.net) if compiled else self.net

    def step(self, x, y):
        x, y = (torch.from_numpy(a).to(self.device, torch.long, non_blocking=True) for a in (x, y))
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.call(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), HYPER["grad_clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def memory(self, x, y):
        """Peak bytes of device memory in a step: weights, optimizer state, gradients and activations."""
        if self.device != "cuda":
            return math.nan
        states = [t for s in self.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        own = sum(t.nbytes for t in [*self.net.parameters(), *states])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(x, y)
        return own + torch.cuda.max_memory_allocated() - before


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-e", "--model", default="d12", help="descriptor (d12)")
    p.add_argument("-b", "--batch-size", type=int, default=16)
    p.add_argument("-t", "--sequence-length", type=int, default=1024)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--compile", action="store_true")
    args = p.parse_args()
    config = gpt2.config_from_descriptor(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(config, device, args.compile)
    rng = np.random.default_rng(0)
    for step in range(1, args.steps + 1):
        tokens = rng.integers(config.vocab_size, size=(args.batch_size, args.sequence_length + 1))
        loss = trainer.step(np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:]))
        print(f"step {step:4d}/{args.steps} | loss {loss:.6f}", flush=True)


if __name__ == "__main__":
    main()
