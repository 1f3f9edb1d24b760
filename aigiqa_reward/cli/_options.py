"""Options of the commands, built from dataclasses: one field is one option, whose help is in the field's metadata.

A command is a function whose parameters are such dataclasses. Those of the library (FinetuneConfig, algorithms, Recipe)
become options in the same way: `max_train_steps` is `--max-train-steps`; fields without "help" get no option. Options
may be written with underscores, may come from `--config FILE.yaml`, and are given once, except for those that take
several values.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import os
import re
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field
from enum import Enum, StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from aigiqa_reward.cli._console import CommandError
from aigiqa_reward.cli._io import read_yaml

Options = TypeVar("Options")

# --------------------------------------------------------------------------------------------- declaring


def option(default: Any, help: str, *names: str, **more: Any) -> Any:
    """Declare an option as a dataclass field.

    Args:
        default: value where the option is not given; MISSING for a required option.
        help: one sentence.
        names: spellings; by default the field's name with dashes.
        more: metavar, min, max, show_default of `typer.Option`.
    """
    return field(default=default, metadata={"help": help, "names": names, "more": more})


@dataclass_transform(kw_only_default=True)
def options(panel: str) -> Callable[[type[Options]], type[Options]]:
    """Make a dataclass of options under a heading in the help."""

    def make(kind: type[Options]) -> type[Options]:
        kind.panel = panel  # pyright: ignore[reportAttributeAccessIssue]
        return dataclass(kw_only=True)(kind)

    return make


def argument(metavar: str, help: str, default: Any = MISSING) -> Any:
    """Declare a positional argument as a dataclass field."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True)
class Fields:
    """Options from the fields of a dataclass.

    Attributes:
        source: the dataclass.
        panel: heading in the help.
        defaults: whether the fields' defaults are the command's; if not, they depend on other options.
        skip: names of fields without an option.
        given: whether the command takes a dict of the values that differ from the defaults, or the dataclass.
    """

    source: type
    panel: str
    defaults: bool = True
    skip: Collection[str] = ()
    given: bool = True

    @property
    def fields(self) -> list[dataclasses.Field[Any]]:
        """The fields that are options."""
        every = dataclasses.fields(self.source)
        return [each for each in every if "help" in each.metadata and each.name not in self.skip]

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield the parameters that Typer makes options of."""
        for each in self.fields:
            yield _parameter(each, _hint(self.source, each), self.panel, self._default(each))

    def collect(self, values: Mapping[str, Any]) -> Any:
        """Return what the command takes, from the values that Typer found."""
        own = {}
        for each in self.fields:
            value, default = _plain(values[each.name]), self._default(each)
            nothing = value in (None, ()) and default in (None, ())  # Typer's None or [] of several values
            if not self.given or (value != default and not nothing):
                own[each.name] = default if nothing else value
        return own if self.given else self.source(**own)

    def _default(self, each: dataclasses.Field[Any]) -> Any:
        if self.given and (not self.defaults or each.default is MISSING):
            return None
        return each.default


def command(
    run: Callable[..., None], fixed: Mapping[str, Any] = types.MappingProxyType({}), **library: Fields
) -> Callable[..., None]:
    """Return a function for `app.command(cls=Command)` that has all options of `run`.

    Args:
        run: the command, whose parameters are dataclasses made with `option`.
        fixed: parameters of `run` without options.
        library: dataclasses of the library, for parameters of `run` that take a dict.
    """
    hints = get_type_hints(run)
    names = [name for name in inspect.signature(run).parameters if name not in fixed]
    sources = {name: library.get(name) or Fields(hints[name], hints[name].panel, given=False) for name in names}

    def call(config: Path | None, **values: Any) -> None:
        del config  # read before the other options
        run(**{name: source.collect(values) for name, source in sources.items()}, **fixed)

    parameters = [each for source in sources.values() for each in source.parameters()]
    parameters.append(inspect.Parameter("config", _KEYWORD, default=None, annotation=_CONFIG))
    # Typer reads options from a function's signature.
    call.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    call.__name__, call.__doc__ = run.__name__, run.__doc__
    return call


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _hint(source: type, each: dataclasses.Field[Any]) -> Any:
    """A field's type; other annotations of its class may name what is imported for type checkers only."""
    owner = next(base for base in source.__mro__ if each.name in inspect.get_annotations(base))
    return eval(str(each.type), vars(sys.modules[owner.__module__]))


