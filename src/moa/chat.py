"""A conversation under a plan: every turn goes on in the same SpanCache."""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from moa.cache import SpanCache
from moa.errors import InputError
from moa.models import LoadedModel, chat_next, chat_prompt
from moa.plan import Plan
from moa.runtime import apply


class Conversation:
    """Turns of one user with one model.

    Parameters
    ----------
    loaded : LoadedModel
    plan : Plan
    max_new_tokens : int
        Longest answer of a turn.
    """

    def __init__(self, loaded: LoadedModel, plan: Plan, max_new_tokens: int = 256):
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        self._loaded, self._plan, self._new = loaded, plan, max_new_tokens
        self._model: Any = loaded.model  # transformers' own types do not know that it generates
        self._ids = torch.empty(1, 0, dtype=torch.long)
        self._cache = SpanCache(plan, 1)

    def say(self, message: str) -> Iterator[str]:
        """Yield the model's answer to ``message`` piece by piece.

        Raises
        ------
        InputError
            If the conversation would outgrow the model's context.
        """
        if not message.strip():
            raise InputError("the message is empty; give the model something to answer")
        ids = torch.cat([self._ids, self._turn(message)], dim=1)
        if ids.shape[1] + self._new > self._loaded.context_length:
            raise InputError(
                f"the conversation has {ids.shape[1]} tokens and asks for {self._new} more, but {self._loaded.name} "
                f"has a context of {self._loaded.context_length}; shorten the prompt or ask for fewer new tokens"
            )
        streamer: Any = TextIteratorStreamer(self._loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        outcome: list[Any] = []

        def work() -> None:
            try:
                outcome.append(
                    self._model.generate(
                        ids.to(self._model.device),
                        attention_mask=torch.ones_like(ids, device=self._model.device),  # else guessed from the ids
                        past_key_values=self._cache,
                        max_new_tokens=self._new,
                        do_sample=False,
                        streamer=streamer,
                    )
                )
            except BaseException as error:  # handed to the caller's thread, which waits for the streamer's end
                outcome.append(error)
                streamer.end()

        with apply(self._loaded.model, self._plan):
            worker = Thread(target=work, daemon=True)
            worker.start()
            yield from streamer
            worker.join()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        self._ids = outcome[0].cpu()

    def usage(self) -> str:
        """Tokens of the conversation so far, and what the cache holds for them."""
        tokens = self._ids.shape[1]
        dense = Plan.dense(self._plan.model).kv_bytes(tokens, self._loaded.model.dtype)
        return f"{tokens} tokens, KV cache {self._cache.nbytes():,} bytes (dense {dense:,})"

    def _turn(self, message: str) -> torch.Tensor:
        """Token ids that a new user message adds after everything said so far: int64 [1, tokens]."""
        tokenizer = self._loaded.tokenizer
        if not self._ids.shape[1]:
            return torch.tensor([chat_prompt(tokenizer, message)])
        ids = chat_next(tokenizer, message)
        if ids and ids[0] == int(self._ids[0, -1]):  # the answer already ended with the template's end of turn
            ids = ids[1:]
        return torch.tensor([ids])
