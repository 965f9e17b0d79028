# SPDX-License-Identifier: Apache-2.0
"""SegNet at a quarter of its widths on CamVid at 120x160: a laptop's evening.

    JAXPRUNE_CAMVID=.../CamVid jaxprune run configs/camvid_segnet_laptop.py

Hardware: 2 CPU cores, about an hour: a dense epoch takes 24 s here. mIoU to expect on
validation / test: dense .531 / .418, pruned to a quarter of the FLOPs .548 / .430, its
widths from scratch .504 / .418; over seeds 0 to 2 .524 / .410, .537 / .424, .519 /
.420.
"""

from jaxprune import data, train


def get_config() -> train.Config:
    """Train, cut to a quarter of the FLOPs by the path, retrain; and from scratch."""
    return train.Config(
        name="camvid_segnet_laptop",
        network=train.Network("segnet", widths=(16, 32, 64, 128, 128)),
        data=train.Data(
            "camvid",
            size=(120, 160),
            stored=(240, 320),
            augment=data.Augment(scale=(0.9, 1.25), colour=0.2, gamma=0.15),
        ),
        train=train.Fit(
            epochs=24, batch=8, optimizer="muon", lr=2e-3, ema=0.99, jaccard=1.0
        ),
        prune=train.Prune(
            "path",
            ratio=0.25,
            multiple_of=4,
            min_channels=4,
            block=0.06,
            rounds=4,
            recovery_epochs=5,
        ),
        # Trained already, the network bears stronger augmentation and milder weights.
        retrain=train.Fit(
            epochs=68,
            batch=8,
            optimizer="muon",
            lr=1.5e-3,
            ema=0.99,
            jaccard=1.0,
            class_weights=0.25,
            augment=1.75,
        ),
        scratch=True,
        evaluate=train.Evaluate(every=10),
        save_every=5,
    )