def _parameter(each: dataclasses.Field[Any], hint: Any, panel: str, default: Any) -> inspect.Parameter:
    about, dashed = each.metadata, each.name.replace("_", "-")
    kind, more = _kind(hint, default)
    if "metavar" in about:
        info = typer.Argument(metavar=about["metavar"], help=about["help"])
        empty = inspect.Parameter.empty if default is MISSING else None
        return inspect.Parameter(each.name, _KEYWORD, default=empty, annotation=Annotated[kind, info])
    more |= {"metavar": ""} if kind is bool else {}  # a flag has no value that its help could show
    names = about.get("names") or (f"--{dashed}/--no-{dashed}" if kind is bool else f"--{dashed}",)
    info = typer.Option(*names, help=about["help"], rich_help_panel=panel, **more, **about.get("more", {}))
    if default is MISSING:
        return inspect.Parameter(each.name, _KEYWORD, annotation=Annotated[kind, info])
    if isinstance(default, tuple):
        default = list(default) or None
    elif default is not None and inspect.isclass(kind) and issubclass(kind, Enum):
        default = kind(default)
    annotation = Annotated[kind | None if default is None else kind, info]
    return inspect.Parameter(each.name, _KEYWORD, default=default, annotation=annotation)


def _kind(hint: Any, default: Any) -> tuple[Any, dict[str, Any]]:
    """The type that Typer knows for an annotation, and further arguments of the option."""
    union = get_origin(hint) in (Union, types.UnionType)
    parts = [part for part in get_args(hint) if part is not type(None)] if union else [hint]
    if str in parts:
        return str, {}
    if len(parts) > 1 or (union and default is not None):
        return str, {"parser": _parser(hint)}
    if get_origin(parts[0]) is Literal:
        return StrEnum("Choice", {name: name for name in get_args(parts[0])}), {}
    if get_origin(parts[0]) in (tuple, list, Sequence):
        return list[get_args(parts[0])[0]], {}
    return parts[0], {}


def _parser(hint: Any) -> Callable[[Any], Any]:
    """Read a value of a union such as `float | Literal["auto"] | None`."""
    parts = get_args(hint)
    numbers = [part for part in (int, float) if part in parts]
    words = {word: word for part in parts if get_origin(part) is Literal for word in get_args(part)}
    words |= {"none": None} if type(None) in parts else {}

    def parse(text: Any) -> Any:
        if text in words or not isinstance(text, str):
            return words.get(text, text)
        for kind in numbers:
            with suppress(ValueError):
                return kind(text)
        raise typer.BadParameter(f"expected a number, or {' or '.join(words)}, got {text!r}")

    parse.__name__ = "|".join([*(f"{kind.__name__.upper()}" for kind in numbers), *words])  # in the help
    return parse


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_plain, value))
    if isinstance(value, Path):  # shells leave ~ alone after =, and YAML has no shell
        return Path(os.path.expanduser(value))  # noqa: PTH111  (Path's own raises for an unknown ~name)
    return value.value if isinstance(value, Enum) else value


# --------------------------------------------------------------------------------------------- reading


class _Help:
    """A command or group whose help does not say that flags are of type bool."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option --help."""
        parent: Any = super()
        if found := parent.get_help_option(ctx):
            found.metavar = ""
        return found


class Group(_Help, TyperGroup):
    """A group of commands."""


