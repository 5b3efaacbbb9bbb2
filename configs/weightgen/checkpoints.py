"""A zoo of the checkpoints in a folder, such as low-rank adapters; its generator's condition is text or a label.

Takes seconds. The condition may also be a chunk of a checkpoint.

heirloom train weightgen/checkpoints --run runs/adapters --folder adapters --backend embedded:emoji
heirloom train weightgen/generator --run runs/generator --zoo runs/adapters/zoo --condition text --prior none
heirloom generate runs/generator/model --task "questions about plants" -n 8
"""

from weightgen.zoo.recipes import CheckpointsRecipe


def get_config() -> CheckpointsRecipe:
    return CheckpointsRecipe()
