"""Pieces of HTML that the report is put together from."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 220


def safe(text: object) -> str:
    """Text for HTML; lone surrogates of undecodable file names become question marks."""
    plain = str(text).encode("utf-8", "replace").decode("utf-8")
    return html.escape(plain, quote=True)


def percent(value: float | None) -> str:
    """A fraction of 1 in per cent, a dash for None."""
    return "–" if value is None else f"{100 * value:.2f}"


def data_url(content: bytes, kind: str) -> str:
    """Bytes as the address of an image."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def themed_image(light: bytes, dark: bytes, alt: str) -> str:
    """An image that follows the reader's light or dark theme."""
    return (
        f'<picture><source media="screen and (prefers-color-scheme: dark)" '
        f'srcset="{data_url(dark, "png")}">'
        f'<img src="{data_url(light, "png")}" alt="{safe(alt)}"></picture>'
    )


def thumbnail(picture: Image, alt: str) -> str:
    """A small copy of a picture, inside the page."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return f'<img src="{data_url(buffer.getvalue(), "jpeg")}" alt="{safe(alt)}" loading="lazy">'
