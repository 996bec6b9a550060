"""Retrieval tasks: exact lengths, answers that are really there, and a score that is not fooled."""

import re

import numpy as np
import pytest

from moa.errors import InputError
from moa.evaluation.answers import _leads_elsewhere, scores
from moa.evaluation.tasks import RETRIEVAL, score
from moa.evaluation.text import default_evaluation_text
from moa.search.text import default_text

ALL = list(RETRIEVAL)


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return demo_model.tokenizer


def make(task, tokenizer, length, items, seed=0):
    return RETRIEVAL[task].make(tokenizer, default_evaluation_text(), length, items, seed)


@pytest.mark.parametrize("task", ALL)
@pytest.mark.parametrize("length", [512, 1023, 2048])
def test_prompts_have_the_exact_length_and_hold_their_answers_at_all_depths(tokenizer, task, length):
    depths = []
    for item in make(task, tokenizer, length, 6):
        assert item.prompt_ids.shape == (length,)
        assert item.prompt_ids.dtype == np.int64
        prompt = tokenizer.decode(item.prompt_ids)
        question = tokenizer.decode(item.prompt_ids[item.question_start :])
        assert "?" in question
        for answer in item.answers:
            assert answer in prompt
            assert answer not in question
            assert len(answer) == 5
        assert len(set(item.answers)) == len(item.answers) == (4 if task == "multivalue" else 1)
        found = prompt.index(item.answers[0]) / len(prompt)
        assert found == pytest.approx(item.depth, abs=0.25 if length > 2000 else 0.6)
        depths.append(found)
    assert depths == sorted(depths)
    if length == 2048:
        assert depths[0] < 0.25
        assert depths[-1] > 0.75


@pytest.mark.parametrize(("task", "notes"), [("needle", 1), ("multikey", 4), ("multivalue", 4)])
def test_notes_are_about_the_boxes_they_should_be(tokenizer, task, notes):
    for item in make(task, tokenizer, 1024, 4):
        prompt = tokenizer.decode(item.prompt_ids)
        found = re.findall(r"Note: the (\S+) box holds exactly (\d{5}) coins", prompt)
        assert len(found) == notes
        asked = re.findall(r"(?:does the|about the) (\S+) box(?: hold|, each)", prompt)[-1]
        assert sorted(value for name, value in found if name == asked) == sorted(item.answers)


def test_a_chain_of_variables_is_in_order_and_ends_in_what_is_asked(tokenizer):
    for item in make("tracking", tokenizer, 1024, 6):
        prompt = tokenizer.decode(item.prompt_ids)
        held = {}
        for name, value in re.findall(r"Assignment: (\w+) = (\w+)\.", prompt):
            held[name] = value if value.isdigit() else held[value]
        asked = re.search(r"Which number does the variable (\w+) hold", prompt).group(1)
        assert held[asked] == item.answers[0]
        assert len(held) == 3


@pytest.mark.parametrize(("task", "pattern"), [("lines", "line {}:"), ("json", '"{}":')])
def test_what_is_asked_for_is_in_the_record_once(tokenizer, task, pattern):
    for item in make(task, tokenizer, 2048, 4):
        prompt = tokenizer.decode(item.prompt_ids)
        line = next(line for line in prompt.splitlines() if item.answers[0] in line)
        name = re.search(r"\w+-\w+", line).group()
        assert prompt.count(pattern.format(name)) == 1
        assert name in prompt[prompt.index(line) + len(line) :], "the question names it"
        assert len(re.findall(r"\d{5}", prompt)) > 70, "as many lines as fit"


@pytest.mark.parametrize("task", ALL)
def test_the_seed_decides(tokenizer, task):
    first, again, other = (make(task, tokenizer, 512, 3, seed) for seed in (0, 0, 1))
    assert [item.prompt_ids.tolist() for item in first] == [item.prompt_ids.tolist() for item in again]
    assert {item.answers for item in first}.isdisjoint(item.answers for item in other)
    assert len({item.answers for item in first}) == 3


@pytest.mark.parametrize("task", ALL)
def test_lengths_without_room_are_refused(tokenizer, task):
    with pytest.raises(InputError, match="50 tokens are too few"):
        make(task, tokenizer, 50, 1)


def test_texts_that_are_too_short_are_refused(tokenizer):
    with pytest.raises(InputError, match="the text has"):
        RETRIEVAL["passkey"].make(tokenizer, "only a few words", 512, 1, 0)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (" 68213.", True),
        ("The pass key is 68213. Remember it.", True),
        ("<68213>", True),
        ("68,213", True),
        ("**68213**", True),
        ("68213 or 11111", True),
        ("11111 or 68213", False),
        ("682130", False),
        ("168213", False),
        ("6821", False),
        ("6 8 2 1 3", False),
        ("68213.5", False),
        ("", False),
        ("none", False),
    ],
)
def test_the_first_number_counts(prediction, right):
    assert score(prediction, ("68213",)) == right


def test_the_default_text_is_prose_that_calibration_does_not_see():
    text = default_evaluation_text()
    assert len(text) >= 200_000
    calibration = " ".join(default_text().text.split())
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    shared = sum(paragraph in calibration for paragraph in paragraphs)
    assert shared <= len(paragraphs) // 200
    assert ">>>" not in text


def test_several_answers_count_in_any_order_and_once_each():
    answers = ("11111", "22222", "33333")
    assert score("33,333, 11111 and 22222", answers) == 1
    assert score("11111, 11111, 22222, 33333", answers) == pytest.approx(2 / 3)
    assert score("44444, 55555, 66666, 11111", answers) == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["passkey", "needle", "lines"])
def test_teacher_forcing_scores_what_greedy_decoding_scores(demo_model, task):
    """On a real model, dense and under a plan, with right and wrong answers among them."""
    import moa
    from moa.evaluation.compare import _empty_cache, _in_force

    items = make(task, demo_model.tokenizer, 400 if task == "lines" else 256, 4)
    found = []
    for plan in (None, moa.Plan.uniform(demo_model.identity, 0.5)):
        with _in_force(demo_model, plan):
            short, long = (
                scores(
                    demo_model.model,
                    demo_model.tokenizer,
                    RETRIEVAL[task],
                    items,
                    lambda length, plan=plan: _empty_cache(demo_model, plan, length),
                    4096,
                    shortcut,
                )
                for shortcut in (True, False)
            )
        assert short.tolist() == long.tolist()
        found += short.tolist()
    if task == "passkey":
        assert {0, 1} <= set(found)
        assert np.mean(found[:4]) >= 0.75, "the demo model finds the pass key"


@pytest.mark.parametrize(
    ("text", "elsewhere"),
    [
        (" 12345", False),
        (" 1234", False),
        (" 12,3", False),
        (" 12,345 coins and 7", False),
        (" 12345.", False),
        (" well", False),
        ("", False),
        (" 1235", True),
        (" 12,4", True),
        (" 123456", True),
        (" 1234 coins", True),
        (" 12, 3", True),
        (" 12345.5", True),
        (" 7 or 12345", True),
    ],
)
def test_an_answer_that_can_still_come_right_is_decoded(text, elsewhere):
    assert _leads_elsewhere(text, ["12345"]) is elsewhere
    if elsewhere:  # whatever is decoded after it
        assert all(score(text + more, ["12345"]) == 0 for more in ("", "5", "45", ",345", " 12345", ".", ".0"))


def test_several_answers_are_always_decoded():
    assert not _leads_elsewhere(" 7", ["12345", "54321"])
