# SPDX-License-Identifier: Apache-2.0
"""Batches for training, endless and resumable, and for evaluation, once through.

Batch i of `batches` depends on (seed, i) and nothing else: not on threads, on where the
iteration started, or on the number of processes. To resume, pass `start=i`.
"""

from collections.abc import Iterator

import numpy as np

from jaxprune.base import DataError
from jaxprune.data.augment import Augment, augment
from jaxprune.data.cache import check_whole
from jaxprune.data.types import Split

Batch = dict[str, np.ndarray]


def batches(
    split: Split,
    *,
    batch: int,
    seed: int,
    augment: Augment | None = None,
    start: int = 0,
    process: tuple[int, int] = (0, 1),
    threads: int = 2,
) -> Iterator[Batch]:
    """Endless batches {'image': uint8[b, H, W, 3], 'label': int32[b, H, W]}.

    Samples are drawn without replacement and reshuffled each time around; the order
    runs on across that border, so every batch is full. `batch` counts the samples of a
    step over all processes: with `process=(index, count)` this one gets its
    b = batch / count rows, in order. `threads` work ahead; 0 = none. Raises DataError
    for counts that do not fit, and while it yields where a file was cut short.
    """
    import grain

    index, count = process
    if not 0 <= index < count:
        raise DataError(
            f"process {process}: must be (index, count), 0 <= index < count"
        )
    if batch < 1 or batch % count:
        raise DataError(
            f"batch {batch}: must be a positive multiple of {count} processes"
        )
    if start < 0:
        raise DataError(f"start {start}: must not be negative")
    view = _sampler(split, augment)
    data = grain.MapDataset.range(len(split)).seed(seed).shuffle().repeat(None)
    # Batches of one process's rows: each step is `count` of them, one to a process.
    data = data.random_map(view).batch(batch // count, drop_remainder=True)
    data = data[index::count]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    iterator = iter(data.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def eval_batches(split: Split, batch: int) -> Iterator[Batch]:
    """The split in order: {'image': uint8[B, H, W, 3], 'label': int32[B, H, W]}.

    The last batch is filled up with black images labelled `ignore`, so that every batch
    has one shape and no filling counts in a measure.
    """
    if batch < 1:
        raise DataError(f"batch {batch}: must be at least 1")
    for start in range(0, len(split), batch):
        check_whole(split.images)
        check_whole(split.labels)
        images = np.asarray(split.images[start : start + batch])
        labels = np.asarray(split.labels[start : start + batch], np.int32)
        missing = [(0, batch - len(images))]
        yield {
            "image": np.pad(images, missing + [(0, 0)] * 3),
            "label": np.pad(
                labels, missing + [(0, 0)] * 2, constant_values=split.classes.ignore
            ),
        }


def _sampler(split: Split, how: Augment | None):
    def view(index: int, rng: np.random.Generator) -> Batch:
        check_whole(split.images)
        check_whole(split.labels)
        image, label = np.asarray(split.images[index]), np.asarray(split.labels[index])
        if how is not None:
            image, label = augment(how, rng, image, label, split.classes.ignore)
        return {"image": image, "label": label.astype(np.int32)}

    return view
