"""The contract of an optimizer with a posterior, tried on `blr.IVON` and on the public `ivon-opt`.

    python benchmarks/contract.py [--json book/results/contract.json]

Each probe is run with both, and either what an engineer relies on "holds", or the row says what
happened in its place: a number that was measured, or the error. Each row names the test that holds
`blr.IVON` to it. `ivon-opt` is run as it is installed; its noise comes from torch's global
generator, so probes seed that before each sample, and what is compared has seen the same noise.
What needs several processes or a GPU is not here but in the tests of those.
"""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _probes as at_rest
import _probes_training as training
import torch
from _machine import provenance, report
from _probes import HOLDS, Make

import blr

# A neighbour of this file has the name of the public package; do not find it in its place.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

import ivon  # noqa: E402


def ours(params: Any, **options: Any) -> blr.IVON:
    options.pop("samples", None)
    return blr.IVON(params, **options)


def theirs(params: Any, **options: Any) -> Any:
    b1, b2 = options.pop("betas")
    samples = options.pop("samples", 1)
    return ivon.IVON(params, **options, beta1=b1, beta2=b2, mc_samples=samples)


def their_precision(optimizer: Any) -> torch.Tensor:
    (group,) = optimizer.param_groups
    return group["ess"] * (group["hess"] + group["weight_decay"])


OURS = Make(ours, lambda optimizer: optimizer.posterior().precision)
THEIRS = Make(theirs, their_precision)

# ---- the table ----------------------------------------------------------------------------------

CONTRACT = "tests/test_optim_contract.py::test_"
IVON, TRAINERS = "tests/test_ivon.py::test_", "tests/test_trainers.py::test_"

