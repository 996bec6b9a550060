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
HALF = torch.bfloat16 if CUDA else torch.float16  # Triton's interpreter has no products in bfloat16
UNTOUCHED = 7.0


class Engine:
    """Requests whose tokens lie in pages, handed out at random, for heads of some groups.

    ``apart`` puts the pages of all heads into one tensor, page by page.
    """

    def __init__(
        self,
        heads=4,
        group=2,
        d=32,
        size=16,
        pages=120,
        windows=(9, 40),
        sink=5,
        apart=False,
        dtype=torch.float32,
    ):
        self.rng = np.random.default_rng(0)
        self.generator = torch.Generator().manual_seed(0)
        self.group, self.d, self.size, self.sink, self.windows, self.dtype = group, d, size, sink, windows, dtype
        self.group_of = [head % len(windows) for head in range(heads)]
        # what is not written is not read: it would be seen
        shape = (pages, heads, size, 2 * d) if apart else (heads, pages, size, 2 * d)
        memory = torch.full(shape, torch.nan, device=DEVICE, dtype=dtype)
        self.pages = list(memory.unbind(1 if apart else 0))
        self.free = [list(self.rng.permutation(np.arange(1, pages))) for _ in windows]
        self.table = [{} for _ in windows]  # request: its pages
        self.tokens = {}  # request: (keys, values), each [heads, tokens, d]

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(DEVICE, self.dtype)

    def step(self, new, padding=0, room=12):
        """Query, key and value of a step that gives request r ``new[r]`` tokens, and the step for each head.

        ``padding`` rows more belong to nobody; in a step of single tokens as many requests, too, as vLLM has it.
        """
        heads, total = len(self.pages), sum(new.values()) + padding
        key, value = self.normal(total, heads, self.d), self.normal(total, heads, self.d)
        query = self.normal(total, heads * self.group, self.d)
        starts = np.cumsum([0, *new.values(), *[0] * (padding if max(new.values()) == 1 else 0)])
        lengths = np.zeros(len(starts) - 1, np.int64)
        tables = np.zeros((len(self.windows), len(lengths), room), np.int64)
        slots = np.full((len(self.windows), total), -1)
        for row, (request, count) in enumerate(new.items()):
            begin = starts[row]
            fresh = [x[begin : begin + count].transpose(0, 1) for x in (key, value)]
            before = self.tokens.get(request, [x[:, :0] for x in fresh])
            self.tokens[request] = [torch.cat(pair, 1) for pair in zip(before, fresh, strict=True)]
            length = lengths[row] = self.tokens[request][0].shape[1]
            for group, window in enumerate(self.windows):
                held = self.table[group].setdefault(request, [])
                while len(held) * self.size < length:
                    held.append(self.free[group].pop())
                token = np.arange(length - count, length)
                slots[group, begin : begin + count] = np.array(held)[token // self.size] * self.size + token % self.size
                tables[group, row, : len(held)] = held
                # pages between sink and window may be anybody's by now
                tables[group, row, -(-self.sink // self.size) : max(0, length - count - window + 1) // self.size] = 0

        def move(array, dtype=torch.int32):
            return torch.from_numpy(array).to(DEVICE, dtype)

        per_group = [
            Step(
                move(tables[group]),
                move(slots[group], torch.int64),
                move(starts),
                move(lengths),
                max(new.values()),
                self.sink,
                window,
                self.size,
            )
            for group, window in enumerate(self.windows)
        ]
        return query, key, value, [per_group[group] for group in self.group_of]

    def expected(self, query, new):
        """[tokens of the requests, query heads, d], in float32."""
        spans = torch.tensor([[self.sink + self.windows[group] for group in self.group_of]])
        found, row = [], 0
        for request, count in new.items():
            keys, values = (x.float()[None] for x in self.tokens[request])
            q = query[row : row + count].float().transpose(0, 1)[None]
            found.append(span_attention(q, keys, values, spans, self.sink, AttentionOptions(self.d**-0.5))[0])
            row += count
        return torch.cat([each.transpose(0, 1) for each in found])


def check(attend, engine, new, **options):
    query, key, value, steps = engine.step(new, **options)
    output = torch.full_like(query, UNTOUCHED)
    attend(query, key, value, engine.pages, steps, engine.d**-0.5, output)
    compare(output, engine.expected(query, new))
    assert (output[sum(new.values()) :] == UNTOUCHED).all()


def compare(output, expected):
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[output.dtype]
    torch.testing.assert_close(output[: len(expected)].float(), expected, atol=tolerance, rtol=tolerance)


SHAPES = {
    "two groups": {},
    "one query head": {"group": 1, "d": 48, "size": 32, "windows": (9, 90)},
    "smallest and widest window": {"windows": (1, 200), "sink": 16},
    "no sink": {"sink": 0, "heads": 3, "windows": (7,)},
    "pages apart, of 48 tokens": {"apart": True, "size": 48, "group": 3, "windows": (60, 5, 300)},
    "half precision": {"dtype": HALF, "d": 128, "size": 64, "group": 7, "heads": 2, "windows": (150, 33)},
    "half precision, four pages a tile": {"dtype": HALF, "d": 64, "heads": 2, "windows": (150, 33)},
}


@pytest.mark.parametrize("name", ATTEND)
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_prompts_chunks_and_decoding(name, options):
    engine = Engine(**options)
    # Tiles of keys begin at multiples of 32 or 64. After 156 tokens one begins in a page before the window, which is
    # somebody else's by now; after 30 and 62 the first query sees all of a tile but its last key or two.
    check(ATTEND[name], engine, {0: 30, 1: 156, 2: 1, 3: 62})
    check(ATTEND[name], engine, {0: 1, 1: 30, 2: 50, 3: 17})  # who decodes beside who reads a prompt
    check(ATTEND[name], engine, {0: 33, 3: 40})
    for _ in range(3):
        check(ATTEND[name], engine, {0: 1, 1: 1, 2: 1, 3: 1})
    check(ATTEND[name], engine, {3: 1, 1: 1})


@pytest.mark.parametrize("name", ATTEND)
@pytest.mark.parametrize("new", [{0: 1, 1: 1}, {0: 1, 1: 5}], ids=["decoding", "with a chunk"])
def test_rows_of_no_request_store_nothing(name, new):
    engine = Engine()
    check(ATTEND[name], engine, {0: 40, 1: 9})
    before = [page.clone() for page in engine.pages]
    check(ATTEND[name], engine, new, padding=3)
    pairs = zip(before, engine.pages, strict=True)
    changed = sum(int((a.nan_to_num() != b.nan_to_num()).any(-1).sum()) for a, b in pairs)
    assert changed == sum(new.values()) * len(engine.pages)


@pytest.mark.parametrize("programs", [1 << 20, 1], ids=["shortest pieces", "longest pieces"])
def test_pieces_of_long_requests_add_up(programs, monkeypatch):
    """More pieces than are added at once; and some that are full, some partly, some not at all."""
    monkeypatch.setattr("moa.serving.triton_paged_decode._PROGRAMS", programs)
    engine = Engine(heads=2, group=1, d=16, pages=700, windows=(9000 + programs % 2, 40))
    for _ in range(6):
        query, key, value, steps = engine.step({0: 1400, 1: 30}, room=600)
        paged.attend(query, key, value, engine.pages, steps, engine.d**-0.5, torch.empty_like(query))
    check(ATTEND["kernels"], engine, {0: 1, 1: 1}, room=600)


def test_pages_of_another_layout_are_refused():
    engine = Engine()
    query, key, value, steps = engine.step({0: 2})
    for pages in ([page.to(HALF) for page in engine.pages], [page.transpose(1, 2) for page in engine.pages]):
        with pytest.raises(ValueError, match=r"expected torch\.float32, and 64 numbers"):
            triton_paged.attend(query, key, value, pages, steps, 1.0, torch.empty_like(query))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
def test_recorded_step():
    """A CUDA graph of a step is right when tables, slots and lengths have moved on, also with fewer requests."""
    engine = Engine()
    check(ATTEND["kernels"], engine, {0: 40, 1: 9, 2: 90})
    query, key, value, steps = engine.step({0: 1, 1: 1, 2: 1})
    output = torch.empty_like(query)
    attend = ATTEND["kernels"]
    attend(query, key, value, engine.pages, steps, engine.d**-0.5, output)  # compiled, addresses known
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(query, key, value, engine.pages, steps, engine.d**-0.5, output)
    for turn in range(20):
        new = {0: 1, 1: 1, 2: 1} if turn % 2 else {2: 1, 0: 1}
        fresh_query, fresh_key, fresh_value, fresh = engine.step(new, padding=3 - len(new))
        for old, now in zip((query, key, value), (fresh_query, fresh_key, fresh_value), strict=True):
            old.copy_(now)
        for old, now in {id(step): (step, now) for step, now in zip(steps, fresh, strict=True)}.values():
            for name in ("table", "slots", "starts", "lengths"):
                getattr(old, name).copy_(getattr(now, name))
        graph.replay()
        compare(output, engine.expected(fresh_query, new))