class Command(_Help, TyperCommand):
    """A command that accepts underscores, refuses repeated options, and names the option that an error is about."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line."""
        with self._naming_options():
            return super().parse_args(ctx, list(self._normalized(args, self.get_params(ctx))))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with self._naming_options():
            return super().invoke(ctx)

    def _normalized(self, args: Sequence[str], params: Sequence[Any]) -> Iterator[str]:
        known: dict[str, tuple[str, Any]]
        known = {name.replace("_", "-"): (name, each) for each in params for name in _spellings(each)}
        seen: set[str] = set()
        texts = "--prompt" in known and all(map(_spellings, params))  # no positional arguments
        left = deque(args)
        while left:
            token = left.popleft()
            name, equals, value = token.partition("=")
            spelled, each = known.get(name.replace("_", "-"), (name, None))
            if texts and not token.startswith("-"):
                text = " ".join([token, *itertools.takewhile(lambda word: not word.startswith("-"), left)])
                raise CommandError(f'expected options alone, got a text; pass --prompt "{text}"')
            yield spelled + equals + value
            if token == "--":
                yield from left
                return
            if not name.startswith("--"):
                continue
            if each is None:
                meant = difflib.get_close_matches(name.replace("_", "-"), known, 1, 0.4)
                raise CommandError(f"no such option; {f'did you mean {meant[0]}?' if meant else 'see --help'}", name)
            if each.name in seen and not each.multiple:
                raise CommandError("given twice; this option takes one value", argument=each.name)
            seen.add(str(each.name))
            if not equals and not each.is_flag and left:
                value = left.popleft()
                yield value  # whatever it looks like
            if each.name.endswith("prompt"):
                _check_quotes(each.name, value, left)

    @contextmanager
    def _naming_options(self) -> Iterator[None]:
        """Put the option before the text of an error, where the error says which argument is wrong."""
        try:
            yield
        except CommandError as error:
            text = re.sub(r"(?<![\w./-])([a-z]\w*)=('[^']*'|[\w.]*)", self._spelled, str(error))
            each = next((each for each in self.params if each.name == error.argument), None)
            name = error.argument if each is None else (_spellings(each) or [each.metavar or error.argument])[0]
            raise CommandError(f"{name}: {text}" if name else text, status=error.status) from error.__cause__

    def _spelled(self, argument: re.Match[str]) -> str:
        """Spell an argument of Python in a message, such as rank=8, as the option that it is here."""
        each = next((each for each in self.params if each.name == argument[1]), None)
        if each is None or not _spellings(each) or argument[2] in ("None", "False"):
            return argument[0]
        value = "" if argument[2] == "True" else argument[2].strip("'")
        return f"{_spellings(each)[0]} {value}".strip()


def with_nearest(message: str) -> str:
    """Add the nearest choice to a message of Typer, as in 'jason' is not one of 'table', 'jsonl', 'csv'."""
    message = message.replace("Value error, ", "")  # of pydantic
    found = re.search(r"'([^']*)' is not one of (.*)", message)
    meant = difflib.get_close_matches(found[1], re.findall(r"'([^']*)'", found[2]), 1) if found else []
    return f"{message.rstrip('.')}; did you mean {meant[0]}?" if meant else message


def _check_quotes(argument: str, value: str, left: Iterable[str]) -> None:
    """Refuse a text of one word that others follow, the first of them neither an option nor the path of a file."""
    words = [value, *itertools.takewhile(lambda word: not word.startswith("-"), left)]
    if len(words) == 1 or any(map(str.isspace, value)) or any(sign in words[1] for sign in "./\\*"):
        return
    if not os.path.exists(words[1]):  # noqa: PTH110  (never raises)
        text = f'a text of several words needs quotes: "{" ".join(words)}"; no file is called {words[1]}'
        raise CommandError(text, argument=argument)


def _spellings(each: Any) -> list[str]:
    """The spellings of an option; none of an argument."""
    return [name for name in (*each.opts, *each.secondary_opts) if name.startswith("--")]


def lazy(build: Callable[[], Callable[..., None]]) -> type[TyperCommand]:
    """Return a class for `app.command(cls=...)` whose options are built by `build` when the command is called.

    For commands whose options are those of dataclasses in modules that import torch.
    """

    class Lazy(TyperCommand):
        @cached_property
        def built(self) -> Any:
            app = typer.Typer(add_completion=False)
            app.command(self.name, cls=Command, help=self.help)(build())
            return get_command(app)

        def make_context(self, *args: Any, **more: Any) -> Any:
            return self.built.make_context(*args, **more)

        def get_params(self, ctx: Any) -> list[Any]:
            return self.built.get_params(ctx)

    return Lazy


def _read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Make the entries of a YAML file the command's defaults."""
    if file is None or context.resilient_parsing:
        return file
    params = {spelled[2:].replace("-", "_"): each for each in context.command.params for spelled in _spellings(each)}
    del params["config"]
    found: dict[str, Any] = {}
    for name, value in read_yaml(_plain(file)).items():
        each = params.get(name.replace("-", "_"))
        if each is None or each.name is None:
            meant = difflib.get_close_matches(name.replace("-", "_"), params, n=1)
            hint = f"; did you mean {meant[0]}?" if meant else "; see --help"
            raise CommandError(f"{file}: no option is named {name!r}{hint}", argument="config")
        if each.name in found:
            raise CommandError(f"{file}: {name} is given twice", argument="config")
        several = getattr(each, "multiple", False)
        if isinstance(value, list) and not several:
            raise CommandError(f"{file}: {name}: expected one value, got a list", argument="config")
        found[each.name] = [value] if several and isinstance(value, str) else value
        try:
            each.process_value(context, found[each.name])
        except typer.BadParameter as error:
            reason = with_nearest(error.message)
            raise CommandError(f"{file}: {name}: {reason}", argument="config") from error
    context.default_map = {**(context.default_map or {}), **{n: v for n, v in found.items() if v is not None}}
    return file