Probe = Callable[[Make], str]
PROBES: tuple[tuple[str, Probe, str], ...] = (
    ("resume from state_dict alone, bit by bit", at_rest.resume,
     CONTRACT + "resuming_from_the_state_dict_alone_is_exact_to_the_bit"),
    ("an exception inside of a sample restores the mean", at_rest.exception,
     CONTRACT + "an_exception_inside_restores_the_mean_and_teaches_nothing"),
    ("contexts nest", at_rest.nested,
     CONTRACT + "contexts_nest_and_what_cannot_be_meant_is_refused"),
    ("a parameter that the loss does not use", at_rest.unused,
     CONTRACT + "a_parameter_that_the_loss_does_not_use_stays_as_it_is"),
    ("a frozen parameter", at_rest.frozen,
     CONTRACT + "a_frozen_parameter_is_neither_sampled_nor_moved_and_may_thaw"),
    ("tied parameters", at_rest.tied, CONTRACT + "tied_parameters_are_one_parameter"),
    ("step() without a sample or a gradient", at_rest.no_sample,
     CONTRACT + "step_without_a_sample_says_what_to_do"),
    ("step() with gradients of no sample says so", at_rest.gradients_without_sample,
     CONTRACT + "step_without_a_sample_says_what_to_do"),
    ("a standard closure", at_rest.closure,
     CONTRACT + "a_standard_closure_is_evaluated_at_a_sample"),
    ("an unchanged loop between train() and eval()", at_rest.train_and_eval,
     CONTRACT + "train_makes_an_unchanged_loop_equal_to_contexts"),
    ("add_param_group during training", at_rest.added_group,
     CONTRACT + "groups_have_their_own_options_and_may_be_added_during_training"),
    ("weight_decay=0 for a group", at_rest.group_options,
     CONTRACT + "no_weight_decay_for_some_is_a_group"),
    ("GradScaler", training.loss_scaler, CONTRACT + "a_loss_scaler_changes_nothing"),
    ("a step that GradScaler skips leaves no trace", training.skipped_step,
     CONTRACT + "a_step_that_the_loss_scaler_skips_is_forgotten"),
    ("clip_grad_norm_ before the step", training.clipping,
     CONTRACT + "clipping_the_gradient_norm_clips_slope_and_curvature_alike"),
    ("accumulation at one sample", training.accumulation,
     CONTRACT + "accumulated_micro_batches_equal_the_full_batch"),
    ("accumulation, a sample for each micro-batch", training.accumulation_of_samples,
     CONTRACT + "accumulated_micro_batches_equal_the_full_batch"),
    ("a NaN gradient leaves all as it was, and is told", training.not_finite,
     CONTRACT + "gradients_that_are_not_finite_leave_everything_as_it_is_and_are_told_once"),
    ("learning rate schedules", training.schedulers, CONTRACT + "schedulers_set_the_rate"),
    ("float32 beside float64", training.mixed_types, CONTRACT + "types_may_be_mixed"),
    ("bf16 parameters: the curvature moves", training.short_curvature,
     CONTRACT + "short_parameters_have_their_mean_and_curvature_in_float32"),
    ("bf16 parameters: small steps add up", training.short_mean,
     CONTRACT + "short_parameters_have_their_mean_and_curvature_in_float32"),
    ("model.double() after some steps", training.later_type,
     CONTRACT + "state_follows_a_model_that_changes_its_type"),
    ("weights loaded after construction are kept", at_rest.loaded_later,
     CONTRACT + "weights_that_are_loaded_into_short_parameters_are_taken_over"),
    ("parameters stay where they are in memory", at_rest.storage,
     CONTRACT + "layout_storage_and_address_are_kept"),
    ("saving a layer writes that layer only", at_rest.saving_a_layer,
     CONTRACT + "saving_a_layer_writes_that_layer_only"),
    ("safetensors saves the model", at_rest.safetensors,
     CONTRACT + "safetensors_saves_a_trained_model_and_reads_it_back"),
    ("aliases made before see the steps", at_rest.aliases,
     CONTRACT + "aliases_made_before_the_optimizer_see_its_steps"),
    ("channels_last is kept", at_rest.channels_last,
     CONTRACT + "models_in_channels_last_train_as_others_do"),
    ("deepcopy continues alike, and apart", at_rest.copies(copy.deepcopy),
     CONTRACT + "copies_continue_alike_and_apart"),
    ("pickle continues alike, and apart", at_rest.copies(lambda x: pickle.loads(pickle.dumps(x))),
     CONTRACT + "copies_continue_alike_and_apart"),
    ("a compiled model", training.compiled, CONTRACT + "compiled_models_see_samples_and_steps"),
    ("a parametrised model", training.parametrised, CONTRACT + "parametrised_models_train"),
    ("BatchNorm's statistics are left alone", training.batch_norm,
     CONTRACT + "batch_norm_statistics_are_not_parameters"),
    ("several samples inside of one autocast", training.autocast,
     CONTRACT + "autocast_sees_every_sample"),
    ("the noise leaves the global generator alone", training.untouched_generator,
     CONTRACT + "the_random_numbers_of_dropout_and_of_the_data_are_not_touched"),
    ("looking at samples does not change the training", training.looking,
     CONTRACT + "looking_at_samples_does_not_change_the_training"),
    ("a seed of its own", training.own_seed,
     CONTRACT + "seeds_make_the_noise_and_equal_seeds_equal_noise"),
    ("the posterior, as wide as the samples", training.accessor,
     CONTRACT + "samples_have_the_spread_of_the_posterior"),
    ("the precision stays positive", training.positive,
     IVON + "curvature_keeps_at_least_half_of_its_value_whatever_the_gradient"),
    ("any diagonal Gaussian as the prior", training.own_prior,
     IVON + "posterior_of_one_task_is_the_prior_of_the_next"),
    ("options out of range are refused", training.option_errors,
     CONTRACT + "an_option_out_of_range_is_named_with_its_value_and_the_remedy"),
    ("accelerate.prepare changes nothing", training.accelerate_prepare,
     TRAINERS + "accelerate_trains_as_a_plain_loop_does"),
    ("torch.distributed.checkpoint takes and gives the state", training.distributed_state,
     CONTRACT + "distributed_checkpoints_take_and_give_the_state"),
)  # fmt: skip


def tried(probe: Probe, make: Make) -> str:
    """What a probe finds: that it holds, what happened, or the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return probe(make)
    except Exception as error:
        return said(error)


def said(error: Exception) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 60 else text[:57].rstrip() + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def only_theirs() -> list[str]:
    """Options of the public package that have no counterpart here."""
    names = {
        "beta1": "betas",
        "beta2": "betas",
        "mc_samples": "how often a sample is entered",
        "sync": "blr.optim.per_rank_noise",
    }
    options = inspect.signature(ivon.IVON).parameters
    known = inspect.signature(blr.IVON).parameters
    return [name for name in options if name not in known and name not in names]


def measure() -> dict[str, Any]:
    """The table, and where it was made."""
    torch.set_num_threads(1)
    rows = [
        {"behaviour": name, "blr": tried(f, OURS), "ivon-opt": tried(f, THEIRS), "test": test}
        for name, f, test in PROBES
    ]
    about = provenance() | {"command": "python benchmarks/contract.py"}
    about["versions"]["ivon-opt"] = importlib.metadata.version("ivon-opt")
    about["versions"]["blr"] = blr.__version__
    count = {name: sum(row[name] == HOLDS for row in rows) for name in ("blr", "ivon-opt")}
    return about | {"holds": count, "only in ivon-opt": only_theirs(), "rows": rows}


if __name__ == "__main__":
    report(__doc__, measure)
