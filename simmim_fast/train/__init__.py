"""The trainer: configuration, loop, optimizer, schedule, checkpoints."""

from simmim_fast.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from simmim_fast.train.config import OptimizerConfig, PretrainConfig, ScheduleConfig
from simmim_fast.train.graph import GraphedStep
from simmim_fast.train.job import Job, prepare
from simmim_fast.train.loop import pretrain, train
from simmim_fast.train.optim import build_optimizer, finetune_groups, pretrain_groups, swin_layers, vit_layers
from simmim_fast.train.options import dump_config, read_config
from simmim_fast.train.schedule import Schedule, build_schedule, set_learning_rates
from simmim_fast.train.step import train_step

__all__ = [
    "GraphedStep",
    "Job",
    "OptimizerConfig",
    "PretrainConfig",
    "Schedule",
    "ScheduleConfig",
    "build_optimizer",
    "build_schedule",
    "dump_config",
    "find_checkpoint",
    "finetune_groups",
    "load_checkpoint",
    "prepare",
    "pretrain",
    "pretrain_groups",
    "read_config",
    "save_checkpoint",
    "set_learning_rates",
    "swin_layers",
    "train",
    "train_step",
    "vit_layers",
]
