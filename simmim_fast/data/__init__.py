"""Images for pre-training: folders, transforms and the loader. Decoding is Pillow's, augmentation torchvision's."""

from simmim_fast.data.images import Batch, ImageFolder, Sample, SampleKey, UnreadableImage, read_image, stream_seed
from simmim_fast.data.loader import EpochStream, build_loader
from simmim_fast.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    channel_stats,
    denormalize,
    eval_transform,
    pretrain_transform,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "EpochStream",
    "ImageFolder",
    "Sample",
    "SampleKey",
    "UnreadableImage",
    "build_loader",
    "channel_stats",
    "denormalize",
    "eval_transform",
    "pretrain_transform",
    "read_image",
    "stream_seed",
]