_CONFIG = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file with options of this command, such as 'seed: 3'; the command line takes precedence.",
        is_eager=True,
        callback=_read_config,
    ),
]


# --------------------------------------------------------------------------------------------- shared options

DType = Literal["float32", "bfloat16", "float16"]
PROMPT_COLUMN = "Column of the prompts in a table; by default the one called prompt, caption or text."
PROMPTS_FROM = (
    "Read each image's own prompt: embedded in the file as its generator wrote it, a sidecar (NAME.txt, NAME.caption, "
    "metadata.jsonl), or auto: the sidecar if there is one, else the file."
)
DEVICE = "Device to compute on: cpu, cuda, cuda:1, mps, ...; by default cuda if available, else cpu."


@options("Inputs")
class ImageOptions:
    """Images in files, and their prompts."""

    images: list[str] = argument("IMAGES", "Image files, and folders of them; put -- before names that start with -.")
    prompt: tuple[str, ...] = option((), "Prompt of all images or, repeated, one per image; none judges quality alone.")
    prompts: Path | None = option(
        None, "Prompts of the images: a table (.csv, .json, ...) by path or name, or text with one per line."
    )
    prompt_column: str | None = option(None, PROMPT_COLUMN)
    prompts_from: Literal["embedded", "sidecar", "auto"] | None = option(None, PROMPTS_FROM)
    recursive: bool = option(False, "Include the images in subfolders.")


@options("Reward")
class OneRewardOptions:
    """Rewards by name or folder."""

    reward: tuple[str, ...] = option(
        ("compact",),
        "Reward by name (see 'aigiqa-reward rewards'), folder or Hub id; repeat for several, as in compact:0.7.",
        metavar="NAME[:WEIGHT]",
    )
    weights: str | None = option(
        None,
        "Local copy of the weights of a single --reward: the authors' file of a published reward, or a folder.",
        metavar="PATH",
    )


@options("Reward")
class RewardOptions(OneRewardOptions):
    """Rewards with the settings that some of them take."""

    encoder: str | None = option(None, "open_clip architecture for zero-shot tsp_mgs: ViT-B-32, local-dir:FOLDER, ...")
    encoder_weights: Path | None = option(None, "Weights of --encoder: a tag such as openai, or a .safetensors file.")
    zero_shot: bool = option(False, "Use tsp_mgs without trained parts, on --encoder or the embedded towers.")
    scenario: str | None = option(None, "Scenario of cpa_iqa, as 'aigiqa-reward scenarios' lists them.")
    preferences: Path | None = option(None, "JSON file of scenarios for cpa_iqa with the weights of its components.")
    quality_weight: float | None = option(None, "Weight of quality in the total; 0.5 by default.")
    correspondence_weight: float | None = option(None, "Weight of correspondence in the total; 0.5 by default.")


@options("Pipeline")
class PipelineOptions:
    """A diffusers pipeline and where it computes."""

    model: str = option(
        MISSING,
        "Text-to-image pipeline of diffusers with .safetensors weights, or 'embedded' for the included one, which "
        "draws 64 emoji on 8 background colors.",
        *("--model", "--pretrained_model_name_or_path"),
        metavar="ID_OR_PATH|embedded",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Precision of the pipeline; auto is bfloat16 on cuda devices that support it, else float32."
    )
    device: str | None = option(None, DEVICE)


@options("Prompts")
class PromptOptions:
    """Prompts to sample from."""

    prompt: tuple[str, ...] = option((), "Prompt to sample images of; repeat for several.")
    prompts: Path | None = option(
        None, "File of prompts: text with one per line, or a table (.csv, .tsv, .json, .jsonl, .parquet, .xlsx)."
    )
    prompt_column: str | None = option(None, PROMPT_COLUMN)


@options("Sampling (by default the pipeline's)")
class SamplingOptions:
    """Arguments of the pipeline's call."""

    num_inference_steps: int | None = option(None, "Number of denoising steps.", min=1)
    guidance_scale: float | None = option(None, "Scale of classifier-free guidance.")
    height: int | None = option(None, "Height of the images in pixels.", min=16)
    width: int | None = option(None, "Width of the images in pixels.", min=16)
    settings: tuple[str, ...] = option((), "Further argument KEY=VALUE of the pipeline call; repeatable.", "--set")
