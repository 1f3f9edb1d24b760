"""Collect the emoji of the embedded world into one file; only a change of THINGS needs it.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python examples/train_generator/sprites.py package/assets

The pictures are Fluent Emoji (Microsoft, MIT license).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

from aigiqa_reward.toy.pictures import CELL, COLUMNS, SPRITES
from aigiqa_reward.toy.world import THINGS
from aigiqa_reward.utils.io import write_atomically


def main(assets: Path) -> None:
    sheet = Image.new("RGBA", (CELL * COLUMNS, CELL * -(-len(THINGS) // COLUMNS)))
    for index, point in enumerate(THINGS.values()):
        names = [assets / f"{point:04x}{suffix}.webp" for suffix in ("", "-fe0f")]
        emoji = Image.open(next(path for path in names if path.exists())).convert("RGBA")
        emoji = emoji.crop(emoji.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
        emoji.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        row, column = divmod(index, COLUMNS)
        sheet.paste(emoji, (column * CELL + (CELL - emoji.width) // 2, row * CELL + (CELL - emoji.height) // 2))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=90, method=6)
    write_atomically(SPRITES, buffer.getvalue())
    print(f"{SPRITES}: {len(buffer.getvalue()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
