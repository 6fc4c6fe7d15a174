"""The released configurations by name, and smaller ones: arguments of `create_model`, with official values."""

from __future__ import annotations

_BASE_192 = {"img_size": 192, "embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}

PRESETS: dict[str, dict[str, object]] = {
    "simmim_swin_tiny_192": {
        "encoder": "swin",
        "img_size": 192,
        "embed_dim": 96,
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
        "window_size": 6,
        "drop_path_rate": 0.0,
    },
    "simmim_swin_small_192": {
        "encoder": "swin",
        "img_size": 192,
        "embed_dim": 96,
        "depths": (2, 2, 18, 2),
        "num_heads": (3, 6, 12, 24),
        "window_size": 6,
        "drop_path_rate": 0.0,
    },
    # simmim_pretrain__swin_base__img192_window6__800ep.yaml
    "simmim_swin_base_192": {"encoder": "swin", **_BASE_192, "window_size": 6, "drop_path_rate": 0.0},
    # simmim_pretrain__swin_large__img192_window12__800ep.yaml
    "simmim_swin_large_192": {
        "encoder": "swin",
        "img_size": 192,
        "embed_dim": 192,
        "depths": (2, 2, 18, 2),
        "num_heads": (6, 12, 24, 48),
        "window_size": 12,
        "drop_path_rate": 0.0,
    },
    # simmim_pretrain__swinv2_base__img192_window12__800ep.yaml
    "simmim_swinv2_base_192": {
        "encoder": "swinv2",
        **_BASE_192,
        "window_size": 12,
        "drop_path_rate": 0.1,
        "norm_target": True,
        "norm_target_patch_size": 47,
    },
    # simmim_pretrain__vit_base__img224__800ep.yaml
    "simmim_vit_base_224": {
        "encoder": "vit",
        "img_size": 224,
        "patch_size": 16,
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
        "mlp_ratio": 4,
        "qkv_bias": True,
        "init_values": 0.1,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
        "use_mean_pooling": False,
        "drop_path_rate": 0.1,
    },
}
