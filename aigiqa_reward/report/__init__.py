"""Pictures of results, to look at; never input of a reward.

Plots and curves load matplotlib when they are first used, pages only for heat maps, contact sheets never.

Example:
    >>> import torch
    >>> from aigiqa_reward import create_reward
    >>> from aigiqa_reward.report import HeatMaps, draw_heat_maps, heat_maps
    >>> images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    >>> heat = heat_maps(create_reward("compact"), images)
    >>> isinstance(heat, HeatMaps), heat.kind, heat.maps.shape
    (True, 'gradient', torch.Size([1, 64, 96]))
    >>> draw_heat_maps(images, heat).shape
    torch.Size([1, 3, 64, 96])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aigiqa_reward.report._style import WINNER
from aigiqa_reward.report.heat import HeatMaps, draw_heat_maps, heat_maps
from aigiqa_reward.report.page import write_page
from aigiqa_reward.report.sheet import contact_sheet

if TYPE_CHECKING:
    from aigiqa_reward.report.plots import line_plot, protocol_plot, scatter_plot

__all__ = [
    "WINNER",
    "HeatMaps",
    "contact_sheet",
    "draw_heat_maps",
    "heat_maps",
    "line_plot",
    "protocol_plot",
    "scatter_plot",
    "write_page",
]


def __getattr__(name: str) -> object:
    if name in ("line_plot", "protocol_plot", "scatter_plot"):
        from aigiqa_reward.report import plots

        return getattr(plots, name)
    raise AttributeError(f"module 'aigiqa_reward.report' has no attribute {name!r}")
