"""The command `web`."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from aigiqa_reward.cli._console import CommandError, say
from aigiqa_reward.cli._io import check_writable
from aigiqa_reward.cli._options import DEVICE, OneRewardOptions, argument, option, options
from aigiqa_reward.cli._pipelines import (
    EMBEDDED,
    EMBEDDED_SAMPLING,
    check_model,
    library,
    load_pipeline,
    load_rewards,
    usable_device,
)
from aigiqa_reward.utils.io import read_regular


@options("Page")
class WebOptions:
    """What the page shows, and who may see it."""

    folders: tuple[str, ...] = argument("FOLDER", "Folders of images and of results; the page reads no others.", ())
    output_dir: Path = option(Path("aigiqa-web"), "Folder for labels, samples and taught rewards.")
    host: str = option("127.0.0.1", "Address to listen on; other machines' need --auth.")
    port: int = option(7860, "Port to listen on; 0 for any free one.", min=0, max=65535)
    open: bool = option(False, "Open the page in the browser.", "--open")
    auth: str | None = option(None, "User, and file with the password in its first line.", metavar="USER:FILE")


@options("Models")
class WebModelOptions:
    """Models of the page."""

    model: str = option(
        EMBEDDED,
        "Text-to-image pipeline of diffusers to generate with, or 'embedded' for the one in the package.",
        *("--model", "--pretrained_model_name_or_path"),
        metavar="ID_OR_PATH|embedded",
    )
    reward: tuple[str, ...] = option(
        ("compact",), "Rewards by name, folder or Hub id, beside the embedded ones; the first is selected."
    )
    device: str | None = option(None, DEVICE)


def web(page: WebOptions, models: WebModelOptions) -> None:
    """Serve a page in the browser to rank, generate and label images and to teach a reward."""
    with library():
        try:
            import gradio
        except ImportError as error:
            raise ImportError(f"the page needs gradio ({error}); pip install 'aigiqa-reward[web]'") from error
    del gradio
    from aigiqa_reward import get_reward_spec
    from aigiqa_reward.web import Studio, serve

    folders = [Path(folder).expanduser() for folder in page.folders]
    if absent := [str(folder) for folder in folders if not folder.is_dir()]:
        raise CommandError(f"expected folders, got {absent[0]!r}", argument="folders")
    check_model(models.model)
    with library(name="reward"):
        for name in models.reward:  # which are loaded behind the page
            if "/" not in name and not Path(name).is_dir():
                get_reward_spec(name)
    auth = _user(page.auth)
    check_writable(page.output_dir)
    device = usable_device(models.device)

    def reward(name: str) -> object:
        return next(iter(load_rewards(OneRewardOptions(reward=(name,)), device).values()))[0]

    with library():
        studio = Studio(
            folders,
            page.output_dir,
            rewards=models.reward,
            load_reward=reward,  # pyright: ignore[reportArgumentType]
            load_pipeline=lambda: load_pipeline(models.model, device, "auto"),
            sampling=tuple(EMBEDDED_SAMPLING.values()) if models.model == EMBEDDED else (30, 5.0),
        )
    try:
        with library():
            serve(studio, host=page.host, port=page.port, auth=auth, ready=lambda url: _ready(url, page))
    except CommandError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE:
            text = f"{page.port} is taken; choose another port, or 0 for any free one"
            raise CommandError(text, argument="port") from error
        raise


def _user(auth: str | None) -> tuple[str, str] | None:
    """Return user and password."""
    if auth is None:
        return None
    user, _, file = auth.partition(":")
    if not user or not file:
        raise CommandError(f"expected USER:FILE, got {auth!r}", argument="auth")
    try:
        text = read_regular(os.path.expanduser(file), most=10_000).decode("utf-8")  # noqa: PTH111
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read the password in {file}: {error}", argument="auth") from error
    if not (password := text.partition("\n")[0].strip()):
        raise CommandError(f"expected the password in the first line of {file}, got a blank one", argument="auth")
    return user, password


def _ready(url: str, page: WebOptions) -> None:
    say("note", f"serving {url}; labels are kept in {page.output_dir}; Ctrl-C ends it")
    if page.open:
        import webbrowser

        webbrowser.open(url)
