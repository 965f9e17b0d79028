# SPDX-License-Identifier: Apache-2.0
"""SegNet whole, on CamVid at 360x480, cut to 28 % of its FLOPs.

    JAXPRUNE_CAMVID=.../CamVid jaxprune run configs/camvid_segnet.py

Hardware: one GPU of 24 GiB or more, or a TPU slice of up to 8 devices (more: set
train.batch and retrain.batch to a multiple). Nobody has run it whole yet. Unlike the
paper's recipe (SGD at a constant rate from VGG-16's weights) it starts from random
weights, with Adam and a cosine. A first look at it, in minutes:

    --set train.epochs=2 --set retrain.epochs=2 --set scratch=no --workdir runs/look
"""

from jaxprune import data, train


def get_config() -> train.Config:
    """Train, cut along the path, retrain taught by the dense net; and from scratch."""
    fit = train.Fit(epochs=250, batch=8, lr=1e-3, warmup=2, weight_decay=1e-4, ema=0.99)
    return train.Config(
        name="camvid_segnet",
        network=train.Network("segnet", dtype="bfloat16"),
        data=train.Data(
            "camvid",
            size=(360, 480),
            augment=data.Augment(scale=(0.8, 1.6), stretch=0.1, colour=0.3, gamma=0.2),
        ),
        train=fit,
        prune=train.Prune("path", ratio=0.28, multiple_of=16, min_channels=16),
        retrain=fit,
        distill=train.Distill(weight=0.5),
        scratch=True,
        evaluate=train.Evaluate(every=10, repeats=20),
        save_every=10,
    )
