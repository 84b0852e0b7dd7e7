"""Every field of `TrainingArguments`: a value that trains, or the sentence that refuses it before work."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest
from datasets import Dataset
from transformers import TrainingArguments

from hf_cosupervise import (
    CoSupervisedConfig,
    CoSupervisedTrainer,
    PseudolabelPool,
    Teacher,
    TeacherHierarchy,
    build_pool,
)
from hf_cosupervise.training import inherited

NAN, INF = math.nan, math.inf
EACH_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch"}
# A value that is not the default, and with it the others that it needs.
WORKS = {
    "activation_checkpointing": {"activation_checkpointing": False},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 1e-6},
    "average_tokens_across_devices": {"average_tokens_across_devices": False},
    "accelerator_config": {"accelerator_config": {"use_seedable_sampler": False}},
    "data_seed": {"data_seed": 7},
    "dataloader_drop_last": {
        "dataloader_drop_last": True,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 16,
    },
    "dataloader_in_order": {"dataloader_in_order": False},
    "dataloader_num_workers": {"dataloader_num_workers": 1},
    "dataloader_persistent_workers": {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
    "dataloader_prefetch_factor": {"dataloader_prefetch_factor": 1, "dataloader_num_workers": 1},
    "debug": {"debug": "underflow_overflow"},
    "eval_accumulation_steps": {"eval_accumulation_steps": 1},
    "eval_delay": {"eval_delay": 1, "eval_strategy": "epoch"},
    "eval_on_start": {"eval_on_start": True, "eval_strategy": "epoch"},
    "eval_steps": {"eval_steps": 2, "eval_strategy": "steps"},
    "eval_strategy": {"eval_strategy": "epoch"},
    "full_determinism": {"full_determinism": False},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "include_for_metrics": {"include_for_metrics": ["loss"]},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "learning_rate": {"learning_rate": 1e-2},
    "load_best_model_at_end": {
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "greater_is_better": True,
    }
    | EACH_EPOCH,
    "log_level": {"log_level": "error", "log_level_replica": "error"},
    "logging_first_step": {"logging_first_step": True},
    "logging_nan_inf_filter": {"logging_nan_inf_filter": False},
    "logging_steps": {"logging_steps": 0.5},
    "logging_strategy": {"logging_strategy": "epoch"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
    "lr_scheduler_type": {"lr_scheduler_type": "polynomial"},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "max_steps": {"max_steps": 2, "num_train_epochs": 0},
    "num_train_epochs": {"num_train_epochs": 0.5},
    "optim": {"optim": "adafactor"},
    "per_device_eval_batch_size": {"per_device_eval_batch_size": 5},
    "per_device_train_batch_size": {"per_device_train_batch_size": 5},
    "prediction_loss_only": {"prediction_loss_only": True},
    "save_steps": {"save_steps": 1, "save_strategy": "steps", "save_total_limit": 1},
    "save_strategy": {"save_strategy": "epoch"},
    "seed": {"seed": 7},
    "skip_memory_metrics": {"skip_memory_metrics": False},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "train_sampling_strategy": {"train_sampling_strategy": "sequential"},
    "warmup_steps": {"warmup_steps": 0.5},
    "weight_decay": {"weight_decay": 0.1},
    "bf16": {"bf16": True},
}
REFUSED = {
    "adam_beta1": (1.0, "`adam_beta1` must be a number of at least 0 and below 1, got 1.0. Leave it out for 0.9."),
    "adam_beta2": (NAN, "`adam_beta2` must be a number of at least 0 and below 1, got nan. Leave it out for 0.999."),
    "adam_epsilon": (0, "`adam_epsilon` must be a finite number above 0, got 0. Leave it out for 1e-08."),
    "auto_find_batch_size": (
        True,
        "`auto_find_batch_size` must stay False: another batch size makes another student.",
    ),
    "bf16": ("False", "`bf16` must be True or False, got 'False'. Write it without quotes."),
    "bf16_full_eval": (True, "`bf16_full_eval` must stay False: it leaves the student itself in half precision."),
    "data_seed": (-1, "`data_seed` must be a whole number from 0 to 2**32 - 1, got -1. Leave it out."),
    "dataloader_multiprocessing_context": ("x", "must be 'fork', 'forkserver' or 'spawn', got 'x'. Leave it out."),
    "dataloader_num_workers": (-1, "`dataloader_num_workers` must be a whole number of at least 0, got -1."),
    "dataloader_prefetch_factor": (0, "`dataloader_prefetch_factor` must be a whole number of at least 1, got 0."),
    "ddp_timeout": (0, "`ddp_timeout` must be a whole number of at least 1, got 0. Leave it out for 1800."),
    "enable_jit_checkpoint": (
        True,
        "`enable_jit_checkpoint` must stay False: a run that was ended goes on by itself.",
    ),
    "eval_accumulation_steps": (0, "`eval_accumulation_steps` must be a whole number of at least 1, got 0."),
    "eval_delay": (-1, "`eval_delay` must be a finite number of at least 0, got -1. Leave it out for 0."),
    "eval_steps": (0, "`eval_steps` must be a finite number above 0, got 0. Leave it out."),
    "fp16_full_eval": (True, "`fp16_full_eval` must stay False"),
    "gradient_accumulation_steps": (-1, "must be a whole number of at least 1, got -1. Leave it out for 1."),
    "ignore_data_skip": (True, "`ignore_data_skip` must stay False: a level that is gone on with would see"),
    "include_for_metrics": (["rows"], "`include_for_metrics` must be a list of 'inputs' and 'loss', got ['rows']."),
    "label_names": (["gold"], "`label_names` must be ['labels'], as the collator calls them, got ['gold']."),
    "label_smoothing_factor": (1.5, "must be a number of at least 0 and below 1, got 1.5. Leave it out for 0.0."),
    "learning_rate": (INF, "`learning_rate` must be a finite number above 0, got inf. Leave it out for 0.001."),
    "log_level": ("loud", "`log_level` must be one of ['detail', 'debug', "),
    "log_level_replica": ("loud", "`log_level_replica` must be one of ['detail', 'debug', "),
    "logging_steps": (NAN, "`logging_steps` must be a finite number above 0, got nan. Leave it out for 500."),
    "lr_scheduler_kwargs": ("x", "`lr_scheduler_kwargs` must be a dictionary, got 'x'. Leave it out."),
    "max_grad_norm": (NAN, "`max_grad_norm` must be a finite number of at least 0, got nan. Leave it out for 0.0."),
    "max_steps": (1.5, "`max_steps` must be -1 (no limit), or a whole number of at least 1, got 1.5."),
    "neftune_noise_alpha": (-1, "`neftune_noise_alpha` must be a finite number above 0, got -1. Leave it out."),
    "num_train_epochs": (0, "`num_train_epochs` must be a finite number above 0, or `max_steps` be given, got 0"),
    "optim_args": ("nonsense", "`optim_args` must be `name=value` pairs with commas between them, got 'nonsense'."),
    "parallelism_config": ({"x": 1}, "`parallelism_config` must be a `ParallelismConfig`, got {'x': 1}."),
    "per_device_eval_batch_size": (0, "`per_device_eval_batch_size` must be a whole number of at least 1, got 0."),
    "per_device_train_batch_size": (0, "`per_device_train_batch_size` must be a whole number of at least 1, got 0."),
    "remove_unused_columns": (True, "`remove_unused_columns` must stay False: the collator reads the raw columns."),
    "report_to": ("tensorbord", "`report_to` must name trackers, ['azure_ml', "),
    "restore_callback_states_from_checkpoint": (True, "must stay False: a run goes on with the callbacks that it is"),
    "save_only_model": (True, "`save_only_model` must stay False: a checkpoint is there to go on from, which needs"),
    "save_steps": (-1, "`save_steps` must be a finite number above 0, got -1. Leave it out for 500."),
    "save_total_limit": (0, "`save_total_limit` must be a whole number of at least 1, got 0. Leave it out."),
    "seed": (1.5, "`seed` must be a whole number from 0 to 2**32 - 1, got 1.5. Leave it out for 42."),
    "torch_empty_cache_steps": (0, "`torch_empty_cache_steps` must be a whole number of at least 1, got 0."),
    "torch_compile_backend": ("nonsense", "`torch_compile_backend` must be a backend that accelerate knows, such"),
    "train_sampling_strategy": ("group_by_length", "`train_sampling_strategy` must be 'random' or 'sequential', got"),
    "use_cpu": (1, "`use_cpu` must be True or False, got 1."),
    "warmup_steps": (-1, "`warmup_steps` must be a finite number of at least 0, got -1. Leave it out for 0."),
    "weight_decay": (INF, "`weight_decay` must be a finite number of at least 0, got inf. Leave it out for 0.0."),
}
# More of the same kinds: epochs, texts and booleans for numbers, seeds, sizes, rates.
ALSO_REFUSED = {
    "num_train_epochs": (-1, NAN, INF, "3", True, None),
    "max_steps": (0, -2, NAN, True, "7"),
    "learning_rate": (0, -1, NAN, "1e-3", None, True),
    "seed": (-1, 2**32, NAN, None, True, 2**63),
    "data_seed": (2**64, 0.5),
    "warmup_steps": (NAN, "2", None),
    "weight_decay": (-1, NAN),
    "adam_beta1": (-0.1, NAN),
    "adam_epsilon": (-1, NAN),
    "gradient_accumulation_steps": (0, 1.5, None),
    "label_smoothing_factor": (-0.1, 1.0, NAN),
    "per_device_train_batch_size": (-1, 1.5, "8"),
    "per_device_eval_batch_size": (-1, 2.5),
    "save_total_limit": (-1,),
    "logging_steps": (-1, 0, INF),
    "max_grad_norm": (-1, INF),
    "train_sampling_strategy": ("batch_rebalance", "sorted", None),
    "do_train": ("yes",),
    "push_to_hub": ("false",),
    "load_best_model_at_end": (None,),
    "optim_args": ("a=1,b", "{}", "3"),
    "report_to": ("", ["tensorboard", "nobody"]),
}
# Passed on as they are: names, places, and what concerns machines, trackers and the Hub; the parent checks them.
PASSED_ON = {
    *("activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object", "metric_for_best_model"),
    *("greater_is_better", "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_static_graph"),
    *("ddp_find_unused_parameters", "deepspeed", "disable_tqdm", "do_eval", "do_predict", "do_train", "fp16"),
    *("fsdp", "fsdp_config", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy"),
    *("hub_token", "length_column_name", "liger_kernel_config", "local_rank", "log_on_each_node"),
    *("optim_target_modules", "output_dir", "project", "push_to_hub", "resume_from_checkpoint"),
    *("run_name", "save_on_each_node", "tf32", "torch_compile", "torch_compile_mode"),
    *("trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "use_cache", "use_liger_kernel"),
    "dataloader_pin_memory",
}


@pytest.fixture(scope="module")
def pool(tiny_image_dataset: Dataset) -> PseudolabelPool:
    names = tiny_image_dataset.features["label"].names
    votes = [names[label] for label in tiny_image_dataset["label"]]
    data = tiny_image_dataset.remove_columns("label").add_column("root", votes).add_column("low", votes)
    teachers = [Teacher("root", kind="column"), Teacher("low", kind="column", level=1)]
    return build_pool(data, TeacherHierarchy(names, teachers), disable_tqdm=True)


def config(folder, **kwargs) -> CoSupervisedConfig:
    return CoSupervisedConfig(
        str(folder), **{"num_train_epochs": 1, "report_to": "none", "disable_tqdm": True} | kwargs
    )


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    def lacking():
        raise RuntimeError("WandbCallback requires wandb to be installed. Run `pip install wandb`.")

    monkeypatch.setattr(inherited, "get_available_reporting_integrations", list)
    monkeypatch.setitem(inherited.INTEGRATION_TO_CALLBACK, "wandb", lacking)
    with pytest.raises(ValueError, match="`report_to` must name trackers that are installed, got 'wandb': WandbCallb"):
        config(tmp_path, report_to="wandb")


def test_every_field_stands_in_a_table():
    known = {*WORKS, *REFUSED, *PASSED_ON}
    assert [item.name for item in fields(TrainingArguments) if item.name not in known] == []


@pytest.mark.parametrize(
    ("name", "student_training"),
    [*((name, "probe") for name in WORKS), ("optim", "full"), ("save_steps", "full"), ("bf16", "full")],
)
def test_what_is_not_refused_trains(name, student_training, pool, tiny_vit, tiny_image_dataset, tmp_path):
    if name not in {item.name for item in fields(TrainingArguments)}:
        pytest.skip("another release of transformers")
    args = config(tmp_path, student_training=student_training, **WORKS[name])
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=pool, eval_dataset=tiny_image_dataset)
    output = trainer.train()
    assert output.global_step >= 2 and math.isfinite(output.training_loss)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_go_wrong_is_refused_before_work(name, tmp_path):
    if name not in {item.name for item in fields(TrainingArguments)}:
        pytest.skip("another release of transformers")
    value, sentence = REFUSED[name]
    with pytest.raises(ValueError) as error:
        config(tmp_path / "run", **{name: value})
    assert sentence in str(error.value) and f"`{name}`" in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, value", [(name, value) for name, values in ALSO_REFUSED.items() for value in values])
def test_other_values_of_the_kind_are_refused_too(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"^`{name}` must "):
        config(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "`lr_scheduler_type` 'warmup_stable_decay' takes, got None"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "what `lr_scheduler_type` 'cosine_with_min_lr' takes, got None"),
        ({"lr_scheduler_kwargs": {"x": 1}}, "what `lr_scheduler_type` 'cosine' takes, got {'x': 1}"),
        ({"eval_do_concat_batches": False}, "`eval_do_concat_batches` False needs `compute_metrics` of your own"),
        ({"batch_eval_metrics": True}, "`batch_eval_metrics` True needs `compute_metrics` of your own"),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "f1"} | EACH_EPOCH,
            "`metric_for_best_model` 'f1' needs `compute_metrics` of your own",
        ),
        ({"max_steps": 3, "num_train_epochs": NAN}, "`num_train_epochs` must be a finite number above 0"),
        ({"max_steps": 3, "num_train_epochs": INF}, "`num_train_epochs` must be a finite number above 0"),
        ({"dataloader_persistent_workers": True}, "is for `dataloader_num_workers` above 0, got True with 0"),
        ({"dataloader_multiprocessing_context": "spawn"}, "is for `dataloader_num_workers` above 0, got 'spawn'"),
        ({"cross_fit_folds": 10**11}, "`cross_fit_folds` must be at most the "),
        ({"rounds_per_level": 10**11}, "`rounds_per_level` must be a whole number from 1 to 1000"),
        ({"self_training_rounds": 10**11}, "`self_training_rounds` must be a whole number from 0 to 1000"),
        ({"neftune_noise_alpha": 5.0}, "is for a backbone that learns, got `student_training` 'probe'"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_work(
    kwargs, sentence, pool, tiny_vit, tiny_image_dataset, tmp_path
):
    with pytest.raises((ValueError, ImportError)) as error:
        CoSupervisedTrainer(tiny_vit, config(tmp_path, **kwargs), pool=pool, eval_dataset=tiny_image_dataset)
    assert sentence in str(error.value)
    assert not (tmp_path / "_run").exists()


def test_a_dictionary_may_come_from_the_command_line(tmp_path):
    args = config(tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr": 1e-5}')
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("lr_scheduler_type", "nonsense", "nonsense is not a valid SchedulerType"),
        ("save_strategy", "sometimes", "sometimes is not a valid SaveStrategy"),
        ("hub_strategy", "never", "never is not a valid HubStrategy"),
        ("fsdp", "nonsense", "nonsense"),
        ("accelerator_config", "no/such.json", "no/such.json"),
    ],
)
def test_what_transformers_refuses_by_its_own_sentence_gets_advice(name, value, sentence, tmp_path):
    with pytest.raises((ValueError, OSError)) as error:
        config(tmp_path, **{name: value})
    assert sentence in str(error.value) and "Correct that one, or leave it out." in error.value.__notes__[-1]


def test_what_was_chosen_can_be_written_down(tmp_path):
    args = config(tmp_path, accelerator_config={"use_seedable_sampler": False})
    written = json.loads(json.dumps(args.changed_arguments()))
    assert written["accelerator_config"]["use_seedable_sampler"] is False


def test_a_trainer_of_our_kind_makes_its_students_itself(pool, tiny_vit, tmp_path):
    with pytest.raises(ValueError, match="`model_init` cannot be given: each level begins with a fresh head"):
        CoSupervisedTrainer(tiny_vit, config(tmp_path), pool=pool, model_init=lambda: None)
    with pytest.raises(NotImplementedError, match="`hyperparameter_search` would choose by labels"):
        CoSupervisedTrainer(tiny_vit, config(tmp_path), pool=pool).hyperparameter_search()
