"""A page in the browser to rank, generate and label images, and to teach a reward; needs the extra `web`.

`aigiqa-reward web FOLDER` starts it. In Python::

    from aigiqa_reward.web import Studio, serve

    serve(Studio([Path("images")], Path("aigiqa-web")), port=7860)
"""

from __future__ import annotations

from aigiqa_reward.web.labels import Labels
from aigiqa_reward.web.server import serve
from aigiqa_reward.web.studio import Studio

__all__ = ["Labels", "Studio", "serve"]
