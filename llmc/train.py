"""Train GPT-2: `python -m llmc.train`. The choice of the op set, and the loop of llm.c.

    validate -> sample -> checkpoint -> step          (llm.c train_gpt2.cu main)

With no arguments it trains on Tiny Shakespeare with settings that fit the device. flags.py has the flags: llm.c's
letters, each with a long name. Nothing heavy is imported before they are known, so that --help is immediate.
"""

import contextlib
import math
import os
import signal
import sys
import time

from llmc.command import command
from llmc.errors import UserError
from llmc.training.flags import check, fill_defaults, parser

# ----------------------------------------------------------------------------------------------------------------------
# setting up


def prepare_data(args, default_job):
    """Set -i and -j; returns a line about the default data, or None. What the user named is never substituted."""
    if args.input_bin is not None:
        if args.input_val_bin is None:
            raise UserError("-i needs -j, the validation shards. HINT: python -m llmc.data prepare makes both.")
        return None
    from llmc.data.prepare import prepare_default

    tokenizer = args.tokenizer or ("bytes" if args.model.startswith("tiny:") else "gpt2")
    try:
        train, val, text = prepare_default(tokenizer, allow_fallback=default_job and tokenizer == "bytes")
    except UserError as error:
        if not default_job or args.tokenizer is not None:
            raise
        train, val, text = prepare_default("bytes", allow_fallback=True)
        text = f"byte-level, as GPT-2's tokenizer or data cannot be had ({str(error).partition('. HINT')[0]}): {text}"
    args.input_bin, args.input_val_bin = train, args.input_val_bin or val
    return text


