"""Check shape annotations of the package while the tests run; fixtures that several files share.

jaxtyping's hook must be installed before the package is imported, so this file does it on import. It also sets one
thread per test process, and lets glibc keep memory between operations, which makes torch on CPUs much faster.
"""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import jaxtyping
import pytest
import torch
from beartype import beartype

Function = TypeVar("Function", bound=Callable[..., Any])


def check_shapes(function: Function) -> Function:
    """Let beartype check annotations with shapes only; the package checks plain types with better errors."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if _states_shape(hint)}
    return beartype(function)


def _states_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_states_shape(part) for part in get_args(hint))


jaxtyping.install_import_hook("aigiqa_reward", f"{__name__}.check_shapes")

from aigiqa_reward.utils.memory import keep_memory  # noqa: E402

LIBC = ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None
keep_memory()
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """Free memory after each file."""
    yield
    gc.collect()
    if LIBC is not None:
        LIBC.malloc_trim(0)


@pytest.fixture(scope="session")
def agiqa3k() -> Path:
    """The folder of human-scored images beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "agiqa3k"
    if not folder.is_dir():
        pytest.skip("human-scored images are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a tiny open_clip model of random weights."""
    from clip_models import write_tiny_clip  # not before jaxtyping's hook is in place

    return f"local-dir:{write_tiny_clip(tmp_path_factory.mktemp('clip'), seed=0)}"


@pytest.fixture(scope="session")
def tiny(clip: str) -> list[str]:
    """Command line options of a small reward on it."""
    return ["--reward", "tsp_mgs", "--encoder", clip, "--device", "cpu"]


@pytest.fixture(scope="session")
def tiny_reward(clip: str) -> Any:
    """That reward."""
    from aigiqa_reward import create_reward
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig

    return create_reward("tsp_mgs", encoder=OpenCLIPConfig(architecture=clip))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest file, so that both processes end at about the same time."""
    items.sort(key=lambda item: item.path.name != "test_model_contract.py")
