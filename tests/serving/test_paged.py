"""Attention over pages, by its definition and by the kernels, against the definition of span attention."""

import numpy as np
import pytest
import torch

from moa.attention.options import AttentionOptions
from moa.attention.reference import span_attention
from moa.serving import paged
from moa.serving.paged import Step

triton_paged = pytest.importorskip("moa.serving.triton_paged")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ATTEND = {"operators": paged.attend, "kernels": triton_paged.attend}


class Engine:
    """Requests whose tokens lie in pages, handed out at random, for heads of two groups."""

    def __init__(self, heads=4, group=2, d=32, size=16, pages=120, windows=(9, 40), sink=5, seed=0):
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.group, self.d, self.size, self.sink, self.windows = group, d, size, sink, windows
        self.group_of = [head % len(windows) for head in range(heads)]
        # what is not written is not read: it would be seen
        self.pages = [torch.full((pages, size, 2 * d), torch.nan, device=DEVICE) for _ in range(heads)]
        self.free = [list(self.rng.permutation(np.arange(1, pages))) for _ in windows]
        self.table = [{} for _ in windows]  # request: its pages
        self.tokens = {}  # request: (keys, values), each [heads, tokens, d]

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(DEVICE)

    def step(self, new, padding=0, room=12):
        """Query, key and value of a step that gives request r ``new[r]`` tokens, and the step for each head."""
        heads = len(self.pages)
        total = sum(new.values()) + padding
        key, value = self.normal(total, heads, self.d), self.normal(total, heads, self.d)
        query = self.normal(total, heads * self.group, self.d)
        padded = [1] * padding if max(new.values()) == 1 else []  # as engines pad steps of single tokens
        starts = np.cumsum([0, *new.values(), *padded])
        lengths = []
        slots = [[] for _ in self.windows]
        for request, count in new.items():
            row = sum(list(new.values())[: list(new).index(request)])
            fresh = [x[row : row + count].transpose(0, 1) for x in (key, value)]
            before = self.tokens.get(request)
            self.tokens[request] = (
                fresh if before is None else [torch.cat(pair, 1) for pair in zip(before, fresh, strict=True)]
            )
            length = self.tokens[request][0].shape[1]
            lengths.append(length)
            for group, table in enumerate(self.table):
                held = table.setdefault(request, [])
                while len(held) * self.size < length:
                    held.append(self.free[group].pop())
                tokens = range(length - count, length)
                slots[group] += [held[t // self.size] * self.size + t % self.size for t in tokens]
        lengths += [0] * (len(starts) - 1 - len(lengths))
        per_group = []
        for group, window in enumerate(self.windows):
            table = np.zeros((len(lengths), room), np.int32)
            for row, request in enumerate(new):
                held = self.table[group][request]
                table[row, : len(held)] = held
                # pages between sink and window may be anybody's by now
                gone = range(-(-self.sink // self.size), (lengths[row] - new[request] - window + 1) // self.size)
                table[row, list(gone)] = 0
            per_group.append(
                Step(
                    torch.from_numpy(table).to(DEVICE),
                    torch.tensor(slots[group] + [-1] * padding, dtype=torch.int64, device=DEVICE),
                    torch.tensor(starts, dtype=torch.int32, device=DEVICE),
                    torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
                    max(new.values()),
                    self.sink,
                    window,
                    self.size,
                )
            )
        return query, key, value, [per_group[group] for group in self.group_of]

    def expected(self, query, new):
        """[tokens of the requests, query heads, d]."""
        spans = torch.tensor([[self.sink + self.windows[group] for group in self.group_of]])
        found, row = [], 0
        for request, count in new.items():
            keys, values = self.tokens[request]
            q = query[row : row + count].transpose(0, 1)[None]
            options = AttentionOptions(self.d**-0.5)
            found.append(span_attention(q, keys[None], values[None], spans, self.sink, options)[0].transpose(0, 1))
            row += count
        return torch.cat(found)


def check(attend, engine, new, **options):
    query, key, value, steps = engine.step(new, **options)
    output = torch.full_like(query, 7.0)
    attend(query, key, value, engine.pages, steps, engine.d**-0.5, output)
    expected = engine.expected(query, new)
    torch.testing.assert_close(output[: len(expected)], expected, atol=2e-5, rtol=2e-5)
    return output[len(expected) :]


@pytest.mark.parametrize("name", ATTEND)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group": 1, "d": 48, "size": 32},
        {"windows": (1, 200), "sink": 16},
        {"sink": 0, "heads": 3, "windows": (7,)},
    ],
    ids=["two groups", "one query head", "smallest and widest window", "no sink"],
)
def test_prompts_chunks_and_decoding(name, options):
    engine = Engine(**options)
    check(ATTEND[name], engine, {0: 3, 1: 70, 2: 1})
    check(ATTEND[name], engine, {0: 1, 1: 30, 2: 50, 3: 17})  # who decodes beside who reads a prompt
    for _ in range(3):
        check(ATTEND[name], engine, {0: 1, 1: 1, 2: 1, 3: 1})
    check(ATTEND[name], engine, {3: 1, 1: 1})


@pytest.mark.parametrize("name", ATTEND)
def test_rows_of_no_request_store_nothing(name):
    engine = Engine()
    check(ATTEND[name], engine, {0: 40, 1: 9})
    before = [page.clone() for page in engine.pages]
    rest = check(ATTEND[name], engine, {0: 1, 1: 1}, padding=3)
    assert not rest.isnan().any()
    changed = sum(
        int((a.nan_to_num() != b.nan_to_num()).any(-1).sum()) for a, b in zip(before, engine.pages, strict=True)
    )
    assert changed == 2 * len(engine.pages)


def test_pieces_of_long_requests_add_up():
    """More tokens than one piece of the work list has."""
    engine = Engine(heads=2, pages=200, windows=(700, 40), size=16)
    check(ATTEND["kernels"], engine, {0: 1500, 1: 130}, room=100)
    check(ATTEND["kernels"], engine, {0: 1, 1: 1}, room=100)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
def test_recorded_step():
    """A CUDA graph of a step is right when its tables, slots and lengths have moved on."""
    engine = Engine(windows=(9, 40))
    check(ATTEND["kernels"], engine, {0: 40, 1: 9})
    query, key, value, steps = engine.step({0: 1, 1: 1})
    output = torch.empty_like(query)
    attend = ATTEND["kernels"]
    attend(query, key, value, engine.pages, steps, engine.d**-0.5, output)  # compiled, addresses known
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(query, key, value, engine.pages, steps, engine.d**-0.5, output)
    for _ in range(20):
        new = {0: 1, 1: 1}
        fresh_query, fresh_key, fresh_value, fresh = engine.step(new)
        for old, now in zip((query, key, value), (fresh_query, fresh_key, fresh_value), strict=True):
            old.copy_(now)
        for old, now in {id(step): (step, now) for step, now in zip(steps, fresh, strict=True)}.values():
            for name in ("table", "slots", "lengths"):
                getattr(old, name).copy_(getattr(now, name))
        graph.replay()
        torch.testing.assert_close(output, engine.expected(fresh_query, new), atol=2e-5, rtol=2e-5)
