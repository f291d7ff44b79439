"""The run scripts: bash takes them, the trainer takes their flags, and a run that crashes is resumed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from llmc.training import flags
from llmc.training.settings import settings_from

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
RUNS = sorted(p.relative_to(SCRIPTS).as_posix() for p in SCRIPTS.rglob("run_*"))
UNTIL_DONE = SCRIPTS / "until_done.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


def flags_of(script, tmp_path):
    """What the script gives the trainer, with stand-ins for python, mpirun and Slurm on the PATH."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    launcher = '#!/bin/bash\nuntil [[ $1 =~ ^(python|bash|hostname)$ ]]; do shift; done\n"$@"\n'
    for name in ("mpirun", "srun"):
        executable(stand_ins / name, launcher)
    executable(stand_ins / "hostname", "#!/bin/bash\necho 10.0.0.7 fe80::1\n")
    executable(stand_ins / "python", f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {tmp_path}/args\n")
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    slurm = dict(SLURM_NTASKS="16", SLURM_PROCID="3", SLURM_NTASKS_PER_NODE="8", SLURM_JOB_ID="77")
    env = {**os.environ, **slurm, "PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", f"scripts/{script}"], cwd=tmp_path, env=env, check=True, timeout=60)
    program, module, *argv, end = (tmp_path / "args").read_text().split("\0")
    assert (program, module, end) == ("-m", "llmc.train", "")
    return flags.parse(argv)


def test_there_are_all():
    single = ["run_gpt2_124M.sh", "run_gpt2_1558M.sh", "run_gpt2_350M.sh", "run_gpt2_774M.sh", "run_gpt3_125M.sh"]
    multi = ["run_gpt2_124M_fs.sbatch", "run_gpt2_124M_mpi.sh", "run_gpt2_124M_tcp.sbatch"]
    assert RUNS == [*(f"multi_node/{name}" for name in multi), *single]


@pytest.mark.parametrize("script", [*RUNS, "until_done.sh"])
def test_bash_takes_it(script):
    subprocess.run(["bash", "-n", SCRIPTS / script], check=True, timeout=60)
    text = (SCRIPTS / script).read_text()
    assert os.access(SCRIPTS / script, os.X_OK) and text.startswith("#!/bin/bash\n")
    assert all(len(line) <= 120 for line in text.splitlines())
    if script.startswith("run_"):
        assert all(f"\n# {word} " in text for word in ("model", "tokens", "FLOPs", "time", "loss", "data"))


EXPECTED = {  # model, data, batch, total batch, learning rate, final fraction, steps, checkpoint every
    "run_gpt2_124M.sh": ("d12", "fineweb10B/fineweb", 64, 524288, 6e-4, 0.0, -1, 5000),
    "run_gpt2_350M.sh": ("d24", "fineweb100B/fineweb", 64, 524288, 3e-4, 0.0, 60000, 2000),
    "run_gpt2_774M.sh": ("d36", "fineweb100B/fineweb", 32, 524288, 2.5e-4, 0.0, 286102, 4000),
    "run_gpt2_1558M.sh": ("d48", "edu_fineweb100B/edu_fineweb", 16, 1048576, 6e-4, 0.1, 32000, 2000),
    "run_gpt3_125M.sh": ("gpt3:c768", "fineweb100B/fineweb", 32, 524288, 6e-4, 0.1, 572204, 10000),
    "multi_node/run_gpt2_124M_mpi.sh": ("d12", "fineweb10B/fineweb", 64, 2097152, 6e-4, 0.1, -1, 1000),
    "multi_node/run_gpt2_124M_fs.sbatch": ("d12", "fineweb10B/fineweb", 64, 2097152, 6e-4, 0.0, -1, 5000),
    "multi_node/run_gpt2_124M_tcp.sbatch": ("d12", "fineweb10B/fineweb", 64, 2097152, 6e-4, 0.0, -1, 5000),
}


@pytest.mark.parametrize("script", RUNS)
def test_their_flags_are_those_of_llm_c(script, tmp_path):
    args = flags_of(script, tmp_path)
    run, _ = settings_from(args, "cuda", args.process_count or 1)
    model, data, batch, total, lr, floor, steps, every = EXPECTED[script]
    assert (run.model, run.batch_size, run.total_batch_size) == (model, batch, total)
    assert run.input_bin == f"dev/data/{data}_train_*.bin" and run.input_val_bin == f"dev/data/{data}_val_*.bin"
    assert (run.learning_rate, run.final_learning_rate_frac, run.max_steps) == (lr, floor, steps)
    assert run.sequence_length == (2048 if "gpt3" in script else 1024) and run.checkpoint_every == every
    assert (run.weight_decay, run.warmup_iterations, run.lr_scheduler) == (0.1, 700, "cosine")
    assert (run.zero_stage, run.recompute, run.val_loss_every) == (1, 0, 250) and run.hellaswag and run.resume
    spikes = (7.0, 7.0, 5, 50000) if "gpt3" in script else (0.0, 0.0, 0, 0)
    kept = (run.checkpoints_keep, run.major_checkpoint_every)
    assert (run.skip_update_loss_z, run.skip_update_grad_z, *kept) == spikes
    processes = (args.process_count, args.process_rank, args.gpus_per_node, args.nccl_init_method)
    if script.endswith("sbatch"):
        method = "fs" if "_fs" in script else "tcp"
        assert processes == (16, 3, 8, method)
        assert args.server_ip == ("10.0.0.7" if method == "tcp" else "")
        if method == "fs":
            assert args.fs_path.endswith("sync-77/1") and os.path.isdir(args.fs_path)
    else:
        assert processes == (None, None, None, "mpi" if "mpi" in script else None)


# exit codes of the attempts, and how many of them come a checkpoint further -> exit code and attempts
CRASHES = [
    ([0], 0, 0, 1),
    ([2, 0], 1, 2, 1),  # an error that trying again does not mend
    ([143, 0], 1, 143, 1),  # a signal that the run has obeyed
    ([138, 0], 1, 138, 1),
    ([137, 1, 0], 3, 0, 3),
    ([1, 1, 0], 0, 1, 2),  # always at the same place
    ([1, 139, 1, 1, 0], 2, 1, 3),
]


@pytest.mark.parametrize("codes, progress, code, attempts", CRASHES)
def test_crashes_resume(codes, progress, code, attempts, tmp_path):
    run = f"echo $ATTEMPT >> log; [ $ATTEMPT -le {progress} ] && touch out/DONE_0000000$ATTEMPT; "
    run += f"codes=(- {' '.join(map(str, codes))}); exit ${{codes[$ATTEMPT]}}"
    (tmp_path / "out").mkdir()
    command = ["bash", UNTIL_DONE, "out", "bash", "-c", run]
    env = {**os.environ, "RETRY_SECONDS": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "log").read_text().split() == [str(i + 1) for i in range(attempts)]
    assert done.stderr.count("\n") == (attempts if code == 1 else attempts - 1)
