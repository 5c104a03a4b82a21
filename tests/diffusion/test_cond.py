"""What is done with conditions: each function gives back the form it was given, a tensor, a mapping or None."""

from __future__ import annotations

import math

import pytest
import torch

from scoresde.diffusion.conditions import (
    each,
    expand,
    filled,
    join,
    move,
    named,
    nothing,
    one_entry,
    override,
    take,
    unnamed,
)

LABEL, TEXT = torch.tensor([10, 11, 12]), torch.arange(6.0).reshape(3, 2)
BOTH = {"label": LABEL, "text": TEXT}


def test_the_same_rows_of_every_tensor_are_taken() -> None:
    rows = torch.tensor([2, 0])
    assert take(None, rows) is None
    assert take(LABEL, rows).tolist() == [12, 10]
    both = take(BOTH, rows)
    assert both["label"].tolist() == [12, 10] and both["text"].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert take(BOTH, slice(1, 2))["label"].tolist() == [11]


def test_a_tensor_has_the_name_that_its_reader_gives_it() -> None:
    assert named(None) == {} and named(LABEL)["label"] is LABEL and named(TEXT, "y")["y"] is TEXT
    assert named(BOTH).keys() == {"label", "text"}
    assert unnamed({}) is None and unnamed({"label": LABEL}) is LABEL and unnamed({"text": TEXT}) == {"text": TEXT}
    for cond in (None, LABEL, BOTH, {"label": LABEL}):
        same = each(lambda value: value, cond)
        assert same is cond if not isinstance(cond, dict) else same.keys() == cond.keys()
        assert type(move(cond, torch.device("cpu"))) is type(cond)


def test_one_entry_is_for_all_samples_and_several_are_each_its_own() -> None:
    like = torch.zeros(3, 2)
    assert expand(None, like) is None and expand(torch.tensor(7), like).tolist() == [7, 7, 7]
    assert expand(TEXT[:1], like).shape == (3, 2) and expand(TEXT, like).data_ptr() == TEXT.data_ptr()
    both = expand({"label": LABEL[:1], "text": TEXT}, like)
    assert both["label"].tolist() == [10, 10, 10] and torch.equal(both["text"], TEXT)
    assert one_entry(None) is None and one_entry(LABEL[0]) is not None
    with pytest.raises(ValueError, match=r"one entry.*\(3, 2\)"):
        one_entry({"label": LABEL[:1], "text": TEXT})


def test_conditions_of_one_kind_are_joined_and_others_refused() -> None:
    assert join(LABEL, LABEL[:1]).tolist() == [10, 11, 12, 10]
    assert join(BOTH, BOTH)["text"].shape == (6, 2)
    for first, second, words in (
        (LABEL, BOTH, "a tensor and names"),
        (None, LABEL, "nothing and a tensor"),
        (None, None, "nothing and nothing"),
        ({"label": LABEL}, BOTH, r"\['label'\] and names \['label', 'text'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            join(first, second)


def test_one_condition_replaces_another_name_by_name() -> None:
    assert override(LABEL, None) is LABEL and override(None, TEXT) is TEXT and override(BOTH, LABEL) is LABEL
    assert override(BOTH, {"text": TEXT[:1]})["text"].shape == (1, 2)
    assert override(BOTH, {"text": TEXT[:1]})["label"] is LABEL


def test_nothing_is_nan_of_floats_and_a_class_of_its_own_of_labels() -> None:
    assert nothing(LABEL, 4).tolist() == [4] and nothing(LABEL, 4).dtype == torch.int64
    assert nothing(TEXT, 4).isnan().all() and nothing(TEXT, 4).shape == (1, 2)
    value, there = filled(torch.tensor([[1.0, 2.0], [math.nan, math.nan]]))
    assert value.tolist() == [[1.0, 2.0], [0.0, 0.0]] and there.tolist() == [True, False]
