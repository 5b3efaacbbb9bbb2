import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common.errors import InputError, Remark
from heirloom.common.nn.norm import unit
from tinyclip_jax import load
from tinyclip_jax.reader import text_reader
from tinyclip_jax.zoo import FAMILY, open_clip_model

TEXTS = ["a red apple", "", "hot air balloon"]


@pytest.fixture(scope="module")
def donor():
    return open_clip_model("embedded:emoji")


def test_the_state_of_the_last_token_is_what_clip_projects(one_device, donor):
    reader = FAMILY.reader(donor, 8)
    states, mask = reader.read(TEXTS)
    assert states.shape == (3, 8, reader.width) and mask.dtype == bool
    clip = load("embedded:emoji")
    ends = mask.sum(1) - 1
    projection = np.asarray(clip.params["text/projection/kernel"])
    pooled = unit(jnp.asarray(states[np.arange(3), ends] @ projection))
    np.testing.assert_allclose(pooled, clip.encode_text(TEXTS), atol=1e-5)
    assert ends[1] == 1  # start and end alone


def test_a_text_that_is_too_long_is_cut_and_said(one_device, donor):
    with pytest.warns(Remark, match=r"a text longer than 4 tokens is cut: 'hot air balloon' \(2 in all\)"):
        _, mask = text_reader(donor, 4).read(["hot air balloon", "balloon", "hot air balloon festival"])
    assert mask.sum(1).tolist() == [4, 3, 4]


def test_more_tokens_than_the_clip_reads_are_refused(donor):
    with pytest.raises(InputError, match="takes at most 16 tokens, the model asks for 17"):
        text_reader(donor, 17)
