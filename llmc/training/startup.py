"""What commands do first: find the device, its op set and precision, and make a model of a file ready on it."""

import os

from llmc.errors import UserError

MODEL_HELP = "a .bin file, the output folder of a run (its newest checkpoint), or Hugging Face's: hf:DIR or hf:NAME"


def pick_device(wanted, threads=None):
    """The op set, its name, and one line that says which, and why: (ops, name, text). wanted: auto, cpu or cuda."""
    why = "asked for"
    if wanted != "cpu":
        from llmc import cuda

        try:
            cuda.device.start()  # launches a kernel: only that shows that a GPU can be used
            return cuda, "cuda", f"cuda ({why if wanted == 'cuda' else 'auto: it works'}), {cuda.device.describe()}"
        except UserError as error:
            if wanted == "cuda":
                raise UserError(f"--device cuda: {error}") from error
            why = f"auto: {str(error).partition('. HINT')[0].partition(' HINT')[0]}"
    from llmc import cpu

    if threads:
        cpu.device.threads(threads)
    return cpu, "cpu", f"cpu ({why}), {cpu.device.describe()}"


def check_dtype(name, device):
    """The name of the precision: the one given, else bf16 on a GPU and fp32 on a CPU, which has nothing else."""
    if device == "cpu" and name not in (None, "fp32"):
        raise UserError(f"--dtype {name}: the CPU op set has fp32 only. HINT: --device cuda, or leave --dtype out.")
    return name or ("bf16" if device == "cuda" else "fp32")


def model_dtype(name):
    """The NumPy dtype of --dtype."""
    if name != "bf16":
        return {"fp32": "float32", "fp16": "float16"}[name]
    import ml_dtypes

    return ml_dtypes.bfloat16


def prepare_kernels(config, dtype, check=False, grad_dtype=None):
    """Compile what is not in the cache yet, several files at a time; the first step then has nothing to. -> a line.

    Hopper's kernels are tried. Where they do not work stderr says so, whichever command it is.
    """
    import sys
    import time

    import numpy as np

    from llmc.cuda import device, matmul, module

    module.check_launches = check
    timer = time.perf_counter()
    HS = config.channels // config.num_heads
    name, attention = np.dtype(dtype).name, ("attention.cu", "attention_sm90.cu")
    defines = dict.fromkeys(attention, (f"HEAD_SIZE={HS}",)) if HS != 64 else {}
    tall = matmul.turned(matmul.HOPPER[-1], config.channels, config.padded_vocab_size)
    module.compile_all(name, defines, tall)
    if grad_dtype not in (None, name):  # what writes gradients, once more; the rest is loaded already
        writers = ("encoder.cu", "layernorm.cu", "matmul.cu", "matmul_sm90.cu", "adamw.cu")
        module.compile_all(name, defines | dict.fromkeys(writers, ("GRADS_FP32",)), tall)
    fallback = device.try_hopper(dtype, HS, tall)
    if fallback:
        print(fallback, file=sys.stderr)
    return f"kernels ready after {time.perf_counter() - timer:.1f} s, {len(module.compilations)} files compiled"


def model_file(path):
    """What to load: path itself, the newest checkpoint of an output folder, or hf:FOLDER for what is Hugging Face's."""
    from llmc.files import checkpoint

    if path.startswith("hf:"):
        from llmc.files import huggingface as safetensors_io

        return "hf:" + safetensors_io.find(path[3:])
    if not os.path.isdir(path):
        return path
    if os.path.exists(os.path.join(path, "config.json")) and not checkpoint.checkpoint_steps(path):
        return f"hf:{path}"
    step = checkpoint.latest_checkpoint(path)
    if step is None:
        raise UserError(f"{path} holds no finished checkpoint (DONE_*). HINT: train with -o {path} -n STEPS.")
    return checkpoint.model_path(path, step)


def add_device_flags(add):
    """--device, --dtype and --threads of the commands that only use a model; add: parser.add_argument."""
    from llmc.command import thread_count

    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where it works, else cpu")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="of parameters and activations (bf16 on a GPU, else fp32)")
    add("--threads", type=thread_count, metavar="N", help="CPU threads (default: all)")


def model_header(path):
    """The sizes of what model_file() found, under their names in checkpoint.MODEL_WORDS. Errors: UserError."""
    from llmc.files import checkpoint

    if path.startswith("hf:"):
        from llmc.files import huggingface as safetensors_io

        return safetensors_io.read_hf_header(path[3:])
    return checkpoint.read_model_header(path)


def read_weights(model, path):
    """Parameters from what model_file() found, rounded to nearest where the model's precision is lower.

    Returns the version of a .bin file, None of other ones.
    """
    from llmc.files import checkpoint

    host = model.host_parameters()
    if path.startswith("hf:"):
        from llmc.files import huggingface as safetensors_io

        safetensors_io.read_hf(path[3:], host)
        version = None
    else:
        version = checkpoint.read_model(path, host)["version"]
    model.load_parameters(host)
    return version


def open_model(path, args, B=1, T=None):
    """(model, line about the device): the weights of a model file on --device in --dtype, for forward passes alone."""
    from llmc.gpt2 import GPT2, config_from_header
    from llmc.training import memory

    config = config_from_header(model_header(path))
    ops, device, line = pick_device(args.device, args.threads)
    dtype = model_dtype(check_dtype(args.dtype, device))
    if device == "cuda":
        prepare_kernels(config, dtype)
    T = T or min(config.max_seq_len, 1024)
    needed, budget = memory.needs_of(config, ops, T, dtype, training=False)(B, 2), ops.device.budget()
    try:
        if budget is not None and needed > budget:
            raise MemoryError
        model = GPT2(config, ops, B, T, recompute=2, training=False, dtype=dtype)
    except MemoryError as error:
        hint = "HINT: lower -b or -t of llmc.evaluate, or take --device cpu."
        raise UserError(f"{path}: {B} x {T} tokens at once need {memory.size(needed)} on {line}. {hint}") from error
    read_weights(model, path)
    return model, line
