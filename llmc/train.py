"""Train GPT-2: `python -m llmc.train`. With no flags it trains on Tiny Shakespeare, with settings that fit the device.

llmc/training does the work: flags.py has the flags, settings.py what is made of them, setup.py what is done before the
first step, loop.py the steps. Nothing heavy is imported before the flags are known, so that --help is immediate.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmc.training.settings import Settings
    from llmc.training.setup import Machine

import sys
import time
from dataclasses import asdict

from llmc.command import command, say
from llmc.training import flags


@command("llmc.train")
def main(argv: list[str] | None = None) -> int:
    from llmc.parallel import launch
    from llmc.parallel.world import World, meeting_place, world

    with launch.one_voice():
        args = flags.parse(argv)
        who = World(0, args.process_count or 1, 0, None)
        if not (args.replay or (args.plan and args.process_count)):  # a plan is also made for other machines
            who = world(args.process_count, args.process_rank, args.gpus_per_node)
    if args.replay:
        return replay(args.replay, args.device, args.dtype, args.threads)
    if args.plan:
        return plan(args, who.size) if who.rank == 0 else 0
    start_time = time.perf_counter()
    place = meeting_place(who, args.nccl_init_method, args.server_ip, args.fs_path)
    with launch.launched(who, place, args.device) as ranks:
        from llmc.training.settings import settings_from
        from llmc.training.setup import Machine

        ops, device, line, sums = launch.pick_device(args.device, args.threads, ranks)
        settings, notices = settings_from(args, device, who.size)
        launch.same_flags(ranks, asdict(settings))
        return train(settings, Machine(ops, line, ranks, sums), notices, start_time)


def train(settings: "Settings", machine: "Machine", notices: Sequence[str], start_time: float) -> int:
    """The run of these settings, on this process or on this one of several ranks: its exit code. Errors: UserError."""
    from llmc import devices
    from llmc.gpt2 import parameter_specs
    from llmc.training import report, run_folder, setup
    from llmc.training.loop import Loop
    from llmc.training.signals import Signals

    place = (settings.output_dir, settings.resume, settings.default_job, machine.ranks)
    with Signals(patience=1.0 if machine.ranks else 0.0) as signals, run_folder.opened(*place) as folder:
        run = setup.prepare(settings, machine, folder, notices)
        report.print_start(run)
        limits = setup.check_memory(run)
        baseline = report.peak_memory()
        report.print_batch(run)
        if settings.device == "cuda":
            tensors = len(parameter_specs(run.config))
            print(devices.prepare_kernels(run.config, run.dtype, settings.check, run.precision["grad_dtype"], tensors))
        loop = Loop(run, *setup.build(run, limits), start_time)
        interrupted = loop.train(signals)
        if interrupted:  # on all ranks after the same step
            if machine.rank == 0:
                say(f"llmc.train: error: {interrupted}")
            return interrupted.code
        report.print_end(run, loop.speed, loop.val_loss, baseline)
    return 0


def plan(args: argparse.Namespace, num_processes: int) -> int:
    """--plan: the memory plan of the run that the other flags describe."""
    from llmc.training.plan import plan_device, print_plan
    from llmc.training.settings import settings_from

    ops, device, line = plan_device(args.device, args.dtype, args.threads)
    settings, _ = settings_from(args, device, num_processes)
    print_plan(settings, ops, line, args.memory)
    return 0


def replay(path: str, device: str, dtype: str | None, threads: int | None) -> int:
    """--replay: the step that a run saved because it was not finite, op by op. Exit code 1 if it still is not."""
    from llmc import devices
    from llmc.errors import printable
    from llmc.training import nonfinite

    ops, _, line = devices.pick_device(device, threads)
    print(line)
    about, found = nonfinite.replay(path, ops, devices.model_dtype(dtype) if dtype else None)
    print(f"as it was saved: {printable(about['found'])}")
    print(f"done again:      {found or 'every tensor is finite'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
