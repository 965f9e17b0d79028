# SPDX-License-Identifier: Apache-2.0
"""SegNet-Basic on CamVid at 360x480 as its authors trained it, then cut to half.

    JAXPRUNE_CAMVID=.../CamVid jaxprune run configs/camvid_segnet_basic.py

Hardware: one GPU of 8 GiB or more. Nobody has run it whole yet.
Stochastic gradient descent with momentum 0.9, rate 0.1, weight decay 5e-4, 4 images a
step, median-frequency class weights, 10,000 steps (109 epochs); retraining ends in a
cosine from a tenth of that rate. Each of several devices needs a batch of its own: set
train.batch and retrain.batch to a multiple of them.
"""

from jaxprune import data, train


def get_config() -> train.Config:
    """Train, cut by Taylor scores in two rounds, retrain; and from scratch."""
    fit = train.Fit(
        epochs=109,
        batch=4,
        optimizer="sgd",
        lr=0.1,
        schedule="constant",
        weight_decay=5e-4,
        class_weights=1.0,
    )
    return train.Config(
        name="camvid_segnet_basic",
        network=train.Network("segnet_basic", pixel_scale=255.0),
        data=train.Data("camvid", size=(360, 480), augment=data.Augment()),
        train=fit,
        prune=train.Prune("criterion", ratio=0.5, rounds=2, recovery_epochs=10),
        retrain=train.Fit(
            epochs=99,
            batch=4,
            optimizer="sgd",
            lr=0.01,
            weight_decay=5e-4,
            class_weights=1.0,
        ),
        scratch=True,
        evaluate=train.Evaluate(every=10),
        save_every=10,
    )