def check_output_dir(args):
    """The step to resume from, or None; -o is created, and must be writable before anything is trained."""
    if args.output_dir is None:
        if args.resume:
            raise UserError("-y 1 resumes from -o, which is not given. HINT: give -o DIR.")
        return None
    import tempfile

    from llmc.files import checkpoints

    try:
        os.makedirs(args.output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()
    except OSError as error:
        raise UserError(f"-o {args.output_dir}: {error.strerror}. HINT: name a folder to write to.") from error
    steps = checkpoints.checkpoint_steps(args.output_dir)
    if not args.resume and steps:
        held = f"holds checkpoints of an earlier run, up to step {steps[-1]}"
        raise UserError(f"-o {args.output_dir} {held}. HINT: -y 1 continues it; for a new run give another folder.")
    if not args.resume:
        return None
    checkpoints.prune_stray(args.output_dir)
    return checkpoints.latest_checkpoint(args.output_dir)


def model_config(args, resume_step):
    """(GPT2Config, file for loading.read_weights or None): of the checkpoint to resume, a file, or a descriptor."""
    from llmc import loading
    from llmc.data.shards import vocabulary_of
    from llmc.files import checkpoints, model_file
    from llmc.gpt2 import config_from_descriptor, config_from_header

    if resume_step is not None:
        path = checkpoints.model_path(args.output_dir, resume_step)
        config = config_from_header(model_file.read_model_header(path))
        if args.model_given and (os.path.exists(args.model) or not args.model.endswith(".bin")):
            asked, _ = model_config(args, None)
            for name in ("num_layers", "num_heads", "channels"):
                if getattr(asked, name) != getattr(config, name):
                    found = f"has {name} {getattr(asked, name)}, {path} {getattr(config, name)}"
                    raise UserError(f"-e {args.model} {found}. HINT: leave -e out, or give a new run another -o.")
        return config, path
    path = args.model
    if path.endswith(".bin") or path.startswith("hf:"):
        path = loading.model_file(path)
        return config_from_header(loading.model_header(path)), path
    return config_from_descriptor(path, vocabulary_of(args.input_bin), args.sequence_length), None


def check_resume(args, step, config, dtype):
    """UserError for a checkpoint that load() could not continue from, of which it would know with the memory taken."""
    from llmc.files import checkpoints, model_file
    from llmc.gpt2 import num_parameters

    model_path = checkpoints.model_path(args.output_dir, step)
    version = model_file.read_model_header(model_path)["version"]
    states = checkpoints.read_state_headers(args.output_dir, step, num_parameters(config))
    if args.use_master_weights and not states[0].use_master_weights and dtype != "float32" and version == 5:
        path = checkpoints.state_path(args.output_dir, step, 0)
        raise UserError(f"-w 1: {path} has no master weights. HINT: resume with -w 0, as the run that wrote it.")


def precision_of(args):
    """What of -w, --grad-dtype and -z the memory plan and GPT2(...) take."""
    grad_dtype = "float32" if args.grad_dtype == "fp32" else None  # None: that of the model
    shards = args.process_count or 1 if args.zero_stage == 1 else 1
    return dict(use_master_weights=bool(args.use_master_weights), grad_dtype=grad_dtype, shards=shards)


def sample_tokenizer(config, name):
    """(tokenizer or None, a line about it or None). Without one, samples are printed as token ids, as llm.c does."""
    from llmc.data.tokenizer import tokenizer_for

    try:
        return tokenizer_for(config.vocab_size, name), None
    except UserError as error:
        if name is not None:
            raise
        return None, f"samples are printed as token ids: {error}"


def total_batch_of(args, B, T, P=1):
    """(tokens of one update, micro-steps that each of P processes makes of it)."""
    total_batch, at_once = args.total_batch_size or B * T * P, B * T * P
    if total_batch % at_once:
        factors = f"-b {B} x -t {T}" + f" x {P} processes" * (P > 1)
        raise UserError(f"-d {total_batch} is not a multiple of {factors} = {at_once}. HINT: -d {at_once}.")
    return total_batch, total_batch // at_once


def check_zero(args, config, P):
    """What there is to say about -z 1, which becomes 0 where the tensors cannot be cut into P equal shares."""
    from llmc import gpt2
    from llmc.parallel import zero

    if args.zero_stage == 0 or (P > 1 and zero.share_rows(gpt2.parameter_specs(config), P)):
        return None
    args.zero_stage = 0
    if P == 1:
        return "-z 1 has no effect on one process"
    return f"-z 1: {config.channels} channels cannot be cut into {P} equal shares; running with -z 0"


def open_data(args, config, B, T, rank=0, P=1):
    """The training and the validation loader, every token id checked. -a 1 trains on validation data, unshuffled.

    P processes take turns in the order that one has, so that a step has the same batches however many there are.
    """
    from llmc.data.loader import DataLoader

    train_pattern, shuffle = (args.input_val_bin, False) if args.overfit_single_batch else (args.input_bin, True)
    options = dict(vocab_size=config.vocab_size, streams=1, rows=B)
    train_loader = DataLoader(train_pattern, B, T, rank, P, should_shuffle=shuffle, **options)
    val_loader = DataLoader(args.input_val_bin, B, T, rank, P, **options)
    train_loader.check_all_ids()
    val_loader.check_all_ids()
    return train_loader, val_loader


def open_hellaswag(args, config, T):
    """(the examples of -h 1, or none, and what there is to say about them); -h becomes 0 where their file is not."""
    from llmc import evaluate

    if not args.hellaswag:
        return [], None
    path, line = evaluate.find_hellaswag(args.input_bin)
    args.hellaswag = int(path is not None)
    return evaluate.load_examples(path, config.vocab_size, T) if path else ([], line)


def count_steps(args, num_tokens, total_batch, resume_step):
    """Steps of the run: -x, or one epoch of the training tokens."""
    steps = num_tokens // total_batch if args.max_steps == -1 else args.max_steps
    if steps == 0:
        have = f"the training data has {num_tokens}"
        raise UserError(f"-d {total_batch}: one step takes that many tokens, {have}. HINT: lower -d, or give -x.")
    if resume_step is not None and resume_step > steps:
        raise UserError(f"-x {steps}: {args.output_dir} is already at step {resume_step}. HINT: give a larger -x.")
    return steps


class Speed:
    """Milliseconds and tokens/s of the steps so far, as llm.c averages them: the first step of a run does not count."""

    def __init__(self, total_batch):
        self.total_batch, self.steps, self.total_ms, self.smoothed = total_batch, 0, 0.0, 0.0

    def update(self, ms):
        """Tokens/s to show after a step of ms: its own at first, then an exponential average."""
        rate = self.total_batch / ms * 1e3
        self.steps += 1
        if self.steps == 1:
            return rate
        self.total_ms += ms
        self.smoothed = 0.95 * self.smoothed + 0.05 * rate
        return self.smoothed / (1.0 - 0.95 ** (self.steps - 1))

    def average_ms(self):
        """Mean ms of the steps that count, None where there are none."""
        return self.total_ms / (self.steps - 1) if self.steps > 1 else None


class Interrupt:
    """Ctrl-C sets a flag that the loop looks at between steps; a second one ends the program at once."""

    def __init__(self):
        self.seen = False
        self.previous = signal.signal(signal.SIGINT, self.handle)

    def handle(self, signum, frame):
        self.seen = True
        self.close()

    def close(self):
        signal.signal(signal.SIGINT, self.previous)


def report(rows):
    """llm.c's start-up table; None makes a rule between groups."""
    rule = f"+-{'-' * 21}-+-{'-' * 50}-+"
    lines = [f"| {row[0]:<21} | {row[1]!s:<50} |" if row else rule for row in rows]
    return "\n".join([rule, f"| {'Parameter':<21} | {'Value':<50} |", rule, *lines, rule])


# ----------------------------------------------------------------------------------------------------------------------
# what happens in a step


def due(every, step, last):
    """Whether it is time for what -n, -s or -v want every so many steps and at the end: 0 is off, step 0 too early."""
    return bool(every) and (last or (step > 0 and step % every == 0))


def score_examples(model, examples, sums):
    """HellaSwag's score over all examples, of which each rank does every P-th."""
    from llmc import evaluate

    result = evaluate.score(model, examples[model.rank :: model.num_ranks])
    return evaluate.Score(*(round(n) for n in sums.sums(result))) if sums else result


def validate(model, loader, batches, inputs, targets):
    """Mean loss in nats over the first batches of the validation data."""
    from llmc.parallel.communicators import total

    loader.reset()
    loss = 0.0
    for _ in range(model.rank, batches, model.num_ranks):
        loader.next_batch(inputs, targets)
        loss += model.validate(inputs, targets)
    return total(model.ranks, loss) / batches


def sample(model, tokenizer, args):
    """A sample in llm.c's frame. Each starts from the same random state, so that samples of two steps compare."""
    from llmc.generate import generate, start_tokens

    start = start_tokens(tokenizer) if tokenizer else [model.config.vocab_size - 1]
    n_vocab = tokenizer.n_vocab if tokenizer else None
    ids = generate(model, start, args.sample_length - 1, 1337, args.temperature, n_vocab=n_vocab)
    text = "".join(tokenizer.stream(ids)) if tokenizer else " ".join(str(i) for i in ids)
    return f"generating:\n---\n{text}\n---"


def save(args, step, model, loader, detectors, ranks=None):
    """Model, train state of each rank and DONE marker of this step; then what -nk and -nm let go."""
    from llmc.files import checkpoints, model_file
    from llmc.files.state_file import TrainState

    host = model.ops.device.host_view
    header = {field: getattr(model.config, field) for field in model_file.MODEL_WORDS}
    state = TrainState(
        step,
        model.rng_state,
        model.rng_state_last_update,
        num_processes=model.num_ranks,
        rank=model.rank,
        loader_state=loader.state(),
        extra={name: detector.state() for name, detector in detectors.items()},
    )
    arrays = [host(array) for array in (model.m, model.v, model.master) if array is not None]
    params, version = host(model.params_flat), 3 if model.dtype.name != "bfloat16" else 5
    if model.dtype == "float16":
        params = params.astype("float32")  # llm.c has no fp16 file; nothing is lost
    share = ranks.exchange if ranks else checkpoints.alone
    checkpoints.save_checkpoint(args.output_dir, header, params, version, state, arrays, share)
    if model.rank == 0:
        let_go(args, step)


def let_go(args, step):
    """What -nk and -nm say after the checkpoint of this step."""
    from llmc.files.checkpoints import apply_retention

    apply_retention(args.output_dir, step, args.checkpoints_keep, args.major_checkpoint_every)


def load(args, step, model, loader, detectors):
    """Continue from the checkpoint of this step: everything the next step reads gets the bits it had.

    It may be of any number of ranks, with or without -z 1; a share of the optimizer state is cut out of theirs.
    -w 0: the weights are those of the model file. -w 1: the master weights of the state, or the model file of an fp32
    run, which has no others; without either it is an error. If --dtype is not that of the file, the parameters are
    rounded from the master weights anew, with the noise of the last update: a run can change its precision.
    """
    import numpy as np

    from llmc import loading
    from llmc.files import checkpoints, model_file
    from llmc.gpt2 import parameter_specs

    model_path, N = checkpoints.model_path(args.output_dir, step), model.params_flat.size
    version = loading.read_weights(model, model_path)
    arrays = [model.m, model.v]
    weights = model.share.params if model.share else model.params_flat  # in fp32 their own master
    in_state = checkpoints.read_state_headers(args.output_dir, step, N)[0].use_master_weights
    if args.use_master_weights and (in_state or (model.master is not None and version == 5)):
        arrays.append(weights if model.master is None else model.master)
    hosts = [model.ops.device.host_view(array) for array in arrays]
    layout = dict(num_processes=model.num_ranks, rank=model.rank, zero_stage=int(model.share is not None))
    states = checkpoints.read_state_elastic(args.output_dir, step, parameter_specs(model.config), hosts, **layout)
    if model.master is not None and len(arrays) == 2:
        arrays.append(model.master)
        whole = np.empty(N, np.float32)
        model_file.read_model(model_path, whole)
        hosts.append(model.share.of(whole) if model.share else whole)
    for array, host in zip(arrays, hosts, strict=True):
        if host is not array:
            model.ops.device.upload(array, host)
    if model.share:
        model.gather()
    model.rng_state, model.rng_state_last_update = states[0].rng_state, states[0].rng_state_last_update
    if model.master is not None and not (version == 5 and model.dtype.name == "bfloat16"):
        model.round_master()
    loader.load_states([state.loader_state for state in states])
    for name, detector in detectors.items():
        detector.load_state((states[0].extra or {}).get(name))


def train_step(model, loader, args, step, steps, inputs, targets, detectors):
    """One update, over micro-batches that are loaded into inputs, targets (M, B, T) i32.

    Returns (loss, its z-score, gradient norm, its z-score, learning rate, what there is to say about it or None).
    """
    from llmc.training.schedulers import get_learning_rate

    peak, warmup, floor = args.learning_rate, args.warmup_iterations, args.final_learning_rate_frac
    lr = get_learning_rate(args.lr_scheduler, step, peak, warmup, steps, floor)
    settings = (lr, args.beta1, args.beta2, args.eps, args.weight_decay, args.grad_clip, step + 1)
    may_skip = args.skip_update_loss_z or args.skip_update_grad_z
    rng_state, last_update = model.rng_state, model.rng_state_last_update
    scaler, loaded, notice = detectors.get("loss_scale"), False, None
    while True:
        if scaler:
            model.loss_scale = scaler.scale
        for micro_step, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            if not loaded:
                loader.next_batch(x, y)
            model.forward(x)
            model.backward(x, y, len(inputs), micro_step)
        if may_skip:
            model.measure_norm()
        else:
            model.update(*settings)  # at once: a GPU has it queued before the host waits for the loss
        loss, grad_norm = model.mean_loss(len(inputs)), model.grad_norm()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite or not (scaler and math.isfinite(loss) and scaler.overflow()):
            break
        notice = f"step {step + 1}: the gradients overflowed in fp16, again with loss scale {scaler.scale:g}"
        loaded, model.rng_state = True, rng_state
    if not finite:
        from llmc.training.nonfinite import step_failed

        model.rng_state_last_update = last_update
        notice = step_failed(args, step, model, inputs, targets, rng_state, loss, grad_norm, settings)
        return loss, math.nan, grad_norm, math.nan, lr, notice
    if scaler:
        scaler.good_step()
    loss_z, norm_z = detectors["loss"].update(loss), detectors["grad_norm"].update(grad_norm)
    skip = skip_notice(args, loss_z, norm_z)
    if may_skip and not skip:
        model.update(*settings)
    notice = skip or notice
    return loss, loss_z, grad_norm, norm_z, lr, notice


def skip_notice(args, loss_z, norm_z):
    """llm.c's line when -sl or -sg lets an update go, else None. A z-score is NaN, above no limit, for 128 steps."""
    if args.skip_update_loss_z and loss_z > args.skip_update_loss_z:
        return f"skipping update due to loss z-score of {loss_z:f}"
    if args.skip_update_grad_z and norm_z > args.skip_update_grad_z:
        return f"skipping update due to grad z-score of {norm_z:f}"
    return None


def open_gpu_stats(args, gpu):
    """What reads the GPU for -lg, or None. gpu: mfu.current_gpu(), None on a CPU."""
    if not args.log_gpu_every:
        return None
    if gpu is None:
        raise UserError(f"-lg {args.log_gpu_every} reads a GPU, this run is on the CPU. HINT: leave -lg out.")
    from llmc.training.mfu import GpuStats

    return GpuStats(gpu[2])


def replay(args):
    """--replay: the step that a run saved because it was not finite, op by op. Exit code 1 if it still is not."""
    from llmc import devices
    from llmc.training import nonfinite

    ops, _, line = devices.pick_device(args.device, args.threads)
    print(line)
    about, found = nonfinite.replay(args.replay, ops, devices.model_dtype(args.dtype) if args.dtype else None)
    print(f"as it was saved: {about['found']}")
    print(f"done again:      {found or 'every tensor is finite'}")
    return 1 if found else 0


@command("llmc.train")
def main(argv=None):
    from llmc.parallel.launch import launched, one_voice, same_flags
    from llmc.parallel.world import meeting_place, world

    with one_voice():
        args = parser().parse_args(argv)
        notices = check(args)
        if not (args.replay or args.plan):
            who = world(args.process_count, args.process_rank, args.gpus_per_node)
    if args.replay:
        return replay(args)
    if args.plan:
        from llmc.training.memory import print_plan

        print_plan(args)
        return 0
    start_time = time.perf_counter()
    place = meeting_place(who, args.nccl_init_method, args.server_ip, args.fs_path)
    with launched(who, place, args.device) as ranks:
        if ranks:
            args.process_count, args.process_rank = ranks.size, ranks.rank
            same_flags(ranks, {k: v for k, v in vars(args).items() if k not in ("process_rank", "threads")})
        return run(args, notices, ranks, start_time)


def run(args, notices, ranks, start_time):
    """The run that args describe, on this process or on this one of ranks; returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal's encoding does not have

    # what is wrong with the flags or files is found here, before anything is allocated
    import numpy as np

    from llmc import devices, evaluate, gpt2, loading
    from llmc.cuda import ladder
    from llmc.parallel import launch
    from llmc.parallel.communicators import total
    from llmc.training import memory, mfu, schedulers
    from llmc.training.logger import Display, Logger, step_line
    from llmc.training.loss_scaler import LossScaler
    from llmc.training.outlier_detector import OutlierDetector

    schedulers.check(args.lr_scheduler)
    ops, device, device_line, sums = launch.pick_device(args.device, args.threads, ranks)
    rank, P = (ranks.rank, ranks.size) if ranks else (0, 1)
    default_job = fill_defaults(args, device)
    args.output_dir = launch.on_rank0(ranks, lambda: args.output_dir)
    gpu = mfu.current_gpu() if device == "cuda" else None
    peak = mfu.peak_flops(*gpu[:2], args.dtype) if gpu else None
    gpu_stats = open_gpu_stats(args, gpu)
    dtype = devices.model_dtype(args.dtype)
    data_line = launch.rank0_first(ranks, lambda: prepare_data(args, default_job))
    resume_step = launch.on_rank0(ranks, lambda: check_output_dir(args))
    config, model_path = model_config(args, resume_step)
    if resume_step is not None:
        check_resume(args, resume_step, config, dtype)
    for text in args.kernel:
        ladder.use(ops, text, args.dtype, config.channels // config.num_heads)
    B, T = args.batch_size, args.sequence_length or min(1024, config.max_seq_len)
    total_batch, micro_steps = total_batch_of(args, B, T, P)
    train_loader, val_loader = open_data(args, config, B, T, rank, P)
    steps = count_steps(args, train_loader.num_tokens, total_batch, resume_step)
    all_val_batches = val_loader.num_tokens // (B * T * P)
    val_batches = all_val_batches if args.val_max_steps == -1 else args.val_max_steps
    examples, hellaswag_line = open_hellaswag(args, config, T)
    tokenizer, tokenizer_line = sample_tokenizer(config, args.tokenizer) if args.sample_every else (None, None)

    print(device_line)
    for line in (*notices, check_zero(args, config, P), data_line, hellaswag_line, tokenizer_line):
        if line:
            print(line)
    if resume_step is not None:
        print(f"resuming from step {resume_step} in {args.output_dir}")
    print(report(settings(args, B, T, total_batch)))
    print(report(model_rows(args, config, gpu, peak, model_path, steps, val_batches)))
    precision = precision_of(args)
    plan = gpt2.memory_plan(config, ops, B, T, args.recompute, dtype, **precision)
    needs = memory.needs_of(config, ops, T, dtype, **precision)
    plan_bytes = needs(B, args.recompute)
    print(memory.plan_text(plan, ops, dtype))
    limits = memory.limits(args, config, ops, T, dtype, P, sharing=launch.ranks_here(ranks, device))
    memory.check(needs, B, T, args.recompute, *limits)
    baseline = peak_memory()
    each = "1 micro-step" if micro_steps == 1 else f"{micro_steps} micro-steps"
    batch = f"B * T = {B} * {T} = {B * T}" if P == 1 else f"B * T * processes = {B} * {T} * {P} = {B * T * P}"
    print(f"batch {batch} tokens; total batch {total_batch} => {each} a step")

    graphs = device == "cuda" and not (args.no_graph or args.check)
    if device == "cuda":
        print(devices.prepare_kernels(config, dtype, args.check, precision["grad_dtype"]))
    try:
        model = gpt2.GPT2(config, ops, B, T, args.recompute, dtype=dtype, graphs=graphs, ranks=sums, **precision)
    except MemoryError:
        memory.check(needs, B, T, args.recompute, *limits, failed=True)
    detectors = {"loss": OutlierDetector(), "grad_norm": OutlierDetector()}
    if args.dtype == "fp16":
        detectors["loss_scale"] = LossScaler()
    if resume_step is not None:
        load(args, resume_step, model, train_loader, detectors)
        if rank == 0:
            let_go(args, resume_step)  # a kill may have come between its save and the removal of an old one
    elif model_path:
        loading.read_weights(model, model_path)
    else:
        model.init_weights(args.seed)

    inputs, targets = np.empty((2, micro_steps, B, T), np.int32)
    logger = Logger(args.output_dir if rank == 0 else None, resume_step)
    first, live, val_loss = resume_step or 0, sys.stdout.isatty(), None
    speed, step_flops = Speed(total_batch), gpt2.flops_per_token(config, T) * B * T * micro_steps
    with contextlib.closing(Display(steps, live, first)) as display, contextlib.closing(Interrupt()) as interrupt:
        for step in range(first, steps + 1):
            last = step == steps
            stop = total(sums, interrupt.seen) > 0

            if args.val_loss_every and (step % args.val_loss_every == 0 or last):
                batches = all_val_batches if default_job and last else val_batches
                val_loss = validate(model, val_loader, batches, inputs[0], targets[0])
                display.write(f"val loss {val_loss:.6f}")
                logger.val(step, val_loss)
            if examples and (last or due(args.val_loss_every, step, last)):
                result = score_examples(model, examples, sums)
                display.write(evaluate.score_line(result))
                logger.eval(step, result.correct / result.total)
            if rank == 0 and due(args.sample_every, step, last):
                display.write(sample(model, tokenizer, args))
            interrupted = stop and step > first
            if args.output_dir and step != resume_step and (due(args.checkpoint_every, step, last) or interrupted):
                save(args, step, model, train_loader, detectors, ranks)
                display.write(f"wrote checkpoint of step {step} to {args.output_dir}")
            if last:
                break
            if stop:
                again = f"-o {args.output_dir} -y 1 continues" if args.output_dir else "-o DIR would have kept its work"
                raise UserError(f"interrupted after step {step} of {steps}. HINT: the same command with {again}.")

            timer = ops.device.timer()
            if args.overfit_single_batch:
                train_loader.reset()
            loss, loss_z, grad_norm, norm_z, lr, notice = train_step(
                model, train_loader, args, step, steps, inputs, targets, detectors
            )
            ops.device.synchronize()
            ms = timer()
            shown = speed.update(ms)
            if step == first:
                display.write(f"first step done {time.perf_counter() - start_time:.2f} s after the start")
            if notice:
                display.write(notice)
            used = mfu.utilisation(step_flops, ms, peak)
            line = step_line(step, steps, loss, loss_z, grad_norm, norm_z, lr, ms, used, shown)
            display.step(line, loss, lr, shown)
            if gpu_stats and (step + 1) % args.log_gpu_every == 0:
                display.write(gpu_stats.line())
            logger.train(step, loss, lr, grad_norm, dt_ms=ms, tokens_per_second=total_batch / ms * 1e3, mfu=used)

    if speed.average_ms():
        print(f"total average iteration time: {speed.average_ms():f} ms")
    if default_job and val_loss is not None:
        print(f"validation loss on all {all_val_batches * B * T * P} held-out tokens: {val_loss:.4f} nats per token")
    print_memory_used(ops, device, plan_bytes, baseline)
    if args.output_dir and args.checkpoint_every:
        print(f'more text: python -m llmc.generate {args.output_dir} --prompt "ROMEO:"')
    return 0


def print_memory_used(ops, device, plan_bytes, baseline):
    """What the run took, beside its plan; baseline: what this process had before the model, in bytes."""
    plan_mib, peak = plan_bytes / 2**20, peak_memory()
    if device == "cuda":
        free, total = ops.device.memory()
        print(f"device memory in use: {(total - free) / 2**20:.0f} MiB (plan {plan_mib:.0f} MiB, the rest is CUDA's)")
    elif peak:
        parts = f"plan {plan_mib:.0f} MiB + Python, NumPy and BLAS {baseline / 2**20:.0f} MiB"
        print(f"peak memory: {peak / 2**20:.0f} MiB ({parts})")


def settings(args, B, T, total_batch):
    """Rows of the start-up table: the flags."""
    return [
        ("train data pattern", args.input_bin),
        ("val data pattern", args.input_val_bin),
        ("output log dir", args.output_dir or "NULL"),
        ("checkpoint_every", args.checkpoint_every),
        ("resume", args.resume),
        ("micro batch size B", B),
        ("sequence length T", T),
        ("total batch size", total_batch),
        ("LR scheduler", args.lr_scheduler),
        ("learning rate (LR)", f"{args.learning_rate:e}"),
        ("warmup iterations", args.warmup_iterations),
        ("final LR fraction", f"{args.final_learning_rate_frac:e}"),
        ("weight decay", f"{args.weight_decay:e}"),
        ("skip update lossz", f"{args.skip_update_loss_z:f}"),
        ("skip update gradz", f"{args.skip_update_grad_z:f}"),
        ("AdamW beta1, beta2", f"{args.beta1:g}, {args.beta2:g}"),
        ("gradient clip", f"{args.grad_clip:g}"),
        ("max_steps", args.max_steps),
        ("val_loss_every", args.val_loss_every),
        ("val_max_steps", args.val_max_steps),
        ("sample_every", args.sample_every),
        ("genT", args.sample_length),
        ("overfit_single_batch", args.overfit_single_batch),
        ("use_master_weights", "enabled" if args.use_master_weights else "disabled"),
        ("gelu_fusion", "always, in the matmul kernels"),
        ("recompute", args.recompute),
    ]


def model_rows(args, config, gpu, peak, model_path, steps, val_batches):
    """Rows of the start-up table: the device, the model and what follows from it."""
    from llmc.gpt2 import num_parameters

    return [
        ("device", gpu[0] if gpu else "CPU"),
        ("peak TFlops", f"{peak / 1e12:.1f}" if peak else "n/a"),
        ("precision", args.dtype.upper() + (", gradients FP32" if args.grad_dtype == "fp32" else "")),
        None,
        ("weight init method", model_path or f"{args.model}, seed {args.seed}"),
        ("max_sequence_length T", config.max_seq_len),
        ("vocab_size V", config.vocab_size),
        ("padded_vocab_size Vp", config.padded_vocab_size),
        ("num_layers L", config.num_layers),
        ("num_heads NH", config.num_heads),
        ("channels C", config.channels),
        ("num_parameters", f"{num_parameters(config)}"),
        None,
        ("train_num_batches", steps),
        ("val_num_batches", val_batches),
        None,
        ("run hellaswag", "yes" if args.hellaswag else "no"),
        None,
        ("num_processes", args.process_count or 1),
        ("zero_stage", args.zero_stage),
    ]


def peak_memory():
    """The largest resident size of this process so far in bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/status") as file:  # Linux: ru_maxrss there starts from that of the parent process
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
