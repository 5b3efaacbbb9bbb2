"""The released 12-layer descendant of Aux-S: 6 heads of its 12, eps 1e-6, norm behind the mean (SWS; T1, T2, T3).

    heirloom train learngene/vit_s_paper --run runs/vit_s_paper

What attention computes changes at the transfer, since the heads are regrouped. Hardware and time as learngene/vit_s.
"""

from learngene.recipes import imagenet
from learngene.train import Config
from learngene.zoo import paper_vit


def get_config() -> Config:
    return imagenet(paper_vit("s"), epochs=10, lr=5e-5, donor="runs/aux_s_paper/model")
