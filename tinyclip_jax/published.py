"""Published numbers, by the model's size: millions of parameters of the image tower and of the text tower without its token table.

The students' are of the README of the release, their throughput on a GPU it does not name; the teachers' are of open_clip's
tables of results.
"""

PUBLISHED: dict[tuple[int, int], dict[str, float]] = {
    (39, 19): {"imagenet/top1": 63.5, "throughput/pairs_per_second": 1469},
    (8, 3): {"imagenet/top1": 41.1, "throughput/pairs_per_second": 4150},
    (30, 29): {"imagenet/top1": 59.1, "throughput/pairs_per_second": 1811},
    (19, 19): {"imagenet/top1": 56.4, "throughput/pairs_per_second": 3024},
    (61, 29): {"imagenet/top1": 62.4, "throughput/pairs_per_second": 3191},
    (40, 19): {"imagenet/top1": 59.8, "throughput/pairs_per_second": 4641},
    # Automatic models, LAION-400M; 64.5 and 62.7 on LAION+YFCC-400M.
    (63, 31): {"imagenet/top1": 63.9, "throughput/pairs_per_second": 2905},
    (45, 18): {"imagenet/top1": 61.4, "throughput/pairs_per_second": 3682},
    (22, 10): {"imagenet/top1": 53.7, "throughput/pairs_per_second": 5504},
    # ViT-B/32 laion2b_e16
    (88, 38): {
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
    # ViT-B/16 openai
    (86, 38): {
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
    # RN50 openai
    (38, 38): {
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
}
