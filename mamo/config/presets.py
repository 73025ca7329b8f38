"""Sizes of the network: the values of `model.preset` in a config file."""

from mamo.config.values import Values

PRESETS: dict[str, Values] = {
    # The quick start: a step of 64 pairs takes a fraction of a second on two CPU cores.
    "tiny": {
        "preset": "tiny",
        "image": {"name": "vit_tiny_patch16_224", "patch_size_px": 8, "width": 192, "depth": 6, "heads": 3},
        "text": {"width": 192, "heads": 3, "mlp_width": 768, "layers": 3},
        "fusion_layers": 3,
        "itc_width": 128,
    },
    "small": {
        "preset": "small",
        "image": {"name": "vit_small_patch16_224", "width": 384, "depth": 12, "heads": 6},
        "text": {"width": 384, "heads": 6, "mlp_width": 1536, "layers": 6},
        "fusion_layers": 6,
        "itc_width": 256,
    },
    # The paper's: ViT-B/16 and BERT-base, six lower layers for text and six upper layers for fusion.
    "base": {
        "preset": "base",
        "image": {"name": "vit_base_patch16_224", "width": 768, "depth": 12, "heads": 12},
        "text": {"width": 768, "heads": 12, "mlp_width": 3072, "layers": 6},
        "fusion_layers": 6,
        "itc_width": 256,
    },
}
