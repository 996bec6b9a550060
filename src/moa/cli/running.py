"""`moa generate` and `moa chat`: a model under a plan."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from moa.cli.options import Device, DType, Model, PlanFile, Quiet, load
from moa.errors import InputError


def generate(
    model: Model,
    plan: PlanFile,
    prompt: Annotated[str, typer.Option(help="The user's message, or - to read it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Answer one message under a plan, streaming."""
    from moa.chat import Conversation
    from moa.plan import Plan

    rules = Plan.load(plan)
    try:
        message = sys.stdin.read() if prompt == "-" else prompt
        message.encode()
    except UnicodeError as error:
        raise InputError("the prompt is not UTF-8 text; give text, such as a file that `file` calls UTF-8") from error
    conversation = Conversation(load(model, dtype, device, quiet), rules, max_new_tokens)
    for piece in conversation.say(message):
        print(piece, end="", flush=True)
    print()
    _note(quiet, conversation.usage())


def chat(
    model: Model,
    plan: PlanFile,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Talk to a model under a plan, all turns on one cache; an empty line ends."""
    from moa.chat import Conversation
    from moa.plan import Plan

    conversation = Conversation(load(model, dtype, device, quiet), Plan.load(plan), max_new_tokens)
    while True:
        try:
            message = input("you> ")
        except EOFError:
            break
        if not message.strip():
            break
        for piece in conversation.say(message):
            print(piece, end="", flush=True)
        print()
        _note(quiet, conversation.usage())


def _note(quiet: bool, text: str) -> None:
    if not quiet:
        Console(stderr=True).print(f"[dim]{text}[/dim]", highlight=False)
