"""The demo's teacher: a small convnet on the embedded emoji, nine groups at 32 px; a minute on two CPU cores.

heirloom train learngene/emoji_teacher --run runs/emoji_teacher
"""

from heirloom.common import config
from learngene.train import Config


def get_config() -> Config:
    return config.load("learngene/emoji").teacher  # type: ignore[attr-defined]
