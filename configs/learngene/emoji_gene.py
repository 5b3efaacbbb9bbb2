"""The gene of the demo alone, from the teacher that learngene/emoji_teacher trains; two minutes on two CPU cores.

heirloom train learngene/emoji_teacher --run runs/emoji_teacher
heirloom train learngene/emoji_gene --run runs/emoji_gene
heirloom compare learngene/emoji_gene --run runs/compare --depths 4,6,8 --methods sws,tleg
"""

from dataclasses import replace

from heirloom.common import config
from learngene.train import Config


def get_config() -> Config:
    return replace(config.load("learngene/emoji").gene, teacher="runs/emoji_teacher/model")  # type: ignore[attr-defined]
