# SPDX-License-Identifier: Apache-2.0
"""A small SegNet on synthetic street scenes: trained, pruned, retrained in minutes.

    jaxprune run configs/quickstart.py --workdir runs/quickstart

Hardware: 2 CPU cores, 6 minutes. To expect, mIoU on validation / test: dense .464 /
.461, pruned to 35 % of the FLOPs .516 / .511 (docs/results.md).
"""

from jaxprune import data, train


def get_config() -> train.Config:
    """Train, cut to a third of the FLOPs along the path, retrain for longer."""
    return train.Config(
        name="quickstart",
        network=train.Network("segnet", widths=(16, 24, 32, 32, 32)),
        data=train.Data(
            "synthetic",
            size=(64, 96),
            counts=(400, 64, 64),
            augment=data.Augment(scale=(1.0, 1.3), colour=0.1),
        ),
        train=train.Fit(epochs=9, batch=8, optimizer="muon", lr=3e-3, ema=0.98),
        prune=train.Prune(
            "path",
            ratio=0.35,
            multiple_of=4,
            min_channels=4,
            block=0.1,
            batches=6,
        ),
        retrain=train.Fit(epochs=60, batch=8, optimizer="muon", lr=3e-3, ema=0.98),
        evaluate=train.Evaluate(every=4),
        save_every=4,
    )
