"""Checkpoints of a run: model_<step>.bin, state_<step>_<rank>.bin of each rank, and DONE_<step> once all are complete.

This module lists them, writes them, removes what -nk does not keep, and checks that one is whole and has the bits that
were written. It reads the states of any number of ranks for any other number.

Source: llm.c train_gpt2.cu write_checkpoint, delete_checkpoint; llmc/utils.h find_max_step.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.files import io, parse
from llmc.files.done_file import check_file, read_done, write_done
from llmc.files.io import HEADER_BYTES, STATE_MAGIC, fsync_folder
from llmc.files.model_file import as_file_dtype, fingerprint, num_parameters, read_model_header, write_model
from llmc.files.state_file import TrainState, read_state_header, write_state

EARLIER = "HINT: go on from an earlier checkpoint, with a lower -l"


def model_path(folder: io.Path, step: int) -> str:
    """The model file of a step."""
    return os.path.join(folder, f"model_{step:08d}.bin")


def state_path(folder: io.Path, step: int, rank: int) -> str:
    """The train state of a rank at a step."""
    return os.path.join(folder, f"state_{step:08d}_{rank:05d}.bin")


def done_path(folder: io.Path, step: int) -> str:
    """The marker of a step: it is there only while the model and all states are there and complete."""
    return os.path.join(folder, f"DONE_{step:08d}")


def list_folder(folder: io.Path) -> list[str]:
    """The names in a folder, sorted; none for a folder that does not exist. Errors: UserError."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}. HINT: give -o a folder that can be read") from error


def remove(path: io.Path) -> None:
    """Remove a file that may be gone already. Errors: UserError."""
    try:
        os.remove(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror}. HINT: make its folder writable") from error


def checkpoint_steps(folder: io.Path) -> list[int]:
    """Steps that have a DONE marker, in rising order; none for a folder that does not exist."""
    return sorted(int(name[5:]) for name in list_folder(folder) if re.fullmatch(r"DONE_\d{8,}", name))


# ---------------------------------------------------------------------------------------------------------------------
# writing


def alone(number: int) -> list[int]:
    """The `share` that save_checkpoint takes, for a run of one process."""
    return [number]


def save_checkpoint(
    folder: io.Path, header: Mapping[str, int], params: np.ndarray, version: int, state: TrainState,
    arrays: Sequence[np.ndarray], share: Callable[[int], list[int]] = alone,
) -> None:  # fmt: skip
    """Write the model (rank 0), every rank's state, and then the DONE marker (rank 0). All ranks call it.

    params, version: as write_model takes them; only rank 0's are written. state, arrays: of this rank, as write_state
    takes them. share: gives a number of each rank to all of them, so it also waits for all.
    A kill at any instant leaves either no marker for the step or a complete checkpoint. So does an error. Weights that
    are not finite are an error: they are not written.
    """
    step, rank = state.step, state.rank
    if any(share(os.path.exists(done_path(folder, step)))):  # an old set is about to be replaced file by file
        for values in (params, *arrays):
            if io.first_not_finite(as_file_dtype(values)) is not None:
                raise UserError(f"step {step} of {folder} is not replaced: the new weights are not finite. {EARLIER}")
        share(0)
        if rank == 0:
            remove(done_path(folder, step))
            fsync_folder(folder)
        share(0)
    paths = [state_path(folder, step, r) for r in range(state.num_processes)]
    model_crc = 0
    if rank == 0:
        model_crc = write_model(model_path(folder, step), header, params, version)
        extra = (state.extra or {}) | dict(model=fingerprint(model_path(folder, step)))
        state = dataclasses.replace(state, extra=extra)
    crcs = share(write_state(paths[rank], state, arrays))
    if rank == 0:
        files = zip((model_path(folder, step), *paths), (model_crc, *crcs), strict=True)
        sums = {os.path.basename(path): (crc, os.path.getsize(path)) for path, crc in files}
        write_done(done_path(folder, step), sums)


def delete_checkpoint(folder: io.Path, step: int) -> None:
    """Remove the checkpoint of `step`. The marker goes first, so a kill leaves no marker whose files are missing."""
    remove(done_path(folder, step))
    fsync_folder(folder)
    remove(model_path(folder, step))
    for name in list_folder(folder):
        if re.fullmatch(rf"state_{step:08d}_\d{{5,}}\.bin", name):
            remove(os.path.join(folder, name))


def apply_retention(folder: io.Path, step: int, keep: int, major: int) -> None:
    """Remove old checkpoints: of those up to `step` the newest `keep` stay, and those at multiples of `major`.

    keep, major: -nk (0 keeps all), -nm (0: none is special). llm.c deletes step - nk * n alone, which leaves strays at
    the last step and after an interruption. Call it once more after resuming at `step`: the run may have been killed
    after the save and before the deletion. The newest checkpoint with checksums always stays, as no other is known to
    be good.
    """
    past = [s for s in checkpoint_steps(folder) if s <= step]
    good = next((s for s in reversed(past) if has_sums(folder, s)), None)
    for old in past[:-keep] if keep > 0 else ():
        if old != good and not (major > 0 and old % major == 0):
            delete_checkpoint(folder, old)


