"""Demonstrations that say how good they are, and prompts that are learnt beside responses."""

import numpy as np
import pytest

from pipelines import DataError
from tests.pipelines.test_preference import SFT, prepare


def test_prompts_and_qualities_of_demonstrations(jsonl):
    """[bos] a b | c [eos]: a and b are of the prompt, c and eos of the response; packed as one by one."""
    records = [{"prompt": "ab", "response": "c", "quality": 0.25}, {"prompt": "a", "response": "b", "quality": 1}]
    path, masks = jsonl(*records), ("loss_mask", "prompt_mask")
    (batch,) = prepare("sft", path, 6, loss="all", quality=True).evaluation_iterator(batch_size=2, split="train")
    np.testing.assert_array_equal(batch["loss_mask"][:, 0], [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch["prompt_mask"][:, 0], [[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["quality"], [0.25, 1])
    packed = prepare("sft", path, 9, loss="all", quality=True, pack=True, weighting="example")
    (row,) = packed.evaluation_iterator(batch_size=1, split="train")
    examples = {1.0: ([1 / 3] * 3, [1 / 3, 0, 0]), 0.25: ([1 / 4] * 4, [1 / 4, 1 / 4, 0, 0])}
    for segment in (1, 2):
        inside = row["segment_ids"][0] == segment
        (quality,) = set(row["quality"][0][inside].tolist())
        for name, expected in zip(masks, examples.pop(quality), strict=True):
            np.testing.assert_allclose(row[name][0][inside], expected, rtol=1e-6)
    assert not any(row[name][0][row["segment_ids"][0] == 0].any() for name in (*masks, "quality"))
    assert "quality" not in next(prepare("sft", path, 6).evaluation_iterator(batch_size=2, split="train"))


@pytest.mark.parametrize("quality", [2, -0.5, "good", True, None])
def test_a_bad_quality_is_an_error_with_its_place(jsonl, quality):
    path = jsonl({**SFT, "quality": quality})
    with pytest.raises(DataError, match=r"a\.jsonl:1.*quality"):
        prepare("sft", path, quality=True)
    with pytest.raises(DataError, match="quality"):
        prepare("sft", jsonl(SFT), quality=True)
