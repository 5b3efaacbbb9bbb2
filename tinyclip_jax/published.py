"""Published numbers by millions of parameters of the image tower, and of the text tower without token table.

A model of the same size may have been trained on other data, so each entry names its model. Sources: for the students
the README of the release, with throughput in half precision on a GPU that it does not name; for the teachers
open_clip's tables of results.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """Name of a published model, and its numbers by `dataset/metric`."""

    name: str
    numbers: dict[str, float]


def _student(name: str, top1: float, pairs_per_second: int) -> Published:
    return Published(name, {"imagenet/top1": top1, "throughput/pairs_per_second": pairs_per_second})


PUBLISHED: dict[tuple[int, int], Published] = {
    (39, 19): _student("TinyCLIP-ViT-39M-16-Text-19M, YFCC-15M", 63.5, 1469),
    (8, 3): _student("TinyCLIP-ViT-8M-16-Text-3M, YFCC-15M", 41.1, 4150),
    (30, 29): _student("TinyCLIP-ResNet-30M-Text-29M, LAION-400M", 59.1, 1811),
    (19, 19): _student("TinyCLIP-ResNet-19M-Text-19M, LAION-400M", 56.4, 3024),
    (61, 29): _student("TinyCLIP-ViT-61M-32-Text-29M, LAION-400M", 62.4, 3191),
    (40, 19): _student("TinyCLIP-ViT-40M-32-Text-19M, LAION-400M", 59.8, 4641),
    # On LAION+YFCC-400M 64.5 and 62.7.
    (63, 31): _student("TinyCLIP-auto-ViT-63M-32-Text-31M, LAION-400M", 63.9, 2905),
    (45, 18): _student("TinyCLIP-auto-ViT-45M-32-Text-18M, LAION-400M", 61.4, 3682),
    (22, 10): _student("TinyCLIP-auto-ViT-22M-32-Text-10M, LAION-400M", 53.7, 5504),
    (88, 38): Published(
        "ViT-B/32, laion2b_e16",
        {
            "imagenet/top1": 65.65,
            "imagenet-v2/top1": 57.39,
            "imagenet-a/top1": 26.15,
            "imagenet-r/top1": 75.88,
            "imagenet-sketch/top1": 52.87,
            "objectnet/top1": 48.77,
            "flickr30k/text_to_image_r1": 66.4,
            "flickr30k/image_to_text_r1": 84.4,
            "coco/text_to_image_r1": 39.1,
            "coco/image_to_text_r1": 56.2,
        },
    ),
    (86, 38): Published(
        "ViT-B/16, openai",
        {
            "imagenet/top1": 68.34,
            "imagenet-v2/top1": 61.88,
            "imagenet-a/top1": 49.95,
            "imagenet-r/top1": 77.70,
            "imagenet-sketch/top1": 48.24,
            "objectnet/top1": 55.31,
            "flickr30k/text_to_image_r1": 62.2,
            "flickr30k/image_to_text_r1": 82.2,
            "coco/text_to_image_r1": 33.1,
            "coco/image_to_text_r1": 52.4,
        },
    ),
    (38, 38): Published(
        "RN50, openai",
        {
            "imagenet/top1": 59.82,
            "imagenet-v2/top1": 52.84,
            "imagenet-a/top1": 23.27,
            "imagenet-r/top1": 60.73,
            "imagenet-sketch/top1": 35.44,
            "objectnet/top1": 41.41,
            "flickr30k/text_to_image_r1": 57.4,
            "flickr30k/image_to_text_r1": 80.0,
            "coco/text_to_image_r1": 28.5,
            "coco/image_to_text_r1": 48.8,
        },
    ),
}