def has_sums(folder: io.Path, step: int) -> bool:
    """Whether the marker of `step` has checksums, and is whole."""
    try:
        return bool(read_done(done_path(folder, step)))
    except UserError:
        return False


def prune_stray(folder: io.Path) -> list[str]:
    """Remove what a killed run left: temporary files, and sets without a marker that are older than the newest marker.

    A model file without a marker and without a state may have been kept on purpose: it stays. Call this at the start
    of a run that resumes, on rank 0, before any rank writes. Returns the removed names.
    """
    names, steps = list_folder(folder), checkpoint_steps(folder)
    ours = r"model_\d+\.bin|state_\d+_\d+\.bin|DONE_\d+|main\.log|metrics\.jsonl|nonfinite_\d+_\d+\.npz"
    temporary = rf"\.({ours})\.\d+(-[0-9a-f]+)?\.tmp"
    stray = [name for name in names if re.fullmatch(temporary, name)]
    for state in names:
        match = re.fullmatch(r"state_(\d{8,})_\d{5,}\.bin", state)
        if match and steps and int(match[1]) < steps[-1] and int(match[1]) not in steps:
            model = f"model_{match[1]}.bin"
            stray += [model, state] if model in names and model not in stray else [state]
    for name in stray:
        remove(os.path.join(folder, name))
    return stray


# ---------------------------------------------------------------------------------------------------------------------
# checking


def check_bits(folder: io.Path, step: int, states: bool = True) -> bool:
    """Check the bits of the files of `step` against its marker -> whether the marker has checksums.

    states: whether to read the states of the ranks, too. Errors: UserError that names the first file that differs.
    """
    sums = read_done(done_path(folder, step))
    for name, (crc, size) in (sums or {}).items():
        if states or name.startswith("model_"):
            check_file(os.path.join(folder, name), crc, size)
    return sums is not None


def check_model(path: io.Path) -> None:
    """Check the bits of a model file that is part of a finished checkpoint; of any other file nothing is known."""
    folder, name = os.path.split(path)
    match = re.fullmatch(r"model_(\d{8,})\.bin", name)
    if match and os.path.exists(done_path(folder, int(match[1]))):
        check_bits(folder, int(match[1]), states=False)


def unchecked(folder: io.Path, step: int) -> str:
    """A remark on a checkpoint whose marker has no checksums, or "" if it has them."""
    done = done_path(folder, step)
    return f"its bits are unchecked, as {os.path.basename(done)} is empty" if read_done(done) is None else ""


def verify(folder: io.Path) -> Iterator[str]:
    """A line about each finished checkpoint of a folder, read whole. Errors: UserError at the end if one is damaged."""
    steps, damaged = checkpoint_steps(folder), []
    if not steps:
        raise UserError(f"{folder} holds no finished checkpoint (DONE_*). HINT: name the output folder of a run")
    for step in steps:
        try:
            check_checkpoint(folder, step)
            yield f"step {step}: {unchecked(folder, step) or 'every bit is as it was written'}"
        except UserError as error:
            damaged.append(error)
            yield f"step {step}: {error}"
    if damaged:
        more = f", and {len(damaged) - 1} more of the {len(steps)} checkpoints" * (len(damaged) > 1)
        problem, _, hint = str(damaged[0]).partition(" HINT: ")
        raise UserError(f"{problem.rstrip('.')}{more}. HINT: {hint}")


def check_checkpoint(folder: io.Path, step: int, states: bool = True) -> None:
    """Check that the model and every rank's state of `step` are there, complete and belong together, or UserError.

    Where the marker has checksums, the bits of the model are checked as well, and with `states` those of the states.
    """
    check_bits(folder, step, states)
    path = model_path(folder, step)
    first = read_state_headers(folder, step, num_parameters(read_model_header(path)))[0]
    found, stated = fingerprint(path), (first.extra or {}).get("model")
    if stated is not None:
        what = f"{state_path(folder, step, 0)}: extra.model"
        stated = [parse.integer(number, what) for number in parse.array(stated, what, 2)]
    if stated and stated[0] == found[0] and stated != found:  # another version: the file was converted since
        raise UserError(
            f"{path} and {state_path(folder, step, 0)} are of different runs. HINT: copy both from the same checkpoint"
        )


