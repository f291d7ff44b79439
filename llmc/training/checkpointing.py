"""A run's checkpoints: what is saved of a model, its loader and detectors, and how a run goes on from it.

The formats are in llmc/files. After a resume, everything that the next step reads has the bits that it had.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmc import loading
from llmc.errors import UserError
from llmc.files import checkpoints, model_file
from llmc.files.state_file import AT_THE_START, TrainState
from llmc.gpt2 import GPT2Config, num_parameters, parameter_specs
from llmc.model import Model
from llmc.training.settings import Settings


def save(
    folder: str,
    step: int,
    model: Model,
    loader: Any = None,
    detectors: Mapping[str, Any] | None = None,
    share: Callable[[int], list[int]] = checkpoints.alone,
) -> None:
    """Write model, train state of this rank and DONE marker of this step.

    All ranks call it. loader: None where the data has no state to go on from; detectors: name -> an object whose state
    is saved; share: gives a number of each rank to all of them, so it also waits for all.
    """
    host = model.ops.device.host_view
    header = {field: getattr(model.config, field) for field in model_file.MODEL_WORDS}
    state = TrainState(
        step,
        model.rng_state,
        model.rng_state_last_update,
        num_processes=model.num_ranks,
        rank=model.rank,
        loader_state=loader.state() if loader else AT_THE_START,
        extra={name: detector.state() for name, detector in (detectors or {}).items()},
    )
    arrays = [host(array) for array in (model.m, model.v, model.master) if array is not None]
    params, version = host(model.params_flat), 3 if model.dtype.name != "bfloat16" else 5
    if model.dtype == "float16":
        params = params.astype("float32")  # llm.c has no fp16 file; nothing is lost
    checkpoints.save_checkpoint(folder, header, params, version, state, arrays, share)


def let_go(folder: str, step: int, settings: Settings) -> None:
    """Remove what -nk and -nm no longer keep after the checkpoint of this step. For rank 0 alone."""
    checkpoints.apply_retention(folder, step, settings.checkpoints_keep, settings.major_checkpoint_every)


def check_resume(folder: str, step: int, config: GPT2Config, dtype: Any, use_master_weights: bool) -> None:
    """UserError for a checkpoint that load() could not continue from; found out before any memory is taken.

    dtype: that of the run. use_master_weights: whether the run is to go on from the master weights in the state.
    """
    version = model_file.read_model_header(checkpoints.model_path(folder, step))["version"]
    states = checkpoints.read_state_headers(folder, step, num_parameters(config))
    if use_master_weights and not states[0].use_master_weights and dtype != "float32" and version == 5:
        path = checkpoints.state_path(folder, step, 0)
        raise UserError(f"-w 1: {path} has no master weights. HINT: resume with -w 0, as the run that wrote it.")


def load(
    folder: str, step: int, model: Model, loader: Any, detectors: Mapping[str, Any], use_master_weights: bool
) -> None:
    """Continue from the checkpoint of this step: everything the next step reads gets the bits it had.

    Any number of ranks may have written it, with or without -z 1; this rank's optimizer state is put together from
    theirs.
    use_master_weights False: the weights come from the model file. True: they come from the master weights of the
    state; that of an fp32 run has none, its model file takes their place. A checkpoint with neither is an error.
    A run can change its precision: if the file has another one, the parameters are rounded from the master weights
    anew, with the noise of the last update.
    """
    model_path, N = checkpoints.model_path(folder, step), model.params_flat.size
    version = loading.read_weights(model, model_path)
    arrays = [model.m, model.v]
    weights = model.share.params if model.share else model.params_flat  # in fp32 their own master
    in_state = checkpoints.read_state_headers(folder, step, N)[0].use_master_weights
    if use_master_weights and (in_state or (model.master is not None and version == 5)):
        arrays.append(weights if model.master is None else model.master)
    hosts = [model.ops.device.host_view(array) for array in arrays]
    layout = dict(num_processes=model.num_ranks, rank=model.rank, zero_stage=int(model.share is not None))
    states = checkpoints.read_state_elastic(folder, step, parameter_specs(model.config), hosts, **layout)
    if model.master is not None and len(arrays) == 2:
        arrays.append(model.master)
        whole = np.empty(N, np.float32)
        model_file.read_model(model_path, whole)
        hosts.append(model.partition.of(whole) if model.partition else whole)
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
        what = f"{checkpoints.state_path(folder, step, 0)}: extra.{name}"
        detector.load_state((states[0].extra or {}).get(name), what)
