"""The official script with one import changed: its optimizer, scheduler and loop, against our names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import optim

from simmim_fast import MaskGenerator
from simmim_fast.models import build_model
from simmim_fast.models.official_config import read_official_config

OFFICIAL = """
MODEL:
  TYPE: {kind}
  NAME: simmim_pretrain
  DROP_PATH_RATE: 0.0
  SWIN: {{EMBED_DIM: 8, DEPTHS: [1, 1, 1, 1], NUM_HEADS: [1, 1, 2, 2], WINDOW_SIZE: 4}}
  SWINV2: {{EMBED_DIM: 8, DEPTHS: [1, 1, 1, 1], NUM_HEADS: [1, 1, 2, 2], WINDOW_SIZE: 4}}
  VIT: {{EMBED_DIM: 16, DEPTH: 2, NUM_HEADS: 2}}
DATA: {{IMG_SIZE: 64, BATCH_SIZE: 4, MASK_PATCH_SIZE: 32, MASK_RATIO: 0.6}}
TRAIN: {{EPOCHS: 2, WARMUP_EPOCHS: 1, BASE_LR: 5e-3, WARMUP_LR: 5e-5, WEIGHT_DECAY: 0.05,
  ACCUMULATION_STEPS: {accumulation_steps}}}
"""


def build_optimizer(config, model):
    """As optimizer.py: what is not decayed goes by shape, suffix, name and keyword."""
    skip, keywords = model.no_weight_decay(), model.no_weight_decay_keywords()
    decayed, others = [], []
    for name, param in model.named_parameters():
        plain = len(param.shape) == 1 or name.endswith(".bias") or name in skip or any(k in name for k in keywords)
        (others if plain else decayed).append(param)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    train = config.TRAIN
    return optim.AdamW(
        groups, eps=train.OPTIMIZER.EPS, betas=train.OPTIMIZER.BETAS, lr=train.BASE_LR, weight_decay=train.WEIGHT_DECAY
    )


class CosineScheduler:
    """As timm's, called by the official script after every update."""

    def __init__(self, config, optimizer, per_epoch):
        self.optimizer, self.train = optimizer, config.TRAIN
        self.steps, self.warmup = config.TRAIN.EPOCHS * per_epoch, config.TRAIN.WARMUP_EPOCHS * per_epoch
        self._set(config.TRAIN.WARMUP_LR)

    def step_update(self, update):
        low, high, least = self.train.WARMUP_LR, self.train.BASE_LR, self.train.MIN_LR
        if update < self.warmup:
            self._set(low + update * (high - low) / self.warmup)
        else:
            self._set(least + 0.5 * (high - least) * (1 + math.cos(math.pi * update / self.steps)))

    def _set(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr


@pytest.mark.parametrize("kind", ["swin", "swinv2", "vit"])
@pytest.mark.parametrize("accumulation_steps", [0, 2])
def test_official_loop(kind, accumulation_steps, tmp_path):
    (tmp_path / "official.yaml").write_text(OFFICIAL.format(kind=kind, accumulation_steps=accumulation_steps))
    config = read_official_config(tmp_path / "official.yaml")
    torch.manual_seed(config.SEED)
    patch = config.MODEL[kind.upper()].PATCH_SIZE
    mask_generator = MaskGenerator(config.DATA.IMG_SIZE, config.DATA.MASK_PATCH_SIZE, patch, config.DATA.MASK_RATIO)
    images = torch.randn(config.DATA.BATCH_SIZE, 3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)
    num_steps = 8

    model = build_model(config, is_pretrain=True)
    optimizer = build_optimizer(config, model)
    lr_scheduler = CosineScheduler(config, optimizer, num_steps)
    losses = []
    for epoch in range(config.TRAIN.EPOCHS):
        model.train()
        optimizer.zero_grad()
        for idx in range(num_steps):
            mask = torch.stack([torch.from_numpy(mask_generator()) for _ in images])
            loss = model(images, mask)
            losses.append(loss.item())
            if config.TRAIN.ACCUMULATION_STEPS > 1:
                loss = loss / config.TRAIN.ACCUMULATION_STEPS
                loss.backward()
                grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.TRAIN.CLIP_GRAD)
                if (idx + 1) % config.TRAIN.ACCUMULATION_STEPS == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    lr_scheduler.step_update(epoch * num_steps + idx)
            else:
                optimizer.zero_grad()
                loss.backward()
                grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.TRAIN.CLIP_GRAD)
                optimizer.step()
                lr_scheduler.step_update(epoch * num_steps + idx)
            assert torch.isfinite(grad_norm)
    assert sum(losses[-4:]) < sum(losses[:4])
    torch.save({"model": model.state_dict()}, tmp_path / "ckpt.pth")
    build_model(config).load_state_dict(torch.load(tmp_path / "ckpt.pth")["model"], strict=True)
    assert build_model(config, is_pretrain=False).head.out_features == config.MODEL.NUM_CLASSES