def latest_checkpoint(folder: io.Path, states: bool = True) -> int | None:
    """The largest step with a DONE marker, None without any. states: as check_checkpoint takes it.

    Errors: UserError, naming the file, if a file of that step is missing or damaged; the hint names the newest older
    step that is intact. It never falls back by itself: that would train again over steps that were thought safe.
    """
    steps = checkpoint_steps(folder)
    if not steps:
        return None
    try:
        check_checkpoint(folder, steps[-1], states)
    except UserError as error:
        for step in reversed(steps[:-1]):
            with contextlib.suppress(UserError):
                check_checkpoint(folder, step, states)
                hint = f"step {step} is intact, to resume from it remove {done_path(folder, steps[-1])}"
                break
        else:
            hint = "no older checkpoint is intact"
        problem = str(error).split(" HINT: ")[0]
        raise UserError(f"checkpoint of step {steps[-1]}: {problem} HINT: {hint}") from error
    return steps[-1]


def read_state_headers(folder: io.Path, step: int, N: int) -> list[TrainState]:
    """read_state_header of every rank's state of `step` for a model of N parameters, which must belong together."""
    states: list[TrainState] = []
    lengths: tuple[int, ...] = ()
    P0 = None
    while P0 is None or len(states) < P0:
        rank, path = len(states), state_path(folder, step, len(states))
        if states and not os.path.exists(path):
            hint = "HINT: copy the states of all ranks into the folder"
            raise UserError(f"{path}: No such file, step {step} was written by {P0} ranks. {hint}")
        if not states:
            with io.open_checked(path, STATE_MAGIC, (1,)) as (_, words, _):
                lengths = (N, N // int(words[2])) if words[2] > 1 else (N,)
        state = read_state_header(path, lengths, num_processes=P0, rank=rank)
        P0, lengths = state.num_processes, (state.num_parameters,)
        if state.step != step:
            raise UserError(f"{path} is of step {state.step}, not {step}. HINT: copy it again")
        if states and state.use_master_weights != states[0].use_master_weights:
            raise UserError(f"{path} and the state of rank 0 are of different runs (-w). HINT: copy them again")
        states.append(state)
    return states


# ---------------------------------------------------------------------------------------------------------------------
# elastic resume: the states of P0 ranks, read by any number of ranks


def layer_sizes(specs: Sequence[Any]) -> list[int]:
    """Elements of each layer of each tensor, in checkpoint order; specs: gpt2.parameter_specs(config)."""
    return [spec.size // max(spec.layers, 1) for spec in specs for _ in range(max(spec.layers, 1))]


def read_state_elastic(
    folder: io.Path, step: int, specs: Sequence[Any], arrays: Sequence[np.ndarray], *, num_processes: int = 1,
    rank: int = 0, zero_stage: int = 0,
) -> list[TrainState]:  # fmt: skip
    """Write (=) arrays, (m, v) or (m, v, master), from the states of all ranks that wrote `step` -> those states.

    The states may be of any number of ranks P0, in llm.c's ZeRO-0 layout (each file holds all N elements) or its ZeRO-1
    layout (rank q holds the q-th of P0 equal parts of every layer of every tensor, one after the other in checkpoint
    order). The arrays, (S,) float32, get the layout of this run: S = N, or with zero_stage 1 the parts of `rank` of
    `num_processes`, S = N / num_processes. Only what is needed is read, layer by layer.

    The loader_state of each is for DataLoader.load_states. The random state is that of the first: all ranks have the
    same, as they share the noise of stochastic rounding.
    Errors: UserError as read_state, for a missing file, for files that do not belong together, and for layers that are
    no multiple of the number of ranks.
    """
    sizes = layer_sizes(specs)
    P, N = num_processes if zero_stage else 1, sum(sizes)
    rank = rank if zero_stage else 0
    states = read_state_headers(folder, step, N)
    P0 = len(states) if states[0].num_parameters < N else 1
    first = state_path(folder, step, 0)
    if len(arrays) == 3 and not states[0].use_master_weights:
        raise UserError(f"{first} has no master weights. HINT: resume with -w 0, as the run that wrote it")
    for ranks, whose in ((P0, f"the {P0} ranks that wrote {first}"), (P, f"-z 1 with {P} ranks")):
        if any(n % ranks for n in sizes):
            n = next(n for n in sizes if n % ranks)
            raise UserError(f"a layer of {n} parameters cannot be shared by {whose}. HINT: -z 0, or fewer ranks")
    for array in arrays:
        assert array.shape == (N // P,) and array.dtype == np.float32, (array.shape, array.dtype, N, P)
    for q in range(P0):
        with io.open_checked(state_path(folder, step, q), STATE_MAGIC, (1,)) as (file, _, _):
            for i, array in enumerate(arrays):
                at = 0  # where the layer starts in the flat parameters
                for n in sizes:
                    start, end = max(rank * n // P, q * n // P0), min((rank + 1) * n // P, (q + 1) * n // P0)
                    if start < end:  # rank q has elements of the layer that this rank wants: start to end
                        file.seek(HEADER_BYTES + 4 * (i * N // P0 + at // P0 + start - q * n // P0))
                        place = at // P + start - rank * n // P
                        io.read_into(file, array[place : place + end - start])
                    at += n
    return states
