"""Calibration items: exactly N tokens, answered by the dense model itself, the same for the same seed."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from moa.errors import InputError
from moa.evaluation import tasks
from moa.files import write_tensors
from moa.progress import Progress
from moa.search.calibrate import (
    RETRIEVAL,
    SOURCES,
    SUMMARY,
    CalibrateConfig,
    calibrate,
)
from moa.search.facts import FACTS, HELD_OUT_FACTS
from moa.search.items import CalibrationSet
from moa.search.retrieval import _Turn, evenly
from moa.search.text import default_text

TEXT = default_text().text[:60_000]
WORDS = {value for kind in FACTS if not isinstance(kind.values, int) for value in kind.values}


@pytest.fixture(scope="module")
def real_items(demo_model):
    return calibrate(demo_model, TEXT, CalibrateConfig((256,), items=3, sources=SOURCES, answer_tokens=16)).items


class Said(Progress):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def assert_same(first, second):
    assert first.items.keys() == second.items.keys()
    for key, items in first.items.items():
        for item, other in zip(items, second.items[key], strict=True):
            assert np.array_equal(item.answer, other.answer)
            assert item.input_ids.dtype == other.input_ids.dtype == np.int64
            assert np.array_equal(item.input_ids, other.input_ids)


def value_of(answer):
    """The word in an answer that is a value, or the number."""
    words = [word for word in WORDS if re.search(rf"\b{word}\b", answer)]
    numbers = re.findall(r"(?<!-)\b\d+\b", answer)
    return max(words or numbers, key=len)


def answers_of(item):
    """Tokens of each answer in a conversation."""
    return np.split(item.input_ids[item.answer], np.flatnonzero(np.diff(item.answer) > 1) + 1)


def greedy(loaded, item, answer_tokens, **options):
    prompt = torch.from_numpy(item.input_ids[: item.answer_start])[None]
    return loaded.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=answer_tokens, **options
    )[0].tolist()


@pytest.mark.slow
def test_summaries_are_the_models_own_greedy_tokens(demo_model, real_items):
    for item in real_items[256, SUMMARY]:
        assert 256 - item.answer_start == 16
        assert greedy(demo_model, item, 16, min_new_tokens=16) == item.input_ids.tolist()
        prompt = demo_model.tokenizer.decode(item.input_ids[: item.answer_start])
        assert all(f"Passage {number}:" in prompt for number in (1, 2, 3))


def test_the_first_questions_are_as_mixed_as_all_of_them(random_model):
    """Refining measures on the first few items only."""
    config = CalibrateConfig((512,), items=2 * len(FACTS), sources=(RETRIEVAL,))
    prompts = [
        random_model.tokenizer.decode(item.input_ids)
        for item in calibrate(random_model, TEXT, config).items[512, RETRIEVAL]
    ]
    for first in (prompts[: len(FACTS)], prompts[len(FACTS) :]):
        kinds = [
            sum(any(kind.question.format(key=key) in prompt for key in kind.keys) for prompt in first) for kind in FACTS
        ]
        assert kinds == [1] * len(FACTS)
    for count in (2, 4, 8, 16):
        places = sorted(evenly(index) for index in range(count))
        assert np.allclose(np.diff(places), 1 / count)


def test_facts_share_no_word_with_the_names_of_the_evaluation():
    hidden = {word for name in tasks._all_names() for word in name.lower().split("-")}
    assert len(hidden) > 100
    for kind in FACTS + HELD_OUT_FACTS:
        names = [*kind.keys, *(() if isinstance(kind.values, int) else kind.values)]
        assert len(names) == len(set(names))
        words = {word for name in names for word in re.split(r"\W|_", name.lower())}
        assert not words & hidden, kind.statement


@pytest.mark.slow
def test_facts_are_found_in_the_text_by_the_model_itself(demo_model):
    """In a conversation as well the model would give its answers."""
    decode = demo_model.tokenizer.decode
    items = calibrate(demo_model, TEXT, CalibrateConfig((512,), items=4, sources=(RETRIEVAL,))).items
    said, asked = [], []
    for item in items[512, RETRIEVAL]:
        prompt = decode(item.input_ids[: item.answer_start])
        for answer in answers_of(item):
            value = value_of(decode(answer))
            assert prompt.count(value) == 1
            assert not re.fullmatch(r"\d{5}", value), "five digits are what the evaluation hides"
            asked.append(answer)
        with torch.no_grad():
            logits = demo_model.model(torch.from_numpy(item.input_ids)[None]).logits[0]
        said.append(logits.argmax(-1)[item.answer - 1].numpy() == item.input_ids[item.answer])
    assert np.concatenate(said).mean() > 0.9, "each was asked for by itself"
    assert len(asked) > 4, "some texts serve several questions"


def test_a_conversation_is_the_chat_templates(random_model):
    tokenizer = random_model.tokenizer
    config = CalibrateConfig((2048,), items=4, sources=(RETRIEVAL,))
    items = calibrate(replace(random_model, context_length=2048), TEXT, config).items[2048, RETRIEVAL]
    assert sorted(len(answers_of(item)) for item in items) == [1, 2, 4, 8]
    for item in items:
        written = tokenizer.decode(item.input_ids)
        users = [part.split("<|im_end|>")[0] for part in written.split("<|im_start|>user\n")[1:]]
        said = [part.split("<|im_end|>")[0] for part in written.split("<|im_start|>assistant\n")[1:]]
        assert [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers_of(item)] == said
        messages = [
            {"role": role, "content": content}
            for pair in zip(users, said, strict=True)
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        assert written == tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
        values = [value_of(answer) for answer in said]
        assert len(set(values)) == len(values)
        assert all(users[0].count(value) == 1 for value in values)


def test_of_an_answer_only_the_value_carries_loss(random_model):
    """Of summaries, every token."""
    decode = random_model.tokenizer.decode
    config = CalibrateConfig((2048,), items=len(FACTS), sources=SOURCES)
    items = calibrate(replace(random_model, context_length=2048), TEXT, config).items
    spelled = []
    for item in items[2048, RETRIEVAL]:
        assert set(item.loss) < set(item.answer)
        measured = np.split(item.input_ids[item.loss], np.flatnonzero(np.diff(item.loss) > 1) + 1)
        for answer, tokens in zip(answers_of(item), measured, strict=True):
            assert decode(tokens).strip() == value_of(decode(answer))
            spelled.append(decode(tokens).strip())
    assert any(value.isdigit() for value in spelled)
    assert any(value in WORDS for value in spelled)
    assert all(np.array_equal(item.loss, item.answer) for item in items[2048, SUMMARY])


@pytest.mark.parametrize(
    ("said", "value", "told"),
    [
        ("Her preferred color is red.", "red", "red"),
        ("It weighs 1,234 grams.", "1234", "1,234"),
        ("It weighs 12345 grams.", "1234", ""),
        ("I do not know.", "red", ""),
    ],
)
def test_a_value_is_told_by_a_word_of_its_own(random_model, said, value, told):
    tokenizer = random_model.tokenizer
    ids = np.array(tokenizer(said, add_special_tokens=False)["input_ids"])
    turn = _Turn(ids, value, ids)
    assert tokenizer.decode(ids[turn.told(tokenizer, ids)]).strip() == told


def test_every_item_has_exactly_its_length_and_all_items_differ(random_model):
    lengths = (256, 307, 512)
    items = calibrate(random_model, TEXT, CalibrateConfig(lengths, items=3, sources=SOURCES)).items
    assert sorted(items) == sorted((length, source) for length in lengths for source in SOURCES)
    for (length, _), of_cell in items.items():
        assert {item.input_ids.shape for item in of_cell} == {(length,)}
        assert all(length // 4 <= item.answer_start < length for item in of_cell)
        assert len({item.input_ids[: item.answer_start].tobytes() for item in of_cell}) == 3


def test_text_is_text_with_loss_all_over_its_last_three_quarters(random_model):
    tokenizer = random_model.tokenizer
    items = calibrate(random_model, TEXT, CalibrateConfig((256, 1024), items=2, sources=("text",))).items
    words = " ".join(TEXT.split())
    for length in (256, 1024):
        for item in items[length, "text"]:
            assert len(item.input_ids) == length
            assert item.answer.tolist() == list(range(length // 4, length))
            assert item.loss.tolist() == list(range(length // 4, length, 8))
            assert " ".join(tokenizer.decode(item.input_ids, skip_special_tokens=True).split()) in words


def test_what_is_asked_for_lies_at_all_depths(random_model):
    tokenizer = random_model.tokenizer
    depths = []
    for item in calibrate(random_model, TEXT, CalibrateConfig((512,), items=12, sources=(RETRIEVAL,))).items[
        512, RETRIEVAL
    ]:
        prompt = tokenizer.decode(item.input_ids[: item.answer_start])
        value = value_of(tokenizer.decode(answers_of(item)[0]))
        depths.append(prompt.index(value) / len(prompt))
    assert min(depths) < 0.25
    assert max(depths) > 0.75
    assert np.mean(depths) == pytest.approx(0.5, abs=0.15)


def test_a_model_that_finds_nothing_gets_right_answers_and_it_is_said(random_model):
    said = Said()
    items = calibrate(random_model, TEXT, CalibrateConfig((256,), items=2, sources=(RETRIEVAL,)), said).items
    assert any("2 of 2" in line and "random" in line for line in said.lines)
    for item in items[256, RETRIEVAL]:
        value = value_of(random_model.tokenizer.decode(answers_of(item)[0]))
        assert value in random_model.tokenizer.decode(item.input_ids[: item.answer_start])


def test_the_seed_decides_and_a_cell_does_not_depend_on_the_others(random_model):
    config = CalibrateConfig((256, 320), items=2, sources=SOURCES, answer_tokens=8)
    both = calibrate(random_model, TEXT, config)
    assert_same(both, calibrate(random_model, TEXT, config))
    alone = calibrate(random_model, TEXT, replace(config, lengths=(320,), sources=(SUMMARY,)))
    assert_same(alone, CalibrationSet({(320, SUMMARY): both.items[320, SUMMARY]}))
    other = calibrate(random_model, TEXT, replace(config, seed=1))
    assert not np.array_equal(other.items[256, SUMMARY][0].input_ids, both.items[256, SUMMARY][0].input_ids)


def test_items_survive_a_file(random_model, tmp_path):
    made = calibrate(random_model, TEXT, CalibrateConfig((256, 320), items=2, sources=SOURCES, answer_tokens=8))
    made.save(tmp_path / "items.safetensors")
    assert_same(CalibrationSet.load(tmp_path / "items.safetensors"), made)
    assert [path.name for path in tmp_path.iterdir()] == ["items.safetensors"]


def test_files_that_hold_no_items_are_refused(tmp_path):
    path = tmp_path / "items.safetensors"
    write_tensors(path, {"320/retrieval/0/input_ids": np.arange(320)})
    with pytest.raises(InputError, match="calibration items"):
        CalibrationSet.load(path)
    write_tensors(path, {"weight": np.arange(3)})
    with pytest.raises(InputError, match="calibration items"):
        CalibrationSet.load(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="damaged"):
        CalibrationSet.load(path)


@pytest.mark.parametrize(
    ("changes", "text", "reason"),
    [
        ({"lengths": (256, 1088)}, TEXT, "1,088.*context of random, 1,024"),
        ({"lengths": (64,)}, TEXT, "64 tokens are too few.*shortest length is"),
        ({"lengths": (64,), "sources": (SUMMARY,)}, TEXT, "64 tokens are too few.*shortest length is"),
        ({"lengths": (512,)}, TEXT[:900], "the text has .* tokens.* 512"),
        ({"sources": ("poems",)}, TEXT, "'poems'.*retrieval, summary, text"),
        ({"lengths": ()}, TEXT, "at least one"),
        ({"items": 0}, TEXT, "at least one"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_with_the_reason(random_model, changes, text, reason):
    with pytest.raises(InputError, match=reason):
        calibrate(random_model, text, replace(CalibrateConfig((256,)), **changes))
